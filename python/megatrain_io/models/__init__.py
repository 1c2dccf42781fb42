"""Models of transformers: cut at their blocks, tested on a small copy, read from and written to model folders."""

"""Models of transformers: partitioned at their blocks, probed on a small copy, read from and written to folders."""

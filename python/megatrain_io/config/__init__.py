"""The configuration of a run: keys, their values, and how they are read. No torch."""

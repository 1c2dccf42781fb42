"""A step over a model that passes through RAM and a device block by block."""

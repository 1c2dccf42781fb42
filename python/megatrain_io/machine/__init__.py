"""The machine: drives, memory, processor, and what they can do."""

"""The command line: a file for each group of commands, and how each of them ends."""

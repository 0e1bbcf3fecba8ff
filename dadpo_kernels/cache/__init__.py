"""The teacher cache: a file format, and what writes, reads, checks and converts it."""

"""The teacher cache: its file format, and the modules that write, read, check and convert it."""

"""The command `dadpo`: `main`, and one module for each sub-command.

The module of a sub-command has two functions. `configure(parser)` declares the arguments and imports only the standard
library, so that `--help` is fast. `run(args) -> int` does the work, imports what it needs, and returns the exit
status.
"""

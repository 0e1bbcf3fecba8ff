"""The command `dadpo`: `main` and one module a sub-command.

A sub-command's `configure(parser)` declares its arguments and imports argparse only, so that `--help` answers at once;
its `run(args) -> int` does the work and imports what that needs.
"""

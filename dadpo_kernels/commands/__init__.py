"""One module per sub-command: `configure(parser)` declares its arguments, `run(args) -> int` does the work.

`configure` must stay cheap (argparse only), so that `--help` answers at once: import the heavy modules inside `run`.
"""

"""The entry point of `dadpo COMMAND ...`. It imports the module of a command only when that command is called."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from .process_group import ending_process_group

COMMANDS = {
    "pairs": "sample preference pairs from teacher and student, or import a set",
    "teacher": "score preference pairs with a teacher once and cache its targets",
    "reference": "add a reference model's log-probabilities to a cache",
    "cache": "check a cache, summarise it, convert it, or make one of another framework's teacher data",
    "train": "train a student from a cache of teacher targets",
    "memory": "show which plan of the loss fits into memory, and what it costs",
    "doctor": "report what is built, and which backend a call gets and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, print an error to stderr, and return the exit status.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Returns:
        0 for success, 1 for a negative result (a damaged cache, a loss that does not fit into memory), 2 for an
        error, whose message is one line, and 130 for Ctrl-C.

    Raises:
        SystemExit: argparse exits with status 2 for wrong usage and 0 after `--help`.
    """
    # Find the command.
    listing = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dadpo",
        description="Distribution-aware preference distillation without full logits.",
        epilog=f"commands:\n{listing}\n\n`dadpo COMMAND --help` shows a command's arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.add_argument("command", metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        near = difflib.get_close_matches(args.command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        parser.error(f"unknown command {args.command!r}: {hint}")

    # Run it.
    module = importlib.import_module(f".{args.command}", __package__)
    command = argparse.ArgumentParser(prog=f"dadpo {args.command}", description=module.__doc__)
    module.configure(command)
    try:
        with ending_process_group():
            return module.run(command.parse_args(args.arguments))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"dadpo {args.command}: {_message(error)}", file=sys.stderr)
        return 2


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("dadpo_kernels"):
        return f"the package {error.name!r} is missing: pip install 'dadpo-kernels[train]'"
    return " ".join(str(error).split()) or type(error).__name__

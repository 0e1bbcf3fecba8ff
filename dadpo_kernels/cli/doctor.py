"""Reports what is installed and built, and which backend a call gets and why."""

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """The command does not take arguments."""


def run(args: argparse.Namespace) -> int:
    from .doctor_report import report

    print(report())
    return 0

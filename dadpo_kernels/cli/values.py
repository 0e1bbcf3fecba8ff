"""Parsers of argument values. What they refuse, argparse prints with the name of the argument."""

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def size(text: str) -> int:
    """The number of bytes in `24GiB`, `24G`, `512m` or `1000`. Raises argparse.ArgumentTypeError for other texts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it as 24GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def at_least(least: int) -> Callable[[str], int]:
    """A parser of integers that are not below `least`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def renames(text: str) -> dict[str, str]:
    """`{"prompt": "question"}` from `prompt=question`, several separated by commas."""
    parts = [part.split("=", 1) for part in text.split(",")]
    if not all(len(part) == 2 and part[0] for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=COLUMN, several separated by commas")
    columns = {name.strip(): column.strip() for name, column in parts}
    if [name for name, column in columns.items() if not column and name != "prompt"] or len(columns) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: each name needs one column (only prompt can have none)")
    return columns


def json_object(text: str) -> dict[str, Any]:
    """The object in a JSON text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} is not an object, as '{{"enable_thinking": false}}'""")
    return value

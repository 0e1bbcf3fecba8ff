"""Arguments of the commands that read pairs: where they are, what to do with a bad one, and the chat template."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..capture.chat import ChatTemplate
    from ..capture.pairs import PairRecords

SOURCE = "JSON, JSONL or Parquet file, or a set for `datasets` as NAME:SPLIT or NAME:CONFIG:SPLIT"
_LISTED = 10  # refused records that are printed


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


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help=f"{SOURCE}, in one of the forms of docs/data.md"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="read the first N records only")
    parser.add_argument(
        "--columns",
        type=renames,
        metavar="NAME=COLUMN,...",
        help="columns of the source to use as prompt, chosen, rejected; `prompt=` says that both answers begin with "
        "the prompt",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a record that is no pair or that cannot be tokenized as meant: stop, or leave it out and count it "
        "(default %(default)s)",
    )


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja file to use instead of the tokenizer's template"
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="""variables of the chat template, as '{"enable_thinking": false}'""",
    )


def read(args: argparse.Namespace) -> "PairRecords":
    from ..capture.pairs import read_pairs

    return read_pairs(args.data, args.limit, columns=args.columns, on_error=args.on_error)


def chat_template(tokenizer: Any, args: argparse.Namespace, today: date | None = None) -> "ChatTemplate":
    """The tokenizer's template, or that of `--chat-template`, with the variables of the command line."""
    from ..capture.chat import ChatTemplate

    if args.chat_template is not None:
        try:
            tokenizer.chat_template = args.chat_template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--chat-template: {args.chat_template} is not UTF-8 ({error})") from None
    return ChatTemplate(tokenizer, args.chat_template_kwargs, today)


def print_changes(notes: Mapping[str, int], refused: Sequence[str]) -> None:
    """What was changed and left out."""
    for note, count in notes.items():
        print(f"{count} {note}")
    if refused:
        print(f"{len(refused)} records left out, because of these errors:")
        for reason in refused[:_LISTED]:
            print(f"  {reason}")
        if len(refused) > _LISTED:
            print(f"  and {len(refused) - _LISTED} more")

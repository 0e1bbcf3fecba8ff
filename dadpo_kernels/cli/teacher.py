"""Scores preference pairs with a teacher once and writes its targets to a cache. After an interruption, the same
command continues where it stopped."""

import argparse
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from .data_args import add_data_arguments, add_template_arguments, chat_template, print_changes, read
from .model_args import (
    add_capture_arguments,
    add_model_arguments,
    add_server_arguments,
    connect,
    is_first_process,
    load,
    print_summary,
)
from .values import at_least

_MAX_LENGTH = 2048


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "the teacher")
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="directory of the cache")
    parser.add_argument(
        "--k",
        type=at_least(0),
        default=64,
        help="number of most probable tokens to store per position (default %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=at_least(2),
        metavar="N",
        help="longest sequence of prompt and answer, in tokens: longer answers are cut, and pairs with a prompt of "
        "this length are skipped (default 2048, or the model's positions if they are fewer)",
    )
    parser.add_argument(
        "--student-vocab-size",
        type=at_least(1),
        metavar="N",
        help="vocabulary size of the student's LM head, if smaller than the teacher's: larger ids go to the tail",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="afterwards, score the pairs with this model too, as `dadpo reference` does",
    )
    parser.add_argument("--reference-revision", metavar="REVISION", help="branch, tag or commit of that model")
    add_template_arguments(parser)
    add_capture_arguments(parser)
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..capture.load import load_tokenizer, positions, vocabulary_size
    from ..capture.local import capture_teacher
    from ..capture.pairs import tokenize_pairs
    from ..capture.remote import capture_from_server

    # The server's address and key are checked first, then the pairs are read and tokenized.
    server = None if args.server is None else connect(args)
    source = {"revision": args.revision, "gguf_file": args.gguf_file}
    tokenizer = load_tokenizer(args.model, **source)
    longest = positions(args.model, **source)
    if args.max_length is not None and args.max_length > longest:
        raise ValueError(f"--max-length {args.max_length} is more than the {longest:.0f} positions of {args.model}")
    max_length = args.max_length or int(min(_MAX_LENGTH, longest))
    template = chat_template(tokenizer, args, _date_of(args.out))
    data = tokenize_pairs(
        read(args), tokenizer, max_length, template=template, on_error=args.on_error, progress=is_first_process()
    )
    if is_first_process():
        cut = f"{data.truncated} answers cut and {len(data.skipped)} pairs skipped at {max_length} tokens"
        print(f"{len(data.pairs)} pairs; {cut}")
        print_changes(data.notes, data.refused)

    # Score them with the teacher.
    options: dict[str, Any] = {
        "k": args.k,
        "student_vocab_size": args.student_vocab_size,
        "shard_tokens": args.shard_tokens,
        "progress": True,
    }
    if server is None:
        manifest = capture_teacher(load(args), tokenizer, data, args.out, batch_tokens=args.batch_tokens, **options)
    else:
        vocab_size = vocabulary_size(args.model, **source)
        with closing(server):
            manifest = capture_from_server(
                server, tokenizer, data, args.out, vocab_size=vocab_size, concurrency=args.concurrency, **options
            )
    print_summary(args.out, manifest)

    # Score them with the reference.
    if args.reference is not None:
        from . import reference

        scoring = {"model": args.reference, "revision": args.reference_revision, "gguf_file": None}
        scoring |= {"cache": args.out, "out": None}
        return reference.run(argparse.Namespace(**{**vars(args), **scoring}))
    return 0


def _date_of(out: Path) -> date | None:
    """The date that the chat template was given when the capture in `out` began; None if there is none."""
    from ..cache.shards import MANIFEST, read_manifest

    if not (out / MANIFEST).is_file():
        return None
    today = read_manifest(out, "teacher").settings.get("today")
    try:
        return date.fromisoformat(today) if today is not None else None
    except (TypeError, ValueError):
        raise ValueError(f"{out / MANIFEST} is malformed: settings.today is {str(today)[:40]!r}, no date") from None

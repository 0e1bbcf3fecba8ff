"""Scores preference pairs with a teacher once and writes its targets to a cache. After an interruption, the same
command continues where it stopped."""

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from .model_args import (
    add_capture_arguments,
    add_model_arguments,
    add_server_arguments,
    connect,
    is_first_process,
    load,
    print_summary,
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "the teacher")
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="JSONL or Parquet file, or a set for `datasets` as NAME:SPLIT, with the columns prompt, chosen and "
        "rejected (all strings, or all lists of messages) or those of UltraFeedback-binarized",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="directory of the cache")
    parser.add_argument(
        "--k", type=int, default=64, help="number of most probable tokens to store per position (default %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=2048,
        metavar="N",
        help="longest sequence of prompt and answer, in tokens: longer answers are cut, and pairs with a prompt of "
        "this length are skipped (default %(default)s)",
    )
    parser.add_argument(
        "--student-vocab-size",
        type=int,
        metavar="N",
        help="vocabulary size of the student's LM head, if smaller than the teacher's: larger ids go to the tail",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N pairs only")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="afterwards, score the pairs with this model too, as `dadpo reference` does",
    )
    parser.add_argument("--reference-revision", metavar="REVISION", help="branch, tag or commit of that model")
    add_capture_arguments(parser)
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..capture.load import load_tokenizer, vocabulary_size
    from ..capture.local import capture_teacher
    from ..capture.pairs import read_pairs, tokenize_pairs
    from ..capture.remote import capture_from_server

    # Read and tokenize the pairs.
    tokenizer = load_tokenizer(args.model, revision=args.revision, gguf_file=args.gguf_file)
    data = tokenize_pairs(read_pairs(args.data, args.limit), tokenizer, args.max_length, progress=is_first_process())
    lost = f"{data.truncated} answers cut and {len(data.skipped)} pairs skipped at {args.max_length} tokens"
    if is_first_process():
        print(f"{len(data.pairs)} pairs; {lost}")

    # Score them with the teacher.
    options: dict[str, Any] = {
        "k": args.k,
        "student_vocab_size": args.student_vocab_size,
        "shard_tokens": args.shard_tokens,
        "progress": True,
    }
    if args.server is None:
        manifest = capture_teacher(load(args), tokenizer, data, args.out, batch_tokens=args.batch_tokens, **options)
    else:
        vocab_size = vocabulary_size(args.model, revision=args.revision, gguf_file=args.gguf_file)
        with closing(connect(args)) as server:
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

"""Runs a teacher over preference pairs once and writes its targets to a cache. Interrupted, the same command goes on
where it stopped."""

import argparse
from pathlib import Path

from .model_pass import add_model_arguments, add_pass_arguments, load, summary


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "the teacher")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        type=Path,
        help="JSONL, a pair a line: prompt, chosen, rejected, all strings or all lists of messages",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the cache")
    parser.add_argument("--k", type=int, default=64, help="most probable tokens stored a position (%(default)s)")
    parser.add_argument(
        "--max-length",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of prompt and answer: answers are cut, pairs whose prompt alone fills it skipped (%(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N pairs only")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="then score the pairs with this model too, as `dadpo reference` does",
    )
    add_pass_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..teacher.capture import capture_teacher
    from ..teacher.load import load_tokenizer
    from ..teacher.pairs import read_pairs, tokenize_pairs

    tokenizer = load_tokenizer(args.model, revision=args.revision, gguf_file=args.gguf_file)
    data = tokenize_pairs(read_pairs(args.data, args.limit), tokenizer, args.max_length, progress=True)
    lost = f"{data.truncated} answers cut and {len(data.skipped)} pairs skipped at {args.max_length} tokens"
    print(f"{len(data.pairs)} pairs; {lost}")
    manifest = capture_teacher(
        load(args),
        tokenizer,
        data,
        args.out,
        k=args.k,
        batch_tokens=args.batch_tokens,
        shard_tokens=args.shard_tokens,
        progress=True,
    )
    print(summary(args.out, manifest))
    if args.reference is not None:
        from . import reference

        scoring = {"model": args.reference, "cache": args.out, "out": None, "revision": None, "gguf_file": None}
        return reference.run(argparse.Namespace(**{**vars(args), **scoring}))
    return 0

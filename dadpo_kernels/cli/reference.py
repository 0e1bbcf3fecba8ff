"""Scores the pairs of a teacher cache with a reference model, mostly the student before training, and adds the
log-probabilities to the cache. Interrupted, the same command goes on where it stopped."""

import argparse
from pathlib import Path

from .model_args import add_model_arguments, add_pass_arguments, load, print_summary


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "the reference")
    parser.add_argument("--cache", required=True, metavar="DIR", type=Path, help="a finished cache of `dadpo teacher`")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to write: CACHE/reference if not given; one directory a student if you train several",
    )
    add_pass_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..cache.shards import REFERENCE
    from ..capture.load import load_tokenizer
    from ..capture.local import capture_reference

    tokenizer = load_tokenizer(args.model, revision=args.revision, gguf_file=args.gguf_file)
    out = args.out or args.cache / REFERENCE
    manifest = capture_reference(
        load(args),
        tokenizer,
        args.cache,
        out,
        batch_tokens=args.batch_tokens,
        shard_tokens=args.shard_tokens,
        progress=True,
    )
    print_summary(out, manifest)
    return 0

"""Scores the pairs of a teacher cache with a reference model, usually the student before training, and adds the
log-probabilities to the cache. After an interruption, the same command continues where it stopped."""

import argparse
from pathlib import Path

from .model_args import add_capture_arguments, add_model_arguments, load, print_summary


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "the reference")
    parser.add_argument("--cache", required=True, metavar="DIR", type=Path, help="a finished cache of `dadpo teacher`")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="output directory (default CACHE/reference); give one for each student if you train several",
    )
    add_capture_arguments(parser)


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

"""Checks a cache, summarises what it holds, or writes a copy with a smaller k or for a smaller vocabulary."""

import argparse
from pathlib import Path

from .model_args import print_summary


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify|info|convert")
    verify = actions.add_parser(
        "verify", help="check all files and values; the exit status is 1 if there is a problem"
    )
    info = actions.add_parser(
        "info", help="print settings, sizes, and how much of the teacher's probability each k covers"
    )
    info.add_argument("--png", metavar="FILE", type=Path, help="draw the top-k mass and the rank of the label")
    convert = actions.add_parser(
        "convert", help="write a copy; the mass of entries that are left out is added to the tail"
    )
    for action in (verify, info, convert):
        action.add_argument("cache", metavar="CACHE", type=Path)
    convert.add_argument("--out", required=True, metavar="DIR", type=Path)
    convert.add_argument("--k", type=int, help="entries per position, fewer than the cache has")
    convert.add_argument(
        "--student-vocab-size",
        type=int,
        metavar="N",
        help="vocabulary size of the student's LM head: larger ids go to the tail",
    )
    convert.add_argument("--shard-tokens", type=int, metavar="N", help="answer tokens per file")


def run(args: argparse.Namespace) -> int:
    return {"verify": _verify, "info": _info, "convert": _convert}[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    from ..cache.verify import problems

    count = 0
    for problem in problems(args.cache):
        count += 1
        print(problem)
    print(f"{args.cache}: {count} problem(s)" if count else f"{args.cache}: no problem found")
    return 1 if count else 0


def _info(args: argparse.Namespace) -> int:
    from ..cache.dataset import PairDataset
    from ..cache.summary import format_summary, plot_summary, summarize

    dataset = PairDataset(args.cache, verify=False)
    print_summary(args.cache, dataset.manifest)
    for name, value in {**dataset.manifest.info, **dataset.manifest.settings}.items():
        print(f"  {name:<20} {value}")
    print(f"  {'reference':<20} {'yes' if dataset.has_reference else 'none'}")
    summary = summarize(dataset, progress=True)
    print(f"  {'repeated pairs':<20} {summary.repeated_pairs}")
    print(format_summary(summary))
    if args.png is not None:
        plot_summary(summary, args.png)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from ..cache.convert import convert_cache

    manifest = convert_cache(
        args.cache,
        args.out,
        k=args.k,
        student_vocab_size=args.student_vocab_size,
        shard_tokens=args.shard_tokens,
        progress=True,
    )
    print_summary(args.out, manifest)
    return 0

"""Checks a cache, tells what it holds, or writes it anew with a smaller k or for a smaller vocabulary."""

import argparse
from pathlib import Path

from .model_args import print_summary


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify|info|convert")
    verify = actions.add_parser("verify", help="check every file and every value; exit status 1 if something is wrong")
    info = actions.add_parser("info", help="settings, sizes, and for each k how much of the teacher it holds")
    info.add_argument("--png", metavar="FILE", type=Path, help="draw top-k mass and rank of the realised token")
    convert = actions.add_parser("convert", help="write it anew; what is left out is added to the tail")
    for action in (verify, info, convert):
        action.add_argument("cache", metavar="CACHE", type=Path)
    convert.add_argument("--out", required=True, metavar="DIR", type=Path)
    convert.add_argument("--k", type=int, help="entries a position, fewer than there are")
    convert.add_argument(
        "--student-vocab-size", type=int, metavar="N", help="rows of the student's head: larger ids go to the tail"
    )
    convert.add_argument("--shard-tokens", type=int, metavar="N", help="answer tokens a file")


def run(args: argparse.Namespace) -> int:
    return {"verify": _verify, "info": _info, "convert": _convert}[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    from ..cache.verify import problems

    found = 0
    for problem in problems(args.cache):
        found += 1
        print(problem)
    print(f"{args.cache}: {found} problem(s)" if found else f"{args.cache}: no problem found")
    return 1 if found else 0


def _info(args: argparse.Namespace) -> int:
    from ..cache.dataset import PairDataset
    from ..cache.summary import plot, statistics, table

    dataset = PairDataset(args.cache, verify=False)
    print_summary(args.cache, dataset.manifest)
    for name, value in {**dataset.manifest.info, **dataset.manifest.settings}.items():
        print(f"  {name:<20} {value}")
    print(f"  {'reference':<20} {'yes' if dataset.has_reference else 'none'}")
    found = statistics(dataset, progress=True)
    print(f"  {'repeated pairs':<20} {found.same_pairs}")
    print(table(found))
    if args.png is not None:
        plot(found, args.png)
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

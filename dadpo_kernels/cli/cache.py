"""Checks a cache, summarises it, writes a converted copy, or makes one of another framework's teacher data."""

import argparse
from pathlib import Path

from .model_args import add_loading_arguments, add_shard_argument, is_first_process, load, print_summary
from .values import at_least


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify|info|convert|import")
    verify = actions.add_parser(
        "verify", help="check all files and values; the exit status is 1 if there is a problem"
    )
    verify.add_argument("--model", metavar="NAME|DIR", help="compare a sample with this model, the cache's teacher")
    add_loading_arguments(verify)
    verify.add_argument(
        "--sample", type=at_least(1), default=16, metavar="N", help="pairs to compare (default %(default)s)"
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="NATS",
        help="root mean square that the labels' log-probabilities may differ by (default 0.02: more than float32 "
        "engines differ, and less than logits rounded to bfloat16 do)",
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
    convert.add_argument("--k", type=at_least(0), help="entries per position, fewer than the cache has")
    convert.add_argument(
        "--student-vocab-size",
        type=at_least(1),
        metavar="N",
        help="vocabulary size of the student's LM head: larger ids go to the tail",
    )
    convert.add_argument("--shard-tokens", type=at_least(1), metavar="N", help="answer tokens per file")
    _configure_import(actions.add_parser("import", help="make a cache of what another framework's teacher has scored"))


def _configure_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="JSONL, Parquet, a directory of Parquet files, or a set for `datasets`"
    )
    parser.add_argument("--format", required=True, choices=("axolotl", "distillkit", "trl", "verl"))
    parser.add_argument(
        "--model", required=True, metavar="NAME|DIR", help="the teacher, for its tokenizer and vocabulary size"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path)
    parser.add_argument("--k", type=at_least(0), help="entries per position (default: as many as all positions have)")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="read the first N records only")
    parser.add_argument(
        "--on-error", default="stop", choices=("stop", "skip"), help="what to do with a record that cannot be used"
    )
    parser.add_argument(
        "--label-bound",
        action="store_true",
        help="store an upper bound where the log-probability of a realised token is not in the data",
    )
    parser.add_argument(
        "--compression-config",
        metavar="FILE",
        type=Path,
        help="of distillkit (default: compression_config.yaml beside the data)",
    )
    add_shard_argument(parser)


def run(args: argparse.Namespace) -> int:
    return {"verify": _verify, "info": _info, "convert": _convert, "import": _import}[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    from ..cache.verify import problems

    count = 0
    for problem in problems(args.cache):
        count += 1
        print(problem)
    print(f"{args.cache}: {count} problem(s)" if count else f"{args.cache}: no problem found")
    if count or args.model is None:
        return 1 if count else 0
    return _compare(args)


def _compare(args: argparse.Namespace) -> int:
    from ..capture.compare import TOLERANCE, compare_with_teacher
    from ..capture.load import load_tokenizer

    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    if not tolerance >= 0:
        raise ValueError(f"--tolerance must be 0 or more, got {tolerance}")
    tokenizer = load_tokenizer(args.model, revision=args.revision, gguf_file=args.gguf_file)
    apart = compare_with_teacher(load(args), tokenizer, args.cache, sample=args.sample)
    print(
        f"labels of {apart.pairs} pairs, {apart.tokens} tokens, from the teacher's, in nats: {apart.mean:.2g} on "
        f"average, {apart.rms:.2g} root mean square, at most {apart.most:.2g} (pair {apart.worst}); mass outside the "
        f"top k at most {apart.tail:.2g} apart; {apart.same_ids:.2%} of the top-k ids are the same"
    )
    if apart.rms > tolerance:
        print(
            f"root mean square above {tolerance:g}: another teacher, another dtype, or a server that rounds its logits"
        )
        return 1
    return 0


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


def _import(args: argparse.Namespace) -> int:
    from ..capture.load import load_tokenizer, vocabulary_size
    from ..capture.teacher_data.importing import import_teacher_data

    result = import_teacher_data(
        args.source,
        args.out,
        data_format=args.format,
        tokenizer=load_tokenizer(args.model, revision=args.revision),
        vocab_size=vocabulary_size(args.model, revision=args.revision),
        model=args.model,
        compression_config=args.compression_config,
        k=args.k,
        limit=args.limit,
        on_error=args.on_error,
        label_bound=args.label_bound,
        shard_tokens=args.shard_tokens,
        progress=is_first_process(),
    )
    if is_first_process():
        print(f"{result.records} records read, {len(result.skipped)} skipped; k={result.manifest.settings['k']}")
        for reason in result.skipped[:10]:
            print(f"  skipped: {reason}")
        print("Not in these data:")
        for line in result.lost:
            print(f"  - {line}")
        if result.bounded:
            print(f"  - the log-probability of {result.bounded} of {result.tokens} realised tokens: a bound is stored")
    print_summary(args.out, result.manifest)
    return 0

"""Makes preference pairs: samples one answer from the teacher (chosen) and one from the student (rejected) for each
prompt, or takes them from an existing preference set. Interrupted, the same command goes on where it stopped."""

import argparse
import gc
from pathlib import Path
from typing import Any

SOURCE = "JSONL or Parquet file, or a set for `datasets` as NAME:SPLIT"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="generate|import")
    generate = actions.add_parser("generate", help="sample an answer from teacher and student for each prompt")
    generate.add_argument("--prompts", required=True, metavar="SOURCE", help=f"{SOURCE}, with a column `prompt`")
    for name in ("teacher", "student"):
        generate.add_argument(f"--{name}", required=True, metavar="NAME|DIR")
        generate.add_argument(f"--{name}-revision", metavar="REVISION", help="branch, tag or commit on the hub")
    generate.add_argument("--temperature", type=float, default=1.0, help="0: greedy (%(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="(%(default)s)")
    generate.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (%(default)s)")
    generate.add_argument("--batch-size", type=int, default=16, metavar="N", help="answers at a time (%(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    generate.add_argument("--keep-unfinished", action="store_true", help="keep pairs with a cut answer")
    generate.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    generate.add_argument("--device", default="auto", help="as `dadpo teacher --device`")
    imported = actions.add_parser("import", help="write an existing preference set in the form `dadpo teacher` takes")
    imported.add_argument(
        "--data", required=True, metavar="SOURCE", help=f"{SOURCE}: TRL's columns, or those of UltraFeedback-binarized"
    )
    for action in (generate, imported):
        action.add_argument("--limit", type=int, metavar="N", help="take the first N only")
        action.add_argument(
            "--out", required=True, metavar="FILE", type=Path, help="JSONL, for `dadpo teacher --data`"
        )


def run(args: argparse.Namespace) -> int:
    return {"generate": _generate, "import": _import}[args.action](args)


def _import(args: argparse.Namespace) -> int:
    from ..capture.generate import write_records
    from ..capture.pairs import read_pairs

    found = read_pairs(args.data, args.limit)
    write_records(args.out, found)
    print(f"{args.out}: {len(found)} pairs")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..capture.generate import Sampling, generate_answers, make_pairs, write_records
    from ..capture.load import load_model, load_tokenizer
    from ..capture.pairs import read_prompts

    prompts = read_prompts(args.prompts, args.limit)
    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.batch_size, args.seed)
    answers: dict[str, list[dict[str, Any]]] = {}
    for who, name, revision in (
        ("teacher", args.teacher, args.teacher_revision),
        ("student", args.student, args.student_revision),
    ):
        tokenizer = load_tokenizer(name, revision=revision)
        model = load_model(name, revision=revision, dtype=args.dtype, device=args.device)
        path = args.out.with_name(f"{args.out.name}.{who}")
        answers[who] = generate_answers(model, tokenizer, prompts, path, sampling, progress=True)
        del model  # one after the other: they need not fit beside each other
        gc.collect()
    whole = [
        args.keep_unfinished or (good["finished"] and bad["finished"])
        for good, bad in zip(answers["teacher"], answers["student"], strict=True)
    ]
    found = make_pairs(prompts, *([line["answer"] for line in answers[who]] for who in ("teacher", "student")))
    kept = [pair for pair, keep in zip(found, whole, strict=True) if keep]
    write_records(args.out, kept)
    cut = len(found) - len(kept)
    print(f"{args.out}: {len(kept)} pairs, {cut} left out because {args.max_new_tokens} tokens cut an answer")
    return 0

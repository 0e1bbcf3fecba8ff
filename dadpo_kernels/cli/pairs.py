"""Makes preference pairs: samples for each prompt one answer from the teacher (chosen) and one from the student
(rejected), or reads them from an existing preference set. After an interruption, the same command continues where it
stopped."""

import argparse
import gc
from pathlib import Path
from typing import Any

from .data_args import SOURCE, add_data_arguments, at_least, print_changes, read


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="generate|import")
    generate = actions.add_parser(
        "generate", help="sample for each prompt an answer from the teacher and one from the student"
    )
    generate.add_argument(
        "--prompts",
        required=True,
        metavar="SOURCE",
        help=f"{SOURCE}, with a column `prompt`; or a .txt file with a prompt a line",
    )
    for name in ("teacher", "student"):
        generate.add_argument(f"--{name}", required=True, metavar="NAME|DIR")
        generate.add_argument(f"--{name}-revision", metavar="REVISION", help="branch, tag or commit on the hub")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="(default %(default)s)")
    generate.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default %(default)s)"
    )
    generate.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="answers per batch (default %(default)s)"
    )
    generate.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    generate.add_argument(
        "--keep-unfinished", action="store_true", help="keep pairs with an answer that the limit cut"
    )
    generate.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    generate.add_argument("--device", default="auto", help="as in `dadpo teacher`")
    imported = actions.add_parser("import", help="convert an existing preference set to JSONL")
    add_data_arguments(imported)
    generate.add_argument("--limit", type=at_least(1), metavar="N", help="use the first N prompts only")
    for action in (generate, imported):
        action.add_argument(
            "--out", required=True, metavar="FILE", type=Path, help="JSONL file, for `dadpo teacher --data`"
        )


def run(args: argparse.Namespace) -> int:
    return {"generate": _generate, "import": _import}[args.action](args)


def _import(args: argparse.Namespace) -> int:
    from ..capture.generate import write_records

    pairs = read(args)
    write_records(args.out, pairs)
    print(f"{args.out}: {len(pairs)} pairs")
    print_changes(pairs.notes, pairs.refused)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..capture.generate import Sampling, generate_answers, make_pairs, write_records
    from ..capture.load import load_model, load_tokenizer
    from ..capture.pairs import read_prompts

    # One answer to each prompt from each of the models. They are loaded one after the other to save memory.
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
        del model
        gc.collect()

    # The pairs of finished answers.
    usable = [
        args.keep_unfinished or (chosen["finished"] and rejected["finished"])
        for chosen, rejected in zip(answers["teacher"], answers["student"], strict=True)
    ]
    chosen_texts, rejected_texts = ([line["answer"] for line in answers[who]] for who in ("teacher", "student"))
    all_pairs = make_pairs(prompts, chosen_texts, rejected_texts)
    pairs = [pair for pair, is_usable in zip(all_pairs, usable, strict=True) if is_usable]
    write_records(args.out, pairs)
    cut = len(all_pairs) - len(pairs)
    print(f"{args.out}: {len(pairs)} pairs, {cut} left out because {args.max_new_tokens} tokens cut an answer")
    return 0

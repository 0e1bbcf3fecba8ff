"""Makes preference pairs: samples for each prompt one answer from the teacher (chosen) and one from the student
(rejected), or reads them from an existing preference set. After an interruption, the same command continues where it
stopped."""

import argparse
import gc
import logging
from pathlib import Path
from typing import Any

from .model_args import add_template_argument, template_kwargs

logger = logging.getLogger("dadpo_kernels")

SOURCE = "JSONL or Parquet file, or a set for `datasets` as NAME:SPLIT"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="generate|import")
    generate = actions.add_parser(
        "generate", help="sample for each prompt an answer from the teacher and one from the student"
    )
    generate.add_argument("--prompts", required=True, metavar="SOURCE", help=f"{SOURCE}, with a column `prompt`")
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
    add_template_argument(generate)
    generate.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    generate.add_argument("--device", default="auto", help="as in `dadpo teacher`")
    imported = actions.add_parser("import", help="convert an existing preference set to JSONL")
    imported.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help=f"{SOURCE}, with TRL's columns or those of UltraFeedback-binarized",
    )
    for action in (generate, imported):
        action.add_argument("--limit", type=int, metavar="N", help="use the first N only")
        action.add_argument(
            "--out", required=True, metavar="FILE", type=Path, help="JSONL file, for `dadpo teacher --data`"
        )


def run(args: argparse.Namespace) -> int:
    return {"generate": _generate, "import": _import}[args.action](args)


def _import(args: argparse.Namespace) -> int:
    from ..capture.generate import write_records
    from ..capture.pairs import read_pairs

    pairs = read_pairs(args.data, args.limit)
    write_records(args.out, pairs)
    print(f"{args.out}: {len(pairs)} pairs")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..capture.generate import Sampling, accepted_pairs, generate_answers, make_pairs, write_records
    from ..capture.load import load_model, load_tokenizer
    from ..capture.pairs import read_prompts

    prompts = read_prompts(args.prompts, args.limit)
    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.batch_size, args.seed)
    options = template_kwargs(args.chat_template_kwargs)
    teacher_tokenizer = load_tokenizer(args.teacher, revision=args.teacher_revision)
    chats = [prompt for prompt in prompts if isinstance(prompt, list)][:1]
    _, refused = accepted_pairs(
        make_pairs(chats, ["yes"] * len(chats), ["no"] * len(chats), options), teacher_tokenizer
    )
    if refused:
        logger.warning("pairs may get lost: `dadpo teacher` refuses one with the answers yes and no, %s", refused[0])

    # One answer to each prompt from each of the models. They are loaded one after the other to save memory.
    answers: dict[str, list[dict[str, Any]]] = {}
    for who, name, revision in (
        ("teacher", args.teacher, args.teacher_revision),
        ("student", args.student, args.student_revision),
    ):
        tokenizer = teacher_tokenizer if who == "teacher" else load_tokenizer(name, revision=revision)
        model = load_model(name, revision=revision, dtype=args.dtype, device=args.device)
        path = args.out.with_name(f"{args.out.name}.{who}")
        answers[who] = generate_answers(
            model, tokenizer, prompts, path, sampling, chat_template_kwargs=options, progress=True
        )
        del model
        gc.collect()

    # The pairs of finished answers that the teacher's chat template can render.
    usable = [
        args.keep_unfinished or (chosen["finished"] and rejected["finished"])
        for chosen, rejected in zip(answers["teacher"], answers["student"], strict=True)
    ]
    chosen_texts, rejected_texts = ([line["answer"] for line in answers[who]] for who in ("teacher", "student"))
    all_pairs = make_pairs(prompts, chosen_texts, rejected_texts, options)
    finished = [pair for pair, is_usable in zip(all_pairs, usable, strict=True) if is_usable]
    pairs, refused = accepted_pairs(finished, teacher_tokenizer)
    if finished and not pairs:
        raise ValueError(f"`dadpo teacher` would refuse all pairs. Of the first, it says: {refused[0]}")
    write_records(args.out, pairs)
    lost = f"{len(all_pairs) - len(finished)} left out because {args.max_new_tokens} tokens cut an answer"
    if refused:
        lost += f", {len(refused)} because `dadpo teacher` refuses them; it says first: {next(iter(refused.values()))}"
    print(f"{args.out}: {len(pairs)} pairs, {lost}")
    return 0

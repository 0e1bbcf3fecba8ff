"""The runs, the tuning, and the results file; see the package's docstring."""

import argparse
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset
from transformers import AutoTokenizer

from benchmarks.process import environment
from benchmarks.rows import Rows, save
from benchmarks.rows import measured as made
from benchmarks.studies.recovery.measures import likelihood, preference_rate, sample, texture
from benchmarks.studies.recovery.settings import METHODS, SETTINGS, STUDY, TUNING_SEED, Point
from benchmarks.studies.recovery.stages import Stage, load, prepare, train
from dadpo_kernels.capture.generate import write_records
from dadpo_kernels.capture.pairs import read_pairs
from examples.quickstart.evaluate import measure
from examples.quickstart.prune import DATA


class Run(NamedTuple):
    """A method at a point of its grid. A run with the tuning seed is judged on the validation pairs, others on the
    held-out ones. The names `teacher`, `pruned` and `reference` are models as they are, untrained."""

    method: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.point.learning_rate:g}-{self.point.beta:g}-{self.seed}"


def measured(run: Run, *, stage: Stage, threads: int) -> dict[str, Any]:
    """What `run` gives: read if it was done before."""
    path = stage.runs / f"{run.name}.json"
    if not path.exists():
        torch.set_num_threads(threads)
        write_records(path, [execute(run, stage)])
    return json.loads(path.read_text())


def execute(run: Run, stage: Stage) -> dict[str, Any]:
    setting = stage.setting
    tokenizer = AutoTokenizer.from_pretrained(stage.teacher)
    model = load(getattr(stage, run.method) if run.method in ("teacher", "pruned") else stage.sft)
    begin = time.perf_counter()
    if run.method in METHODS:
        pairs: Any = stage.pairs("train")
        generator = torch.Generator().manual_seed(run.seed)
        chosen = torch.randperm(len(pairs), generator=generator)[: setting.pairs].tolist()
        train(
            model, tokenizer, Subset(pairs, chosen), stage.out / f"logs-{run.name}", run.seed,
            num_train_epochs=setting.epochs, per_device_train_batch_size=setting.batch,
            **METHODS[run.method].options(run.point),
        )  # fmt: skip
    trained = time.perf_counter()
    if run.seed == TUNING_SEED:
        figures = measure(model, stage.pairs("validation"))
    else:
        figures = measure(model, stage.pairs("heldout")) | answers(run, model, tokenizer, stage)
    seconds = {"training_seconds": trained - begin, "measuring_seconds": time.perf_counter() - trained}
    return run._asdict() | {"point": run.point._asdict(), "figures": figures} | seconds


def answers(run: Run, model: Any, tokenizer: Any, stage: Stage) -> dict[str, float]:
    """What the held-out prompts make the model say, and what its teacher thinks of that."""
    records = read_pairs(DATA / "heldout.jsonl", stage.setting.heldout)
    asked = [record["prompt"] for record in records]
    path = stage.runs / f"{run.name}-answers.jsonl"
    said = sample(model, tokenizer, asked, path, stage.setting.max_new_tokens, seed=run.seed)
    heldout: Any = stage.pairs("heldout")
    teacher_logps = torch.tensor([heldout[i]["chosen_label_logps"].mean() for i in range(len(asked))])
    students, lengths = likelihood(load(stage.teacher), tokenizer, asked, said)
    return {
        "preference_rate": preference_rate(students, teacher_logps),
        "teacher_logp": students.mean().item(),
        "answer_tokens": lengths.double().mean().item(),
        **texture(said),
    }


def best(results: Iterable[dict[str, Any]]) -> Point:
    """The point with the smallest KL(teacher ‖ student) + KL(student ‖ teacher) on the validation pairs."""
    chosen = min(results, key=lambda r: r["figures"]["kl"] + r["figures"]["reverse_kl"])
    return Point(**chosen["point"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.recovery", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--setting", choices=SETTINGS, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"), help="directory, kept for resuming")
    args = parser.parse_args()
    stage = Stage.of(args.work, args.setting)
    prepare(stage)

    # One run a core beats one run on all of them: small matrices do not spread well.
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    work = partial(measured, stage=stage, threads=1 if cores > 1 else torch.get_num_threads())
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        tuning = list(pool.map(work, [Run(m, p, TUNING_SEED) for m in METHODS for p in METHODS[m].grid]))
        points = {m: best(r for r in tuning if r["method"] == m) for m in METHODS}
        seeds = range(1, stage.setting.seeds + 1)
        final = [Run(m, points[m], seed) for m in METHODS for seed in seeds]
        fixed = [Run(m, Point(0.0), seeds[0]) for m in ("teacher", "pruned", "reference")]
        runs = list(pool.map(work, fixed + final))

    machine = environment(cores)
    rows = made(STUDY, machine, {"setting": args.setting, **vars(stage.setting)})
    for part, results in (("tuning", tuning), ("final", runs)):
        rows += rows_of(part, results, machine)
    args.out.unlink(missing_ok=True)  # another run may have chosen other points
    save(args.out, rows)


def rows_of(stage: str, results: list[dict[str, Any]], machine: dict) -> Rows:
    """A method at a point of its grid, with a value for each seed."""
    rows = Rows()
    for variant in dict.fromkeys((r["method"], Point(**r["point"])) for r in results):
        method, point = variant
        seeds = [r for r in results if (r["method"], Point(**r["point"])) == variant]
        metrics = {key: [r["figures"][key] for r in seeds] for key in seeds[0]["figures"]}
        metrics |= {f"{part}, s": [r[f"{part}_seconds"] for r in seeds] for part in ("training", "measuring")}
        rows += made(STUDY, machine, metrics, stage=stage, method=method, **point._asdict())
    return rows

"""Time and memory of a whole training step, TRL's DPOTrainer against ours, on SmolLM2-135M in float32.

    python -m benchmarks.studies.trl_step --out benchmarks/results/trl_step.json --repeats 3

TRL 1.16 with the fused head it brings; the same pairs (the quickstart's longest), seed and options. Every measurement
is a process of its own; the variants take turns. The first step warms up; then the process's high-water mark is reset
before each step, so that `peak` is what a step needs above the model, its reference and the optimizer's state:
activations, gradients and the head's workspace. Values are [per step] per process. `cpu_time` is of all threads
together: it tells a slow step from a machine that was busy with something else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import reset_high_water_mark, resident_mib
from benchmarks.process import environment
from benchmarks.rows import Cell, Rows, caption, flat, measured, middle, of, save, table

STUDY, ROOT = "trl_step", Path(__file__).parents[2]
PAIRS = ROOT / "examples" / "quickstart" / "data" / "train.jsonl"
# The name, the trainer, and its options. LoRA leaves the head frozen.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL": ("trl", {}),
    "ours": ("ours", {}),
    "ours, `token_metrics=False`": ("ours", {"token_metrics": False}),
    "TRL, LoRA": ("trl", {"lora": True}),
    "ours, LoRA": ("ours", {"lora": True}),
}
MEASURED = ("time, s", "cpu_time, s", "peak, MiB", "loss")
BATCH = ("pairs", "tokens", "valid_tokens")  # what it holds


def measure(variant: str, steps: int, pairs: int, model_dir: Path) -> dict[str, Any]:
    """One repeat, in this process: `MEASURED` per step, and what the batch holds."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from dadpo_kernels import TRLDaDPOConfig, TRLDaDPOTrainer

    trainer, options = VARIANTS[variant]
    options = dict(options)
    peft = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if options.pop("lora", False) else None
    config, make = (TRLDaDPOConfig, TRLDaDPOTrainer) if trainer == "ours" else (DPOConfig, DPOTrainer)
    records = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda r: -len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"]))
    row: dict[str, Any] = {"pairs": pairs, **{name: [] for name in MEASURED}}

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = reset_high_water_mark()
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > 1:
                row["time, s"].append(time.perf_counter() - self.start[0])
                row["cpu_time, s"].append(time.process_time() - self.start[1])
                row["peak, MiB"].append(resident_mib("VmHWM") - self.before)

    with tempfile.TemporaryDirectory() as out:
        run = make(
            AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            args=config(
                out, max_steps=1 + steps, per_device_train_batch_size=pairs, report_to="none", save_strategy="no",
                use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False, **options,
            ),
            train_dataset=Dataset.from_list(records[:pairs]),  # one batch, seen in every step
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            callbacks=[Steps()],
            peft_config=peft,
        )  # fmt: skip
        batch = next(iter(run.get_train_dataloader()))
        row |= {"tokens": batch["input_ids"].numel(), "valid_tokens": int(batch["completion_mask"].sum())}
        run.train()
    row["loss"] = [entry["loss"] for entry in run.state.log_history if "loss" in entry][1:]
    return row


def trl_step(rows: Rows) -> str:
    """Medians over processes and steps, their ranges, and what they were measured on."""
    rows = rows.where(STUDY)

    def ranged(metric: str, form: str, unit: str) -> Cell:
        def cell(line: Rows) -> str:
            values = line.get(metric)
            least, most = min(flat(values)), max(flat(values))
            return f"{middle(values):{form}} {unit} ({least:{form}} to {most:{form}})"

        return cell

    columns = [
        ("", of("trainer")),
        ("time of a step", ranged("time", ".1f", "s")),
        ("processor time", ranged("cpu_time", ".1f", "s")),
        ("memory of a step", ranged("peak", ",.0f", "MiB")),
    ]
    pairs, tokens, valid = (rows.get(metric, trainer=None) for metric in BATCH)
    losses = next(row.value for row in rows if row.metric == "loss")
    return (
        f"{table(rows, ['trainer'], columns)}\n\nSmolLM2-135M, float32, {pairs} pairs: {tokens:,} tokens with "
        f"padding, {valid:,} of them answer tokens; gradient checkpointing as TRL has it by default. Memory is the "
        "growth of the resident set over model, reference and optimizer. Medians and ranges of "
        f"{len(losses)} processes with {len(losses[0])} steps each, in turn.\n\n"
        + caption(rows, "studies.trl_step --out benchmarks/results/trl_step.json")
    )


TABLES = {"trl-step": trl_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write; without it, one repeat goes to stdout")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.out is None:
        from examples.smollm2 import smollm2_dir

        print(json.dumps(measure(args.variants[0], args.steps, args.pairs, smollm2_dir())))
        return
    env = os.environ | {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    repeats: dict[str, list[dict]] = {variant: [] for variant in args.variants}
    for variant in args.variants * args.repeats:
        command = [sys.executable, "-m", "benchmarks.studies.trl_step", "--variants", variant]
        command += ["--steps", str(args.steps), "--pairs", str(args.pairs)]
        done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
        repeats[variant].append(json.loads(done.stdout.splitlines()[-1]))
    machine, first = environment(args.threads), repeats[args.variants[0]][0]
    rows = measured(STUDY, machine, {metric: first[metric] for metric in BATCH})
    for variant, results in repeats.items():
        metrics = {metric: [result[metric] for result in results] for metric in MEASURED}
        rows += measured(STUDY, machine, metrics, trainer=variant)
    save(args.out, rows)


if __name__ == "__main__":
    main()

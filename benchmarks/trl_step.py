"""Time and memory of a whole training step, TRL's DPOTrainer against ours, on SmolLM2-135M in float32.

    python -m benchmarks.trl_step --out benchmarks/results/trl_step.json --repeats 3
    python -m benchmarks.trl_step --out benchmarks/results/trl_step.json --report docs/trainers.md

TRL 1.16 with the fused head it brings; the same pairs (the quickstart's longest), seed and options. Every measurement
is a process of its own; the variants take turns. The first step warms up; then the process's high-water mark is reset
before each step, so that `peak_mib` is what a step needs above the model, its reference and the optimizer's state:
activations, gradients and the head's workspace.

    {environment, pairs, tokens, valid_tokens, rows: [{variant, seconds, cpu_seconds, peak_mib, loss}]}

the last four [per step] per repeat. A second run on the same machine and commit adds its repeats. `cpu_seconds` are of
all threads together: they tell a slow step from a machine that was busy with something else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.measure import reset_high_water_mark, resident_mib
from benchmarks.process import environment
from benchmarks.report.comparison import replace_between_markers

ROOT = Path(__file__).parent.parent
PAIRS = ROOT / "examples" / "quickstart" / "data" / "train.jsonl"
BEGIN, END = "<!-- benchmark:trl_step -->", "<!-- /benchmark:trl_step -->"
# The name, the trainer, and its options. LoRA leaves the head frozen.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL": ("trl", {}),
    "ours": ("ours", {}),
    "ours, `token_metrics=False`": ("ours", {"token_metrics": False}),
    "TRL, LoRA": ("trl", {"lora": True}),
    "ours, LoRA": ("ours", {"lora": True}),
}
MEASURED = ("seconds", "cpu_seconds", "peak_mib", "loss")


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
                row["seconds"].append(time.perf_counter() - self.start[0])
                row["cpu_seconds"].append(time.process_time() - self.start[1])
                row["peak_mib"].append(resident_mib("VmHWM") - self.before)

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


def add(result: dict[str, Any], variant: str, repeat: dict[str, Any]) -> None:
    """Puts a repeat into the result, whose batch it must have seen."""
    batch = {name: value for name, value in repeat.items() if name not in MEASURED}
    if batch != {name: result.setdefault(name, value) for name, value in batch.items()}:
        raise ValueError(f"the file is about other pairs than {batch}: choose another --out")
    row = next((row for row in result["rows"] if row["variant"] == variant), None)
    if row is None:
        row = {"variant": variant, **{name: [] for name in MEASURED}}
        result["rows"].append(row)
    for name in MEASURED:
        row[name].append(repeat[name])


def table(result: dict[str, Any]) -> str:
    """Markdown: medians over repeats and steps, their ranges, and what they were measured on."""
    lines = ["| | time of a step | processor time | memory of a step |", "|---|---:|---:|---:|"]
    for row in result["rows"]:
        cells = []
        for name, digits, unit in (("seconds", ".1f", "s"), ("cpu_seconds", ".1f", "s"), ("peak_mib", ",.0f", "MiB")):
            values = sorted(chain(*row[name]))
            shown = (format(v, digits) for v in (statistics.median(values), values[0], values[-1]))
            cells.append("{} {unit} ({} to {})".format(*shown, unit=unit))
        lines.append(" | ".join(["| " + row["variant"], *cells]) + " |")
    machine, repeats = result["environment"], sorted({len(row["loss"]) for row in result["rows"]})
    return "\n".join(lines) + (
        f"\n\nSmolLM2-135M, float32, {result['pairs']} pairs: {result['tokens']:,} tokens with padding, "
        f"{result['valid_tokens']:,} of them answer tokens; gradient checkpointing as TRL has it by default. Memory "
        "is the growth of the resident set over model, reference and optimizer. Medians and ranges of "
        f"{' or '.join(map(str, repeats))} processes with {len(result['rows'][0]['loss'][0])} steps each, in turn. "
        f"{machine['cpu']}, {machine['threads']} threads; torch {machine['versions']['torch']}, TRL "
        f"{machine['versions']['trl']}; {machine['date']}, commit {machine['commit']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to add to; without it, one repeat goes to stdout")
    parser.add_argument("--report", type=Path, help=f"only write the table of --out into this file, between {BEGIN}")
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
    if args.report is not None:
        text = replace_between_markers(args.report.read_text(), table(json.loads(args.out.read_text())), BEGIN, END)
        args.report.write_text(text)
        return
    now = environment(args.threads)
    result = json.loads(args.out.read_text()) if args.out.exists() else {"environment": now, "rows": []}
    if result["environment"] != now:
        raise ValueError(f"{args.out} was measured in another environment, {result['environment']}: start a new file")
    env = os.environ | {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    for variant in args.variants * args.repeats:
        command = [sys.executable, "-m", "benchmarks.trl_step", "--variants", variant, "--steps", str(args.steps)]
        command += ["--pairs", str(args.pairs)]
        done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
        add(result, variant, json.loads(done.stdout.splitlines()[-1]))
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Time and memory of a whole training step, TRL's DPOTrainer against ours: `python -m benchmarks.trl_step --out FILE`.

SmolLM2-135M in float32 on the quickstart's longest pairs, TRL 1.16 with the fused head it brings, the same data, seed
and options. Every measurement is a process of its own; the variants take turns. The first step warms up; then the
process's high-water mark is reset before each step, so that `peak_mib` is what a step needs above the model, its
reference and the optimizer's state: activations, gradients and the head's workspace.

    {"environment": {...}, "rows": [{variant, pairs, tokens, valid_tokens, seconds, cpu_seconds, peak_mib, loss}, ...]}

one row per measurement, the last four lists with an entry per step; rows of an existing file stay. `cpu_seconds` are
of both threads together: they tell a slow step from a machine that was busy with something else.
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

from .measure import reset_high_water_mark, resident_mib

ROOT = Path(__file__).parent.parent
PAIRS = ROOT / "examples" / "quickstart" / "data" / "train.jsonl"
# The name, the trainer, and its options. LoRA leaves the head frozen.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl": ("trl", {}),
    "ours": ("ours", {}),
    "ours, no token metrics": ("ours", {"token_metrics": False}),
    "trl, lora": ("trl", {"lora": True}),
    "ours, lora": ("ours", {"lora": True}),
}


def measure(variant: str, steps: int, pairs: int, model_dir: Path) -> dict[str, Any]:
    """One row of the result, measured in this process."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from dadpo_kernels.integrations.trl import DaDPOConfig, DaDPOTrainer

    trainer, options = VARIANTS[variant]
    options = dict(options)
    peft = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if options.pop("lora", False) else None
    config, make = (DaDPOConfig, DaDPOTrainer) if trainer == "ours" else (DPOConfig, DPOTrainer)
    records = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda r: -len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"]))
    row: dict[str, Any] = {"variant": variant, "pairs": pairs, "seconds": [], "cpu_seconds": [], "peak_mib": []}

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to add rows to; without it, one row goes to stdout")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a measurement")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.out is None:
        from examples.smollm2 import smollm2_dir

        print(json.dumps(measure(args.variants[0], args.steps, args.pairs, smollm2_dir())))
        return
    from .process import environment

    result = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    result["environment"] = environment(args.threads)
    env = os.environ | {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    for variant in args.variants * args.repeats:
        command = [sys.executable, "-m", "benchmarks.trl_step", "--variants", variant, "--steps", str(args.steps)]
        command += ["--pairs", str(args.pairs)]
        done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
        result["rows"].append(json.loads(done.stdout.splitlines()[-1]))
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

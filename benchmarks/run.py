"""Run the comparison: `python -m benchmarks.run --device cpu --out benchmarks/results/cpu.json`.

Every variant runs in a process of its own with the same number of threads; in each repeat all of them take their turn
(A, B, C, A, B, C, ...), and between its calls a process times the floor (floor, call, floor, call, floor), so a
machine that slows down for a while slows both. The ratio of a variant is the median, over all its calls, of the call's
time to the mean of the floor's before and after it.

`--scaling` measures this package alone instead: peak memory against the number of tokens, and time against
`memory_budget`. Both kinds of result go to the same file, one section per case and dtype; a section measured again is
replaced, the others stay.

The file (times in seconds, memory in MiB above the inputs, of which the returned gradients are `gradient_mib`):

    {"comparison": {"smollm2/float32": SECTION, ...}, "scaling": {"smollm2/float32": SECTION, ...}}

    SECTION of comparison and scaling both have
      environment   cpu, threads, memory_gib, python, platform, versions {package: version}, commit, date
      case, dtype, hidden_size, vocab_size, tokens, valid_tokens, gradient_mib
      peakedness    label_probability, topk_mass: means over the valid tokens
    comparison adds
      floor         {logits|dhidden|dweight: {seconds, arrangement}}: the fastest arrangements, which all time
      floor_seconds median over all processes of the sum of the three
      rows          [{variant, label, objective, ours, frozen, ratio, seconds [[per call] per repeat], floor_seconds
                    [[before, between and after them] per repeat], peak_mib [per repeat], loss, loss_error,
                    hidden_grad_error, weight_grad_error (against float64, relative but for the loss; null where there
                    is no such gradient), gflops}], gflops counting only the products that the task needs on valid
                    tokens (three, or two for a frozen head)
    scaling adds
      memory        [{tokens, variant, peak_mib, gradient_mib, logits_mib}], logits_mib being one float32 [valid, V]
      budget        [{memory_budget, seconds [per call], peak_mib}], and full_budget, the bytes that retain all
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .cases import CASES, DTYPES, Inputs, make_inputs, peakedness, save_inputs
from .oracle import save_gradients
from .variants import VARIANTS, find_variant

ROOT = Path(__file__).parent.parent
TOKENS = 2_048
SCALING_TOKENS = (1_024, 4_096, 16_384)
SCALING_VARIANTS = ("recompute", "default")
BUDGET_EIGHTHS = (0, 1, 2, 4, 6, 8)
SCALING_OBJECTIVE = "dpo+kl"
PACKAGES = ("torch", "liger-kernel", "trl", "cut-cross-entropy", "transformers")


def child(inputs: Path, variant: str, threads: int, calls: int, *options: str) -> dict:
    """Measure one variant in a fresh process and return what it reports."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.measure",
        str(inputs),
        "--variant",
        variant,
        "--calls",
        str(calls),
        *options,
    ]
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | limits, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {variant} {' '.join(options)} ended with exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(inputs: Inputs, only: list[str], repeats: int, calls: int, threads: int, directory: Path) -> dict:
    """Floor and variants in turn, `repeats` times (see the module's docstring for what is returned)."""
    stored = directory / "inputs.safetensors"
    save_inputs(inputs, stored)
    jobs = [(name, objective) for name in only for objective in VARIANTS[name].objectives]
    exact = {objective: directory / f"{objective}.safetensors" for _, objective in jobs}
    for objective, path in exact.items():
        log(f"float64 gradient of {objective}")
        save_gradients(inputs, objective, path)

    floor = child(stored, "floor", threads, calls)
    arrangements = json.dumps({product: best["arrangement"] for product, best in floor.items()})
    log(f"floor {sum(best['seconds'] for best in floor.values()):.3f} s")
    measured: dict[tuple[str, str], list[dict]] = {job: [] for job in jobs}
    for repeat in range(repeats):
        log(f"repeat {repeat + 1} of {repeats}")
        for (name, objective), results in measured.items():
            options = ["--objective", objective, "--floor", arrangements]
            options += ["--exact", str(exact[objective])] if repeat == 0 else []
            results.append(child(stored, name, threads, calls, *options))
            seconds, ratio = statistics.median(results[-1]["seconds"]), statistics.median(ratios(results[-1]))
            log(f"  {name:14} {objective:7} {seconds:7.3f} s {ratio:6.2f} {results[-1]['peak_mib']:7.0f} MiB")

    floors = [seconds for results in measured.values() for result in results for seconds in result["floor_seconds"]]
    return {
        "floor": floor,
        "floor_seconds": statistics.median(floors),
        "rows": [row(name, objective, inputs, results) for (name, objective), results in measured.items()],
    }


def ratios(result: dict) -> list[float]:
    """Of each call: its time over the mean of the floor's before and after it."""
    floors = result["floor_seconds"]
    return [t / statistics.mean(floors[i : i + 2]) for i, t in enumerate(result["seconds"])]


def row(name: str, objective: str, inputs: Inputs, results: list[dict]) -> dict:
    variant = find_variant(name)
    calls = [seconds for result in results for seconds in result["seconds"]]
    flops = (2 if variant.frozen else 3) * 2 * int(inputs.valid.sum()) * inputs.weight.numel()
    errors = ("loss", "loss_error", "hidden_grad_error", "weight_grad_error")
    return {
        "variant": name,
        "label": variant.label,
        "objective": objective,
        "ours": variant.ours,
        "frozen": variant.frozen,
        "ratio": statistics.median(ratio for result in results for ratio in ratios(result)),
        "gflops": flops / statistics.median(calls) / 1e9,
        "seconds": [result["seconds"] for result in results],
        "floor_seconds": [result["floor_seconds"] for result in results],
        "peak_mib": [result["peak_mib"] for result in results],
        **{key: results[0][key] for key in errors},
    }


def scale(case: str, inputs: Inputs, calls: int, threads: int, directory: Path) -> dict:
    """Peak memory over `SCALING_TOKENS`, then time over `memory_budget` on `inputs`."""
    stored = directory / "inputs.safetensors"
    objective = ("--objective", SCALING_OBJECTIVE)
    memory = []
    for tokens in SCALING_TOKENS:
        longer = make_inputs(case, inputs.hidden.dtype, tokens)
        save_inputs(longer, stored)
        for name in SCALING_VARIANTS:
            peak = child(stored, name, threads, 0, *objective)["peak_mib"]
            log(f"  {tokens:6} tokens, {name:10} {peak:7.0f} MiB")
            logits_mib = int(longer.valid.sum()) * longer.weight.shape[0] * 4 / 2**20
            sizes = {"gradient_mib": gradient_mib(longer), "logits_mib": logits_mib}
            memory.append({"tokens": tokens, "variant": name, "peak_mib": peak, **sizes})

    save_inputs(inputs, stored)
    full = int(inputs.valid.sum()) * inputs.weight.shape[0] * inputs.weight.element_size()
    budget = []
    for eighths in BUDGET_EIGHTHS:
        result = child(stored, f"budget={full * eighths // 8}", threads, calls, *objective)
        log(f"  budget {full * eighths // 8 / 2**20:7.0f} MiB {statistics.median(result['seconds']):7.3f} s")
        budget.append({"memory_budget": full * eighths // 8, **{key: result[key] for key in ("seconds", "peak_mib")}})
    return {"memory": memory, "budget": budget, "full_budget": full}


def gradient_mib(inputs: Inputs) -> float:
    """What `hidden.grad` and `weight.grad` take, whoever computes them."""
    return (inputs.hidden.numel() + inputs.weight.numel()) * inputs.weight.element_size() / 2**20


def describe(case: str, dtype: str, inputs: Inputs, threads: int) -> dict:
    return {
        "environment": environment(threads),
        "case": case,
        "dtype": dtype,
        "hidden_size": inputs.weight.shape[1],
        "vocab_size": inputs.weight.shape[0],
        "tokens": inputs.labels.numel(),
        "valid_tokens": int(inputs.valid.sum()),
        "gradient_mib": gradient_mib(inputs),
        "peakedness": peakedness(inputs),
    }


def environment(threads: int) -> dict:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine()
    )
    describe_commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(describe_commit, capture_output=True, text=True)
    return {
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": "unknown (not a git checkout)" if git.returncode else git.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="what to measure on")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT", help="default: all"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all variants (default 3)")
    parser.add_argument("--calls", type=int, default=2, help="timed calls per process (default 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"in four sequences, half masked (default {TOKENS})"
    )
    parser.add_argument("--scaling", action="store_true", help="memory over tokens and time over budget instead")
    parser.add_argument("--out", type=Path, help="JSON file to write or to update (default: standard output)")
    args = parser.parse_args()

    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for case in args.case:
        for dtype in args.dtype:
            log(f"{case}, {dtype}")
            with tempfile.TemporaryDirectory() as directory:
                inputs = make_inputs(case, DTYPES[dtype], args.tokens)
                section = describe(case, dtype, inputs, args.threads)
                if args.scaling:
                    section |= scale(case, inputs, args.calls, args.threads, Path(directory))
                else:
                    section |= compare(inputs, args.only, args.repeats, args.calls, args.threads, Path(directory))
            results.setdefault("scaling" if args.scaling else "comparison", {})[f"{case}/{dtype}"] = section
            if args.out:  # after every section: a long run that is interrupted keeps what it has
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    if not args.out:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

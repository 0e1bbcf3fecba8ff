"""Run the comparison: `python -m benchmarks.run --device cpu --out benchmarks/results/cpu.json`.

Every variant runs in a process of its own with the same number of threads; in each repeat all of them take their turn
(A, B, C, A, B, C, ...), and between its calls a process times the floor (floor, call, floor, call, floor), so a
machine that slows down for a while slows both. The ratio of a variant is the median, over all its calls, of the call's
time to the mean of the floor's before and after it.

`--scaling` makes the sweeps of `benchmarks.scaling` instead: time and memory over tokens, vocabulary, K and options.
Both kinds of result go to the same file, one section per case and dtype or per sweep; a section measured again is
replaced, the others stay; an interrupted sweep goes on at its next point.

The file (times in seconds, memory in MiB above the inputs, of which the returned gradients are `gradient_mib`):

    {"comparison": {"smollm2/float32": SECTION, ...}, "lengths": {"smollm2/float32/8192": SECTION, ...},
     "scaling": {SWEEP: see benchmarks.scaling, ...}}

Sections of other `--tokens` than the default go to "lengths". Those of a dtype that the processor has no products for
are named "CASE/DTYPE emulated", so that they do not replace another machine's.

    SECTION
      environment   cpu, threads, memory_gib, python, platform, versions {package: version}, commit, date
      case, dtype, hidden_size, vocab_size, tokens, valid_tokens, gradient_mib
      floor_dtype   of the floor's products: see benchmarks.floor
      peakedness    label_probability, topk_mass: means over the valid tokens
      floor         {logits|dhidden|dweight: {seconds, arrangement}}: the fastest arrangements, which all time
      floor_seconds median over all processes of the sum of the three
      rows          [{variant, label, objective, ours, frozen, ratio, seconds [[per call] per repeat], floor_seconds
                    [[before, between and after them] per repeat], peak_mib [per repeat], loss, loss_error,
                    hidden_grad_error, weight_grad_error (against float64, relative but for the loss; null where there
                    is no such gradient), gflops}], gflops counting only the products that the task needs on valid
                    tokens (three, or two for a frozen head)
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.cases import CASES, DTYPES, Inputs, make_inputs, peakedness, save_inputs
from benchmarks.floor import floor_dtype
from benchmarks.oracle import save_gradients
from benchmarks.process import child, environment, log
from benchmarks.scaling import HIDDEN_SIZE, SWEEPS, new_points
from benchmarks.variants import VARIANTS, find_variant

TOKENS = 2_048


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


def gradient_mib(inputs: Inputs) -> float:
    """What `hidden.grad` and `weight.grad` take, whoever computes them."""
    return (inputs.hidden.numel() + inputs.weight.numel()) * inputs.weight.element_size() / 2**20


def describe(case: str, dtype: str, inputs: Inputs, threads: int) -> dict:
    return {
        "environment": environment(threads),
        "case": case,
        "dtype": dtype,
        "floor_dtype": str(floor_dtype(DTYPES[dtype])).removeprefix("torch."),
        "hidden_size": inputs.weight.shape[1],
        "vocab_size": inputs.weight.shape[0],
        "tokens": inputs.labels.numel(),
        "valid_tokens": int(inputs.valid.sum()),
        "gradient_mib": gradient_mib(inputs),
        "peakedness": peakedness(inputs),
    }


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
    parser.add_argument(
        "--scaling",
        nargs="*",
        choices=SWEEPS,
        metavar="SWEEP",
        help=f"make sweeps (default: {', '.join(SWEEPS)}); points that the file has from this commit and machine stay",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write or to update (default: standard output)")
    args = parser.parse_args()

    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}

    def keep(kind: str, name: str, section: dict) -> None:
        results.setdefault(kind, {})[name] = section
        if args.out:  # after every piece: a long run that is interrupted keeps what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")

    if args.scaling is not None:
        for name in args.scaling or SWEEPS:
            section = results.get("scaling", {}).get(name)
            here = environment(args.threads)
            if not same_place(section, here):
                section = {"environment": here, "hidden_size": HIDDEN_SIZE, "points": []}
            log(f"{name}, {len(section['points'])} points known")
            for point in new_points(name, args.threads, section["points"]):
                section["points"].append(point)
                keep("scaling", name, section)
    else:
        for case in args.case:
            for dtype in args.dtype:
                log(f"{case}, {dtype}")
                with tempfile.TemporaryDirectory() as directory:
                    inputs = make_inputs(case, DTYPES[dtype], args.tokens)
                    section = describe(case, dtype, inputs, args.threads)
                    section |= compare(inputs, args.only, args.repeats, args.calls, args.threads, Path(directory))
                name = f"{case}/{dtype}" + ("" if section["floor_dtype"] == dtype else " emulated")
                if args.tokens == TOKENS:
                    keep("comparison", name, section)
                else:
                    keep("lengths", f"{name}/{args.tokens}", section)
    if not args.out:
        print(json.dumps(results, indent=1))


def same_place(section: dict | None, here: dict) -> bool:
    """Whether a section was measured with this code on this machine; uncommitted code may be any."""
    if section is None or here["commit"].endswith("-dirty"):
        return False
    return {**section["environment"], "date": ""} == {**here, "date": ""}


if __name__ == "__main__":
    main()

"""Run the comparison: `python -m benchmarks.run --out benchmarks/results/cpu.json`.

Every variant runs in a process of its own with the same number of threads; in each repeat all of them take their turn
(A, B, C, A, B, C, ...), and between its calls a process times the floor (floor, call, floor, call, floor), so a
machine that slows down for a while slows both. The ratio of a variant is the median, over all its calls, of the call's
time to the mean of the floor's before and after it.

Rows (`benchmarks.rows`) of the study "comparison", whose variants have

    head, dtype, tokens   `--case`, `--dtype` and `--tokens`
    floor                 the dtype of the floor's products: another than `dtype` where the processor has none for that
    plan, loss            of `benchmarks.variants`, where a row is about one

A row that is measured again is replaced, the others stay. Memory is above the inputs, gradients included; errors are
against float64, relative but for the loss. `rate` counts only the products that the task needs on valid tokens: three,
or two for a frozen head.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.cases import CASES, DTYPES, Inputs, make_inputs, peakedness, save_inputs
from benchmarks.floor import floor_dtype
from benchmarks.oracle import save_gradients
from benchmarks.process import arguments, child, environment, log
from benchmarks.variants import VARIANTS, find_variant

STUDY, TOKENS = "comparison", 2_048


def compare(inputs: Inputs, only: list[str], repeats: int, calls: int, threads: int, problem: dict) -> rows.Rows:
    """Floor and variants in turn, `repeats` times; `problem` is what all variants have in common."""
    machine, collected = environment(threads), rows.Rows()

    def add(metrics: dict[str, Any], **variant: Any) -> None:
        collected.extend(rows.measured(STUDY, machine, metrics, **problem, **variant))

    with tempfile.TemporaryDirectory() as directory:
        stored = Path(directory) / "inputs.safetensors"
        save_inputs(inputs, stored)
        jobs = [(name, objective) for name in only for objective in VARIANTS[name].objectives]
        exact = {objective: Path(directory) / f"{objective}.safetensors" for _, objective in jobs}
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
    add(describe(inputs) | {"floor, s": statistics.median(floors)})
    for product, best in floor.items():
        add({"floor, s": best["seconds"], "arrangement": best["arrangement"]}, product=product)
    for (name, objective), results in measured.items():
        add(metrics(name, inputs, results), plan=name, loss=objective)
    return collected


def ratios(result: dict) -> list[float]:
    """Of each call: its time over the mean of the floor's before and after it."""
    floors = result["floor_seconds"]
    return [t / statistics.mean(floors[i : i + 2]) for i, t in enumerate(result["seconds"])]


def metrics(name: str, inputs: Inputs, results: list[dict]) -> dict[str, Any]:
    """Of a variant, from what its processes report."""
    calls = [seconds for result in results for seconds in result["seconds"]]
    flops = (2 if find_variant(name).frozen else 3) * 2 * int(inputs.valid.sum()) * inputs.weight.numel()
    return {
        "ratio, floors": statistics.median(ratio for result in results for ratio in ratios(result)),
        "rate, GFLOP/s": flops / statistics.median(calls) / 1e9,
        "time, s": [result["seconds"] for result in results],
        "floor, s": [result["floor_seconds"] for result in results],
        "peak, MiB": [result["peak_mib"] for result in results],
        **{key: results[0][key] for key in ("loss", "loss_error", "hidden_grad_error", "weight_grad_error")},
    }


def describe(inputs: Inputs) -> dict[str, float]:
    """The problem. `gradients` is what `hidden.grad` and `weight.grad` take, whoever computes them."""
    vocabulary, width = inputs.weight.shape
    gradients = (inputs.hidden.numel() + inputs.weight.numel()) * inputs.weight.element_size()
    sizes = {"width": width, "vocabulary": vocabulary, "valid_tokens": int(inputs.valid.sum())}
    return sizes | {"gradients, MiB": gradients / 2**20} | peakedness(inputs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all variants (default 3)")
    parser.add_argument("--calls", type=int, default=2, help="timed calls per process (default 2)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in four sequences, half masked")
    args = parser.parse_args()
    for case in args.case:
        for dtype in args.dtype:
            log(f"{case}, {dtype}")
            floor = str(floor_dtype(DTYPES[dtype])).removeprefix("torch.")
            problem = {"head": case, "dtype": dtype, "floor": floor, "tokens": args.tokens}
            inputs = make_inputs(case, DTYPES[dtype], args.tokens)
            collected = compare(inputs, args.only, args.repeats, args.calls, args.threads, problem)
            rows.save(args.out, collected)  # after every piece: a long run that is interrupted keeps what it has


if __name__ == "__main__":
    main()

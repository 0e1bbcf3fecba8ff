"""Run the comparison: `python -m benchmarks.run --device cpu --out benchmarks/results/cpu.json`.

Every variant runs in a process of its own with the same number of threads; in each repeat all of them take their turn
(floor, A, B, C, floor, A, B, C, ...), so a machine that slows down for a while slows all of them. The ratio of a
variant is the median over repeats of its median time in that repeat over the floor's in the same repeat.

`--scaling` makes the sweeps of `benchmarks.scaling` instead: time and memory over tokens, vocabulary, K and options.
Both kinds of result go to the same file, one section per case and dtype or per sweep; a section measured again is
replaced, the others stay.

The file (times in seconds, memory in MiB above the inputs, of which the returned gradients are `gradient_mib`):

    {"comparison": {"smollm2/float32": SECTION, ...}, "scaling": {SWEEP: see benchmarks.scaling, ...}}

    SECTION
      environment   cpu, threads, memory_gib, python, platform, versions {package: version}, commit, date
      case, dtype, hidden_size, vocab_size, tokens, valid_tokens, gradient_mib
      peakedness    label_probability, topk_mass: means over the valid tokens
      floor         [{logits|dhidden|dweight: {seconds, arrangement}}, ...] one per repeat
      floor_seconds median over repeats of the sum of the three
      rows          [{variant, label, objective, ours, frozen, ratio, seconds [[per call] per repeat], peak_mib [per
                    repeat], loss, loss_error, hidden_grad_error, weight_grad_error (against float64, relative but for
                    the loss; null where there is no such gradient), gflops}], gflops counting only the products that
                    the task needs on valid tokens (three, or two for a frozen head)
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from .cases import CASES, DTYPES, Inputs, make_inputs, peakedness, save_inputs
from .oracle import save_gradients
from .process import child, environment, log
from .scaling import SWEEPS, make_sweep
from .variants import VARIANTS, find_variant

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

    floors, measured = [], {job: [] for job in jobs}  # type: tuple[list[dict], dict[tuple[str, str], list[dict]]]
    for repeat in range(repeats):
        floors.append(child(stored, "floor", threads, calls))
        floor = floor_seconds(floors[-1])
        log(f"repeat {repeat + 1} of {repeats}: floor {floor:.3f} s")
        for (name, objective), results in measured.items():
            options = ["--objective", objective] + (["--exact", str(exact[objective])] if repeat == 0 else [])
            results.append(child(stored, name, threads, calls, *options))
            seconds = statistics.median(results[-1]["seconds"])
            log(
                f"  {name:14} {objective:7} {seconds:7.3f} s {seconds / floor:6.2f} {results[-1]['peak_mib']:7.0f} MiB"
            )

    return {
        "floor": floors,
        "floor_seconds": statistics.median(map(floor_seconds, floors)),
        "rows": [row(name, objective, inputs, results, floors) for (name, objective), results in measured.items()],
    }


def floor_seconds(floor: dict[str, dict]) -> float:
    return sum(product["seconds"] for product in floor.values())


def row(name: str, objective: str, inputs: Inputs, results: list[dict], floors: list[dict]) -> dict:
    variant = find_variant(name)
    per_repeat = [statistics.median(result["seconds"]) for result in results]
    flops = (2 if variant.frozen else 3) * 2 * int(inputs.valid.sum()) * inputs.weight.numel()
    errors = ("loss", "loss_error", "hidden_grad_error", "weight_grad_error")
    return {
        "variant": name,
        "label": variant.label,
        "objective": objective,
        "ours": variant.ours,
        "frozen": variant.frozen,
        "ratio": statistics.median(t / floor_seconds(f) for t, f in zip(per_repeat, floors, strict=True)),
        "gflops": flops / statistics.median(per_repeat) / 1e9,
        "seconds": [result["seconds"] for result in results],
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
        help=f"make sweeps instead, but those that the file has from this commit and machine: {', '.join(SWEEPS)}",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write or to update (default: standard output)")
    args = parser.parse_args()

    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}

    def keep(kind: str, name: str, section: dict) -> None:
        results.setdefault(kind, {})[name] = section
        if args.out:  # after every section: a long run that is interrupted keeps what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")

    if args.scaling is not None:
        for name in args.scaling or SWEEPS:
            here = environment(args.threads)
            if same_place(results.get("scaling", {}).get(name), here):
                log(f"{name}: measured already")
            else:
                keep("scaling", name, {"environment": here} | make_sweep(name, args.threads))
    else:
        for case in args.case:
            for dtype in args.dtype:
                log(f"{case}, {dtype}")
                with tempfile.TemporaryDirectory() as directory:
                    inputs = make_inputs(case, DTYPES[dtype], args.tokens)
                    section = describe(case, dtype, inputs, args.threads)
                    section |= compare(inputs, args.only, args.repeats, args.calls, args.threads, Path(directory))
                keep("comparison", f"{case}/{dtype}", section)
    if not args.out:
        print(json.dumps(results, indent=1))


def same_place(section: dict | None, here: dict) -> bool:
    """Whether a section was measured with this code on this machine; uncommitted code may be any."""
    if section is None or here["commit"].endswith("-dirty"):
        return False
    return {**section["environment"], "date": ""} == {**here, "date": ""}


if __name__ == "__main__":
    main()

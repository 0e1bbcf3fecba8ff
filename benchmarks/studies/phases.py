"""Where the time of an exact step on the CPU goes:

    python -m benchmarks.studies.phases --out benchmarks/results/phases.json

On the comparison's SmolLM2 case in float32, DPO + top-k KL. In one process, in turn: the floor's three products; the
passes of the `cpu` backend into memory that is there already, as the floor's is; the same passes into memory that the
operating system has yet to give, as in every training step; the whole step; and, as the bound of all of them, the
processor's rate of multiply-adds. Rows have the plan and the part in their variants, and a value for each round.
"""

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Inputs, make_inputs
from benchmarks.floor import arranged, measure_floor, timed
from benchmarks.process import arguments, environment, log
from benchmarks.rows import NOTHING, Rows, caption, markdown, measured, save
from benchmarks.run import TOKENS
from benchmarks.variants import RETAIN_EVERYTHING, ours
from dadpo_kernels.ops.backends.base import Coefficients, Entries, Grads, run_backward, run_forward
from dadpo_kernels.ops.backends.cpu import CpuTiles
from dadpo_kernels.ops.head import Head
from dadpo_kernels.ops.run import plan_for

STUDY = "phases"
BUDGETS = {"recompute": 0, "retain": RETAIN_EVERYTHING}
PRODUCTS = {"recompute": 4, "retain": 3}  # matrix products of a plan
FLOOR = {"plan": "floor", "part": "products"}
FMA_STEPS = 16_000_000


def fma_peak(threads: int) -> Callable[[], float]:
    """A function that returns floating-point operations per second of all `threads` together, in some 30 ms.

    They load nothing, so their rate bounds every product. Compiled for this processor by the C++ compiler that `CXX`
    names (`c++` without); `CalledProcessError` if it fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(__file__).with_name("fma_peak.cpp"), Path(directory) / "fma_peak.so"
        options = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "c++"), *options, str(source), "-o", str(library)], check=True)
        fma_steps = ctypes.CDLL(str(library)).fma_steps
    fma_steps.restype, fma_steps.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]

    def one(_: int) -> float:
        start = time.perf_counter()
        operations = fma_steps(FMA_STEPS, ctypes.byref(ctypes.c_float(0.0)))
        return operations / (time.perf_counter() - start)

    def rate() -> float:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(one, range(threads)))

    return rate


def runs(inputs: Inputs, budget: int) -> dict[str, Callable[[], Any]]:
    """What is timed of a plan."""
    weight, valid = inputs.weight, inputs.valid
    hidden, labels = inputs.hidden.flatten(0, 1)[valid], inputs.labels.flatten()[valid]
    entries = Entries.merge(labels, inputs.teacher.topk_ids.flatten(0, 1)[valid])
    rows, (vocab, width) = len(hidden), weight.shape
    plan = plan_for(rows, vocab, width, hidden.dtype, backend="cpu", memory_budget=budget)
    coefficients = Coefficients(torch.full((rows,), 1e-5), torch.zeros(rows), torch.full(entries.ids.shape, 1e-5))
    tiles = CpuTiles(hidden, Head(weight, None, 1.0, None, 1.0), entries)

    def memory() -> tuple[Tensor, Grads]:
        empty = {"device": hidden.device}
        retained = tiles.empty(plan.retained_bytes, dtype=torch.uint8, **empty)
        grad_hidden = torch.zeros(rows, tiles.grad_hidden_columns())
        return retained, Grads(grad_hidden, tiles.empty(vocab, width, dtype=hidden.dtype, **empty), None)

    known, grads = memory()

    def fresh() -> None:
        retained, new = memory()
        run_forward(tiles, plan, retained)
        run_backward(tiles, plan, retained, coefficients, new)

    def step() -> None:
        leaves = {"hidden": inputs.hidden.detach().requires_grad_(), "weight": weight.detach().requires_grad_()}
        ours(budget)(inputs._replace(**leaves), "dpo+kl").backward()

    return {
        "forward": lambda: run_forward(tiles, plan, known),
        "backward": lambda: run_backward(tiles, plan, known, coefficients, grads),
        "fresh": fresh,
        "step": step,
    }


def study(inputs: Inputs, rounds: int, threads: int) -> Rows:
    hidden = inputs.hidden.flatten(0, 1)[inputs.valid]
    best = measure_floor(hidden, inputs.weight, 3)
    floor = arranged(hidden, inputs.weight, {product: choice["arrangement"] for product, choice in best.items()})
    parts = {("floor", "products"): floor}
    parts |= {(n, part): run for n, b in BUDGETS.items() for part, run in runs(inputs, b).items()}
    times: dict[tuple[str, str], list[float]] = {part: [] for part in parts}
    peak, rates = fma_peak(threads), []
    for number in range(rounds + 1):
        rates.append(peak())
        for part, run in parts.items():
            times[part].append(timed(run))
        log(f"round {number}: " + " ".join(f"{t[-1]:.3f}" for t in times.values()))
    machine, flops = environment(threads), 2 * len(hidden) * inputs.weight.numel()
    rows = measured(STUDY, machine, {"tokens": len(hidden), "product, flop": flops, "fma_peak, flop/s": rates[1:]})
    for (plan, part), t in times.items():  # the first round touches memory and counts for nothing
        rows += measured(STUDY, machine, {"time, s": t[1:]}, plan=plan, part=part)
    return rows


def phases(rows: Rows) -> str:
    rows = rows.where(STUDY)
    floor, flops = rows.get("time", **FLOOR), rows.get("product")
    peak = max(rows.get("fma_peak"))

    def seconds(plan: str, *parts: str) -> list[float]:
        return [sum(times) for times in zip(*(rows.get("time", plan=plan, part=part) for part in parts), strict=True)]

    def ratio(times: list[float]) -> str:
        return f"{statistics.median(t / f for t, f in zip(times, floor, strict=True)):.2f}"

    def bound(products: int, times: list[float]) -> str:
        """The time of so many products at the peak rate over the least of `times`."""
        return f"{products * flops / peak / min(times):.2f}"

    columns = (("forward",), ("backward",), ("forward", "backward"), ("fresh",), ("step",))
    lines = [["PyTorch's products", "3", NOTHING, NOTHING, "1.00", bound(3, floor), NOTHING, NOTHING]]
    for plan, products in PRODUCTS.items():
        passes = [ratio(seconds(plan, *parts)) for parts in columns]
        share = bound(products, seconds(plan, "forward", "backward"))
        lines.append([plan, str(products), *passes[:3], share, *passes[3:]])
    header = ["plan", "products", "forward", "backward", "both", "share of the peak"]
    header += ["both, in memory not touched before", "whole step"]
    return (
        f"{markdown(header, lines)}\n\nThe peak was {peak / 1e9:.0f} GFLOP/s at most in these rounds. At that rate "
        f"four products alone would take {bound(4, floor)} of the fastest floor and three {bound(3, floor)}.\n\n"
        + caption(rows, "studies.phases --out benchmarks/results/phases.json")
    )


TABLES = {"phases": phases}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    save(args.out, study(make_inputs("smollm2", DTYPES["float32"], TOKENS), args.rounds, args.threads))


if __name__ == "__main__":
    main()

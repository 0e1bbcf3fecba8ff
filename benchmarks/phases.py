"""Where the time of an exact step on the CPU goes: `python -m benchmarks.phases --out benchmarks/results/phases.json`.

On the benchmark's SmolLM2 case in float32, DPO + top-k KL. In one process and in turn: the floor's three products; the
passes of the `cpu` backend into memory that is there already, as the floor's is; the same passes into memory that the
operating system has yet to give, as in every training step; the whole step; and, as the bound of all of them, the
processor's rate of multiply-adds. JSON:

    {"environment", "tokens" (valid), "product_flops" (of one matrix product), "floor" [seconds per round],
     "fma_peak" [floating-point operations per second, before each round], "plans": {"recompute" | "retain": {
        "forward", "backward" (passes alone), "fresh" (both, with fresh memory), "step": [seconds per round]}}}
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Inputs, make_inputs
from benchmarks.floor import arranged, measure_floor, timed
from benchmarks.fma_peak import fma_peak
from benchmarks.process import environment, log
from benchmarks.run import TOKENS
from benchmarks.variants import RETAIN_EVERYTHING, ours
from dadpo_kernels.ops.backends.base import Coefficients, Entries, Grads, run_backward, run_forward
from dadpo_kernels.ops.backends.cpu import CpuTiles
from dadpo_kernels.ops.head import Head
from dadpo_kernels.ops.run import plan_for

BUDGETS = {"recompute": 0, "retain": RETAIN_EVERYTHING}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs = make_inputs("smollm2", DTYPES["float32"], TOKENS)
    hidden = inputs.hidden.flatten(0, 1)[inputs.valid]
    best = measure_floor(hidden, inputs.weight, 3)
    floor = arranged(hidden, inputs.weight, {product: found["arrangement"] for product, found in best.items()})
    plans = {name: runs(inputs, budget) for name, budget in BUDGETS.items()}
    peak = fma_peak(args.threads)
    seconds: dict[str, Any] = {
        "floor": [],
        "fma_peak": [],
        "plans": {name: {part: [] for part in plans[name]} for name in plans},
    }
    for number in range(args.rounds + 1):  # the first round touches memory and counts for nothing
        rate = peak()
        times = {"floor": timed(floor)} | {(n, part): timed(run) for n in plans for part, run in plans[n].items()}
        log(f"round {number}: " + " ".join(f"{t:.3f}" for t in times.values()))
        if number:
            seconds["fma_peak"].append(rate)
            seconds["floor"].append(times.pop("floor"))
            for (name, part), t in times.items():
                seconds["plans"][name][part].append(t)
    flops = 2 * len(hidden) * inputs.weight.numel()
    result = {"environment": environment(args.threads), "tokens": len(hidden), "product_flops": flops} | seconds
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the live plan costs and errs by, over chunk size and tolerance:

    python -m benchmarks.live_cost --out benchmarks/results/live_cost.json --plot docs/live_cost.png

On SmolLM2's head with its real hidden states, DPO and top-64 KL, against the exact plans of the same machine. JSON:

    {"environment", "tokens", "recompute": {seconds}, "retain": {seconds}, "rows": [{chunk, tolerance, seconds,
     hidden_grad_error, weight_grad_error (against the exact plan, relative), certificate, live_share, exact_share,
     units}]}

`seconds` are of CPU time, forward and backward, the least of some calls: what else runs on the machine counts little.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Inputs, load_inputs, make_inputs
from benchmarks.oracle import relative_error
from benchmarks.process import environment
from benchmarks.run import TOKENS
from benchmarks.style import LIMIT, OURS, RIVAL, figure, save
from benchmarks.variants import RETAIN_EVERYTHING, ours
from dadpo_kernels import live_diagnostics

OBJECTIVE = "dpo+kl"
CHUNKS = (64, 128, 192, 256, 512)
LIMITS = (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
CHOSEN_CHUNK, CHOSEN_LIMIT = 256, 1e-3


def gradients(inputs: Inputs, budget: int | None, tolerance: float | None) -> tuple[Tensor, Tensor]:
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    loss = ours(budget, tolerance)(inputs._replace(hidden=hidden, weight=weight), OBJECTIVE)
    return torch.autograd.grad(loss, (hidden, weight))


def seconds(inputs: Inputs, budget: int | None, tolerance: float | None, calls: int) -> float:
    def once() -> float:
        start = time.process_time()
        gradients(inputs, budget, tolerance)
        return time.process_time() - start

    return min(once() for _ in range(calls))


def study(inputs: Inputs, calls: int) -> dict[str, Any]:
    exact = gradients(inputs, 0, None)
    result: dict[str, Any] = {
        "recompute": {"seconds": seconds(inputs, 0, None, calls)},
        "retain": {"seconds": seconds(inputs, RETAIN_EVERYTHING, None, calls)},
        "rows": [],
    }
    grid = [(c, CHOSEN_LIMIT) for c in CHUNKS] + [(CHOSEN_CHUNK, t) for t in LIMITS if t != CHOSEN_LIMIT]
    for chunk, tolerance in grid:
        with mock.patch("dadpo_kernels.ops.live.plan.live_chunk", lambda vocab, chunk=chunk: chunk):
            with live_diagnostics() as done:
                got = gradients(inputs, None, tolerance)
            row = {"chunk": chunk, "tolerance": tolerance, "seconds": seconds(inputs, None, tolerance, calls)}
        errors = [relative_error(g, e) for g, e in zip(got, exact, strict=True)]
        row |= dict(zip(("hidden_grad_error", "weight_grad_error"), errors, strict=True))
        row |= dataclasses.asdict(done[0])
        print({key: float(f"{value:.4g}") for key, value in row.items()}, flush=True)
        result["rows"].append(row)
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    drawing, axes = figure(1, 3, width=4.2, sharey=False)
    by_chunk, by_limit, by_share = axes[0]
    rows = result["rows"]
    base = result["recompute"]["seconds"]
    chunks = sorted((r for r in rows if r["tolerance"] == CHOSEN_LIMIT), key=lambda r: r["chunk"])
    limits = sorted((r for r in rows if r["chunk"] == CHOSEN_CHUNK), key=lambda r: r["tolerance"])

    x = [r["chunk"] for r in chunks]
    by_chunk.plot(x, [r["seconds"] / base for r in chunks], "o-", color=OURS, label="time / recompute")
    by_chunk.plot(x, [r["live_share"] for r in chunks], "s--", color=RIVAL, label="live share f")
    by_chunk.set(xscale="log", xticks=x, xticklabels=x, ylim=(0, None), xlabel="tokens of a chunk, C")
    by_chunk.minorticks_off()
    by_chunk.set_title(f"Tolerance {CHOSEN_LIMIT:g}")

    x = [r["tolerance"] for r in limits]
    for key, style, label in (
        ("hidden_grad_error", "o-", "hidden's gradient"),
        ("weight_grad_error", "s-", "weight's gradient"),
        ("certificate", "^--", "certificate"),
    ):
        by_limit.plot(x, [r[key] for r in limits], style, label=label)
    by_limit.plot(x, x, color=LIMIT, linewidth=1, label="tolerance")
    by_limit.set(xscale="log", yscale="log", xlabel="grad_tolerance", ylabel="relative error")
    by_limit.set_title(f"C = {CHOSEN_CHUNK}")

    x = [r["live_share"] for r in limits]
    by_share.plot(x, [r["seconds"] / base for r in limits], "o-", color=OURS, label="measured")
    by_share.plot(x, [r["units"] / 4 for r in limits], "--", color=RIVAL, label="products alone")
    by_share.axhline(result["retain"]["seconds"] / base, color=LIMIT, linewidth=1, label="retain, exact")
    by_share.set(xlabel="live share f", ylabel="time / recompute", ylim=(0, None))
    by_share.set_title(f"C = {CHOSEN_CHUNK}, over tolerances")
    for axis in axes[0]:
        axis.legend(fontsize=8)
    save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, help="file of benchmarks.cases.save_inputs (default: made here)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of each setting")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs = load_inputs(args.inputs) if args.inputs else make_inputs("smollm2", DTYPES[args.dtype], TOKENS)
    result = {"environment": environment(args.threads), "tokens": int(inputs.valid.sum())} | study(inputs, args.calls)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.plot)


if __name__ == "__main__":
    main()

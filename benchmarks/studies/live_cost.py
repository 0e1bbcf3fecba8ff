"""What the live plan costs and errs by, over chunk size and tolerance:

    python -m benchmarks.studies.live_cost --out benchmarks/results/live_cost.json

On SmolLM2's head with its real hidden states, DPO and top-64 KL, against the exact plans of the same machine. Variants
are plans, the live ones with chunk and tolerance. Errors are relative, against the exact plan; `time` is CPU time,
forward and backward, the least of some calls: what else runs on the machine counts little.
"""

import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Inputs, make_inputs
from benchmarks.oracle import relative_error
from benchmarks.process import arguments, environment
from benchmarks.rows import Cell, Rows, caption, measured, save, show, table
from benchmarks.run import TOKENS
from benchmarks.style import LIMIT, OURS, RIVAL, figure
from benchmarks.variants import RETAIN_EVERYTHING, ours
from dadpo_kernels import live_diagnostics

STUDY, OBJECTIVE = "live_cost", "dpo+kl"
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


def study(inputs: Inputs, calls: int, threads: int) -> Rows:
    exact, machine = gradients(inputs, 0, None), environment(threads)
    rows = measured(STUDY, machine, {"tokens": int(inputs.valid.sum())})
    for plan, budget in (("recompute", 0), ("retain", RETAIN_EVERYTHING)):
        rows += measured(STUDY, machine, {"time, s": seconds(inputs, budget, None, calls)}, plan=plan)
    grid = [(c, CHOSEN_LIMIT) for c in CHUNKS] + [(CHOSEN_CHUNK, t) for t in LIMITS if t != CHOSEN_LIMIT]
    for chunk, tolerance in sorted(grid):
        with mock.patch("dadpo_kernels.ops.live.plan.live_chunk", lambda vocab, chunk=chunk: chunk):
            with live_diagnostics() as done:
                got = gradients(inputs, None, tolerance)
            metrics = {"time, s": seconds(inputs, None, tolerance, calls)}
        errors = [relative_error(g, e) for g, e in zip(got, exact, strict=True)]
        metrics |= dict(zip(("hidden_grad_error", "weight_grad_error"), errors, strict=True))
        metrics |= {key: getattr(done[0], key) for key in ("certificate", "live_share", "exact_share", "units")}
        print(chunk, tolerance, {key: float(f"{value:.4g}") for key, value in metrics.items()}, flush=True)
        rows += measured(STUDY, machine, metrics, plan="live", chunk=chunk, tolerance=tolerance)
    return rows


def live_cost(rows: Rows) -> str:
    rows = rows.where(STUDY)
    base = rows.get("time", plan="recompute")

    def name(line: Rows) -> str:
        v = line[0].variant
        return f"live, chunks of {v['chunk']}" if v["plan"] == "live" else f"{v['plan']}, exact"

    def tolerance(line: Rows) -> str | None:
        return f"{line[0].variant['tolerance']:g}" if line[0].variant["plan"] == "live" else None

    columns: list[tuple[str, Cell]] = [
        ("plan", name),
        ("`grad_tolerance`", tolerance),
        ("certificate", show("certificate", ".1e")),
        ("hidden's gradient", show("hidden_grad_error", ".1e")),
        ("weight's gradient", show("weight_grad_error", ".1e")),
        ("live share", show("live_share", ".2f")),
        ("products", show("units", ".2f")),
        ("time", show("time", ".2f", scale=1 / base)),
    ]
    threads = rows[0].environment["threads"]
    source = caption(rows, f"studies.live_cost --threads {threads} --out benchmarks/results/live_cost.json")
    return f"{table(rows, ['plan', 'chunk', 'tolerance'], columns)}\n\n{source}"


def draw(rows: Rows) -> Any:
    drawing, axes = figure(1, 3, width=4.2, sharey=False)
    by_chunk, by_limit, by_share = axes[0]
    rows = rows.where(STUDY)
    base = rows.get("time", plan="recompute")
    chunks = rows.where(tolerance=CHOSEN_LIMIT).groups("chunk")
    limits = rows.where(chunk=CHOSEN_CHUNK).groups("tolerance")

    def values(lines: list[Rows], metric: str, scale: float = 1.0) -> list[float]:
        return [scale * line.get(metric) for line in lines]

    x = [line[0].variant["chunk"] for line in chunks]
    by_chunk.plot(x, values(chunks, "time", 1 / base), "o-", color=OURS, label="time / recompute")
    by_chunk.plot(x, values(chunks, "live_share"), "s--", color=RIVAL, label="live share f")
    by_chunk.set(xscale="log", xticks=x, xticklabels=x, ylim=(0, None), xlabel="tokens of a chunk, C")
    by_chunk.minorticks_off()
    by_chunk.set_title(f"Tolerance {CHOSEN_LIMIT:g}")

    x = [line[0].variant["tolerance"] for line in limits]
    for metric, style, label in (
        ("hidden_grad_error", "o-", "hidden's gradient"),
        ("weight_grad_error", "s-", "weight's gradient"),
        ("certificate", "^--", "certificate"),
    ):
        by_limit.plot(x, values(limits, metric), style, label=label)
    by_limit.plot(x, x, color=LIMIT, linewidth=1, label="tolerance")
    by_limit.set(xscale="log", yscale="log", xlabel="grad_tolerance", ylabel="relative error")
    by_limit.set_title(f"C = {CHOSEN_CHUNK}")

    x = values(limits, "live_share")
    by_share.plot(x, values(limits, "time", 1 / base), "o-", color=OURS, label="measured")
    by_share.plot(x, values(limits, "units", 1 / 4), "--", color=RIVAL, label="products alone")
    retain = rows.get("time", plan="retain") / base
    by_share.axhline(retain, color=LIMIT, linewidth=1, label="retain, exact")
    by_share.set(xlabel="live share f", ylabel="time / recompute", ylim=(0, None))
    by_share.set_title(f"C = {CHOSEN_CHUNK}, over tolerances")
    for axis in axes[0]:
        axis.legend(fontsize=8)
    return drawing


TABLES = {"live-cost": live_cost}
PLOTS = {"docs/live_cost.png": draw}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of each setting")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    save(args.out, study(make_inputs("smollm2", DTYPES[args.dtype], TOKENS), args.calls, args.threads))


if __name__ == "__main__":
    main()

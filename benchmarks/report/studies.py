"""Tables of the studies that have a program and a file of their own: phases, live plan, capture, a step of TRL's."""

import statistics
from collections.abc import Sequence

from benchmarks.capture_report import report as capture_tables
from benchmarks.report.parts import NOTHING, caption, table
from benchmarks.trl_step import table as step_table

PHASES = "python -m benchmarks.phases --out benchmarks/results/phases.json"
LIVE_COST = "python -m benchmarks.live_cost --out benchmarks/results/live_cost.json --plot docs/live_cost.png"
LIVE_TRAINING = "python -m benchmarks.live_training --out benchmarks/results/live_training.json"
CAPTURE = "python -m benchmarks.capture {} --out benchmarks/results/capture.json"
TRL_STEP = "python -m benchmarks.trl_step --out benchmarks/results/trl_step.json"
METRICS = {
    "heldout_nll": "held-out negative log-likelihood",
    "heldout_kl": "held-out KL to the teacher",
    "heldout_accuracy": "held-out preference accuracy",
}
DIAGNOSTICS = {"live_share": "live share of the columns", "units": "matrix products"}


PRODUCTS = {"recompute": 4, "retain": 3}  # matrix products of an exact plan


def phases(results: dict) -> str:
    floor, peak, flops = results["floor"], max(results["fma_peak"]), results["product_flops"]

    def seconds(plan: str, *parts: str) -> list[float]:
        return [sum(times) for times in zip(*(results["plans"][plan][part] for part in parts), strict=True)]

    def ratio(times: list[float]) -> str:
        return f"{statistics.median(t / f for t, f in zip(times, floor, strict=True)):.2f}"

    def bound(products: int, times: list[float]) -> float:
        """The time of so many products at the peak rate over the least of `times`."""
        return products * flops / peak / min(times)

    columns = (("forward",), ("backward",), ("forward", "backward"), ("fresh",), ("step",))
    rows = [["PyTorch's products", "3", "–", "–", "1.00", f"{bound(3, floor):.2f}", "–", "–"]]
    for plan in results["plans"]:
        passes = [ratio(seconds(plan, *parts)) for parts in columns]
        share = f"{bound(PRODUCTS[plan], seconds(plan, 'forward', 'backward')):.2f}"
        rows.append([plan, str(PRODUCTS[plan]), *passes[:3], share, *passes[3:]])
    header = ["plan", "products", "forward", "backward", "both", "share of the peak"]
    header += ["both, in memory not touched before", "whole step"]
    return "\n\n".join(
        [
            "Times over those of PyTorch's three products in the same process and round, medians. The passes and the "
            "products write to memory that is there already; a training step gets its gradient and what it retains "
            "from the operating system each time, page by page. The whole step is timed right after that, and may "
            "find the pages that were just freed.",
            table(header, rows),
            f"The peak is the processor's rate of multiply-adds that load nothing, {peak / 1e9:.0f} GFLOP/s at most "
            "in these rounds. The share of it is that of both passes in their fastest round, counting their products "
            "alone, as if the softmax cost nothing. At that rate four products alone would take "
            f"{bound(4, floor):.2f} of the fastest floor and three {bound(3, floor):.2f}.",
            caption(results["environment"], PHASES),
        ]
    )


def live_cost(results: dict) -> str:
    recompute, retain = results["recompute"]["seconds"], results["retain"]["seconds"]
    rows = [["recompute, exact", "", "", "", "", "", "", "1.00"]]
    rows.append(["retain, exact", "", "", "", "", "", "", f"{retain / recompute:.2f}"])
    for row in sorted(results["rows"], key=lambda row: (row["chunk"], row["tolerance"])):
        errors = (row[key] for key in ("certificate", "hidden_grad_error", "weight_grad_error"))
        rows.append(
            [
                f"live, chunks of {row['chunk']}",
                f"{row['tolerance']:g}",
                *(f"{error:.1e}" for error in errors),
                f"{row['live_share']:.2f}",
                f"{row['units']:.2f}",
                f"{row['seconds'] / recompute:.2f}",
            ]
        )
    header = [
        "plan",
        "`grad_tolerance`",
        "certificate",
        "hidden's gradient",
        "weight's gradient",
        "live share",
        "products",
        "time",
    ]
    return "\n\n".join(
        [
            f"SmolLM2-135M's head on {results['tokens']:,} valid tokens of real text, DPO + top-64 KL, forward and "
            "backward. Errors are relative, against the exact plan; time is CPU time over that of recompute.",
            table(header, rows),
            caption(results["environment"], f"{LIVE_COST} --threads {results['environment']['threads']}"),
        ]
    )


def live_training(results: dict) -> str:
    environment = results.get("environment")
    parts = [
        "Twins from the same seeds and batches, trained with the exact plan and with the live one and evaluated "
        "exactly; mean ± standard deviation over seeds.",
    ]
    for task, result in results.items():
        if task == "environment":
            continue
        plans = list(result["curves"])
        steps, seeds = len(result["curves"]["exact"][0]), len(result["curves"]["exact"])
        rows = [
            [name, *(spread(result[key][plan]) for plan in plans)] for key, name in METRICS.items() if key in result
        ]
        rows += [
            [name, *(mean_of(result["live"].get(plan), key) for plan in plans)] for key, name in DIAGNOSTICS.items()
        ]
        parts.append(table([f"{task.replace('_', ' ')}, {steps} steps, {seeds} seeds", *plans], rows))
    parts.append(
        caption(environment, LIVE_TRAINING)
        if environment
        else f"The file does not say on what machine and at what commit; `{LIVE_TRAINING}` measures it again."
    )
    return "\n\n".join(parts)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def mean_of(seeds: list[dict] | None, key: str) -> str:
    return f"{statistics.mean(seed[key] for seed in seeds):.2f}" if seeds else NOTHING


def capture(results: dict) -> str:
    captions = []
    for section, found in results.items():
        part, _, dtype = section.partition("/")
        command = CAPTURE.format(f"{part} --dtype {dtype}" if dtype else part)
        captions.append(f"* {section}: {caption(found['environment'], command)}")
    return "\n\n".join([capture_tables(results), "\n".join(captions)])


def trl_step(results: dict) -> str:
    return "\n\n".join([step_table(results), caption(results["environment"], TRL_STEP)])

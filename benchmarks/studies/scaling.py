"""How this package's time and memory grow, one sweep per question:

    python -m benchmarks.studies.scaling --out benchmarks/results/scaling.json

On a synthetic peaked head (`benchmarks.cases.peaked_head`) of small width in float32, so that 65,536 tokens are soon
done; forward and backward of DPO + top-k KL, or of DPO alone at K = 0. Every point is a process of its own: rows whose
variant is the sweep, its `Shape` and the plan. What does not vary in a sweep is the default of `Shape`, or stands in
`SWEEPS`. `time` has the first call, too; big problems are called once. `products` and `estimate` are what this package
says of its plans beforehand.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import style
from benchmarks.cases import TOP_K, peaked_head, save_inputs, with_teacher
from benchmarks.process import arguments, child, environment, log
from benchmarks.rows import NOTHING, Cell, Rows, caption, markdown, measured, of, save, show, table
from benchmarks.variants import Variant, find_variant
from dadpo_kernels.ops.backends.registry import resolve
from dadpo_kernels.ops.memory import MemoryEstimate, estimate_memory

STUDY = "scaling"
HIDDEN_SIZE = 256
DENSE_LOGITS_MIB = 512  # above this the dense variant, which needs several times as much, is left out
CALLS, CALLS_UP_TO = 1, 8_192 * 32_768  # calls after the first, for logits of at most so many elements
FROZEN = ",frozen"


class Shape(NamedTuple):
    tokens: int = 4_096
    vocabulary: int = 32_768
    top_k: int = TOP_K
    masked: float = 0.0

    @property
    def valid_tokens(self) -> int:
        return self.tokens - int(self.tokens * self.masked)

    @property
    def logits_mib(self) -> float:
        return self.valid_tokens * self.vocabulary * 4 / 2**20


class Sweep(NamedTuple):
    shapes: tuple[Shape, ...]
    plans: tuple[str, ...] = ("recompute", "default")


def estimate(shape: Shape, variant: Variant) -> MemoryEstimate:
    """What the package itself says about a plan, before it runs."""
    return estimate_memory(
        shape.valid_tokens, shape.vocabulary, HIDDEN_SIZE, torch.float32, k=shape.top_k, tokens=shape.tokens,
        backend=resolve("auto", torch.device("cpu"), torch.float32), memory_budget=variant.memory_budget,
        frozen_head=variant.frozen,
    )  # fmt: skip


def budgets(shape: Shape) -> tuple[str, ...]:
    """From nothing to all that there is to retain."""
    everything = estimate(shape, find_variant("retain")).plan.retained_bytes
    return tuple(f"budget={everything * eighths // 8}" for eighths in (0, 1, 2, 4, 6, 8))


WITH_DENSE = ("recompute", "default", "dense")
SWEEPS = {
    "tokens": Sweep(tuple(Shape(tokens=n) for n in (1_024, 2_048, 4_096, 16_384, 65_536)), WITH_DENSE),
    "vocabulary": Sweep(tuple(Shape(1_024, vocabulary=v) for v in (32_768, 65_536, 131_072, 262_144)), WITH_DENSE),
    "top_k": Sweep(tuple(Shape(2_048, top_k=k) for k in (0, 16, 64, 128, 256))),
    "masked": Sweep(tuple(Shape(masked=eighths / 8) for eighths in (0, 2, 4, 6, 7))),
    "budget": Sweep((Shape(),), budgets(Shape())),
    "frozen": Sweep((Shape(),), ("recompute", "recompute,frozen", "retain", "retain,frozen")),
}


def points(sweep: str, threads: int) -> Iterator[Rows]:
    """Measured one after the other."""
    with tempfile.TemporaryDirectory() as directory:
        stored = Path(directory) / "inputs.safetensors"
        for shape in SWEEPS[sweep].shapes:
            hidden, weight, labels = peaked_head(shape.tokens, HIDDEN_SIZE, shape.vocabulary)
            save_inputs(with_teacher(hidden, weight, labels, shape.top_k, masked=shape.masked), stored)
            del hidden, weight, labels  # a child needs the memory
            for plan in SWEEPS[sweep].plans:
                if find_variant(plan).ours or shape.logits_mib <= DENSE_LOGITS_MIB:
                    metrics = point(stored, shape, plan, threads)
                    variant = {"sweep": sweep, **shape._asdict(), "plan": plan}
                    yield measured(STUDY, environment(threads), metrics, **variant)


def point(inputs: Path, shape: Shape, plan: str, threads: int) -> dict[str, Any]:
    variant = find_variant(plan)
    calls = CALLS if shape.valid_tokens * shape.vocabulary <= CALLS_UP_TO else 0
    result = child(inputs, plan, threads, calls, "--objective", "dpo+kl" if shape.top_k else "dpo")
    seconds = [result["first_seconds"], *result["seconds"]]
    log(f"  {shape} {plan:14} {min(seconds):7.3f} s {result['peak_mib']:7.0f} MiB")
    gradients = shape.tokens + (0 if variant.frozen else shape.vocabulary)
    expected = estimate(shape, variant) if variant.ours else None
    return {
        "valid_tokens": shape.valid_tokens,
        "time, s": seconds,
        "peak, MiB": result["peak_mib"],
        "gradients, MiB": gradients * HIDDEN_SIZE * 4 / 2**20,
        "logits, MiB": shape.logits_mib,
        "products": expected and expected.plan.units,
        "estimate, MiB": expected and expected.total / 2**20,
    }


LABELS = {"recompute": "recompute", "default": "default budget", "dense": "PyTorch, full logits"}
LINES = {
    "recompute": {"color": style.OURS, "marker": "o"},
    "default": {"color": style.OURS, "marker": "s", "linestyle": "--"},
    "dense": {"color": style.RIVAL, "marker": "^"},
}
HEADINGS = {
    "tokens": "Tokens",
    "vocabulary": "Vocabulary",
    "top_k": "K",
    "masked": "Masked fraction",
    "budget": "Memory budget: partial retention",
    "frozen": "Frozen head",
}
TITLES = {"tokens": "tokens", "vocabulary": "vocabulary", "top_k": "K", "masked": "masked fraction"}
FORMS = {"tokens": ",", "vocabulary": ",", "top_k": "", "masked": ".1%"}
POINT = ("tokens", "vocabulary", "top_k", "masked", "plan")


def beside_gradients(point: Rows) -> float:
    """MiB that a step needs and does not return."""
    return point.get("peak") - point.get("gradients")


def seconds(point: Rows) -> float:
    """The least of a point's calls: what else runs on a machine only adds."""
    return min(point.get("time"))


def line(rows: Rows, sweep: str, value: Callable[[Rows], float], plan: str) -> tuple[list[float], list[float]]:
    """A plan's points of a sweep: what varies, and a value."""
    groups = rows.where(STUDY, sweep=sweep, plan=plan).groups(*POINT)
    return [point[0].variant[sweep] for point in groups], [value(point) for point in groups]


def power(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """`(a, d)`: y is proportional to `x ** a` but for a factor within `1 + d` or its inverse."""
    x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    fit = statistics.linear_regression(x, y)
    return fit.slope, math.expm1(max(abs(b - fit.slope * a - fit.intercept) for a, b in zip(x, y, strict=True)))


def per_id(x: Sequence[float], y: Sequence[float]) -> str:
    fit = statistics.linear_regression(x, y)
    off = max(abs(b / (fit.intercept + fit.slope * a) - 1) for a, b in zip(x, y, strict=True))
    return f"{fit.slope * 1e3:.2f} ms (±{off:.0%}); 64 ids: {fit.slope * 64 / y[0]:.0%} of K = 0"


def fits(rows: Rows) -> str:
    """The fitted slopes, a column for each plan; in brackets the largest distance of a point from the line."""

    def exponent(x: list[float], y: list[float]) -> str:
        return "{:.2f} (±{:.0%})".format(*power(x, y))

    def bytes_each(x: list[float], y: list[float]) -> str:
        return f"{statistics.linear_regression(x, y).slope * 2**20:,.0f}"

    wanted = (
        ("time ∝ tokens to the power of", "tokens", seconds, exponent),
        ("memory beside gradients, bytes a token", "tokens", beside_gradients, bytes_each),
        ("time ∝ vocabulary to the power of", "vocabulary", seconds, exponent),
        ("memory beside gradients, bytes a vocabulary entry", "vocabulary", beside_gradients, bytes_each),
        ("time of one more id", "top_k", seconds, per_id),
    )
    lines = []
    for title, sweep, value, text in wanted:
        curves = [line(rows, sweep, value, plan) for plan in LABELS]
        lines.append([title, *(text(x, y) if x else NOTHING for x, y in curves)])
    heads = [[rows.where(STUDY, sweep="frozen", plan=plan + frozen) for frozen in ("", FROZEN)] for plan in LABELS]
    ratios = [f"{seconds(frozen) / seconds(trained):.2f}" if trained else NOTHING for trained, frozen in heads]
    lines.append(["time with a frozen head over that with a trained one", *ratios])
    return markdown(["Fitted", *LABELS.values()], lines)


def estimates(rows: Rows) -> str:
    """How well the package foresees its peaks."""
    estimated = [point for point in rows.where(STUDY).groups("sweep", *POINT) if point.get("estimate")]
    ratios = [point.get("peak") / point.get("estimate") for point in estimated]
    return (
        f"At the {len(ratios)} points of this package the measured peak was {min(ratios):.2f} to {max(ratios):.2f} "
        "times what `dadpo_kernels.estimate_memory` (`dadpo memory`) says beforehand, "
        f"{statistics.median(ratios):.2f} times in the median."
    )


def logits(rows: Rows) -> float:
    """MiB of one logits tensor, which is the same for all plans of a shape."""
    return rows.where(plan=rows[0].variant["plan"]).get("logits")


def allowed(point: Rows) -> float:
    """MiB of a `budget=BYTES`."""
    return int(point[0].variant["plan"].removeprefix("budget=")) / 2**20


def name(point: Rows) -> str:
    plan, comma, _ = point[0].variant["plan"].partition(",")
    if plan.startswith("budget="):
        return f"budget {allowed(point):,.0f} MiB"
    return LABELS.get(plan, plan) + (", frozen head" if comma else "")


def sweeps(rows: Rows) -> str:
    """A table of each: a line for a point."""
    columns: list[tuple[str, Cell]] = [
        ("plan", name),
        *((title, of(key, FORMS[key])) for key, title in TITLES.items()),
        ("one logits tensor, MiB", show("logits", ",.0f")),
        ("matrix products", show("products", ".2f")),
        ("s", show("time", ".2f", min)),
        ("MiB", show("peak", ",.0f")),
        ("MiB beside gradients", lambda point: f"{beside_gradients(point):,.0f}"),
    ]
    parts = []
    for sweep, title in HEADINGS.items():
        if swept := rows.where(STUDY, sweep=sweep):
            source = caption(swept, f"studies.scaling --sweep {sweep} --out benchmarks/results/scaling.json")
            parts += [f"### {title}", table(swept, POINT, columns), source]
    return "\n\n".join(parts)


def draw_lines(panel: Any, rows: Rows, sweep: str, value: Callable[[Rows], float]) -> None:
    for plan, label in LABELS.items():
        x, y = line(rows, sweep, value, plan)
        if x:
            panel.plot(x, y, label=label, **LINES[plan])
    panel.set_xlabel(TITLES[sweep])
    panel.legend(fontsize=8)


def draw_sizes(rows: Rows) -> Any:
    drawing, axes = style.figure(2, 2, width=4.6, height=3.3)
    from matplotlib.ticker import LogLocator

    values = ((seconds, "seconds"), (beside_gradients, "MiB beside gradients"))
    for panels, sweep in zip(axes, ("tokens", "vocabulary"), strict=True):
        swept = rows.where(STUDY, sweep=sweep)
        for panel, (value, label) in zip(panels, values, strict=True):
            draw_lines(panel, rows, sweep, value)
            ticks = sorted(swept.distinct(sweep))
            panel.set(xscale="log", yscale="log", ylabel=label, title=f"{label.split()[0]} over {TITLES[sweep]}")
            panel.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:,g}")
        one = [logits(group) for group in swept.groups(sweep)]
        panels[1].plot(swept.distinct(sweep), one, color=style.LIMIT, linewidth=1.2, label="one logits tensor")
        panels[1].set_ylim(top=12 * max(one))  # room for the legend
        panels[1].legend(fontsize=8)
    return drawing


def draw_options(rows: Rows) -> Any:
    drawing, axes = style.figure(2, 2, width=4.6, height=3.3)
    by_k, by_masked, by_budget, by_head = axes.flat
    for panel, sweep in ((by_k, "top_k"), (by_masked, "masked")):
        draw_lines(panel, rows, sweep, seconds)
        panel.set(ylim=(0, None), ylabel="seconds", title=f"seconds over {TITLES[sweep]}")
    budgets = rows.where(STUDY, sweep="budget").groups("plan")
    by_budget.plot([allowed(point) for point in budgets], [seconds(point) for point in budgets], **LINES["recompute"])
    first = budgets[0]
    alone = [seconds(first) * point.get("products") / first.get("products") for point in budgets]
    by_budget.plot([allowed(point) for point in budgets], alone, color=style.LIMIT, linewidth=1.2)
    by_budget.legend(["measured", "by matrix products alone"], fontsize=8)
    by_budget.set(ylim=(0, None), xlabel="memory_budget, MiB", ylabel="seconds", title="seconds over the budget")
    heads = rows.where(STUDY, sweep="frozen").groups("plan")[::-1]
    names = [point[0].variant["plan"].replace(",", ", ") for point in heads]
    bars = by_head.barh(names, [seconds(point) for point in heads], color=style.OURS)
    by_head.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    by_head.grid(axis="y", visible=False)
    by_head.margins(x=0.15)
    by_head.set(xlabel="seconds", title="a frozen head")
    return drawing


TABLES = {"scaling-fits": fits, "scaling-estimates": estimates, "scaling": sweeps}
PLOTS = {"benchmarks/results/scaling.png": draw_sizes, "benchmarks/results/options.png": draw_options}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="default: all")
    args = parser.parse_args()
    for sweep in args.sweep:
        for point in points(sweep, args.threads):
            save(args.out, point)  # a long run that is interrupted keeps what it has


if __name__ == "__main__":
    main()

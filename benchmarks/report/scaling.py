"""The sweeps of `benchmarks.scaling`: tables, fitted slopes and plots."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import style
from benchmarks.report.parts import NOTHING, Plot, caption, source, table

COMMAND = "python -m benchmarks.run --scaling --out benchmarks/results/cpu.json"
LABELS = {"recompute": "recompute", "default": "default budget", "dense": "PyTorch, full logits"}
LINES = {
    "recompute": {"color": style.OURS, "marker": "o"},
    "default": {"color": style.OURS, "marker": "s", "linestyle": "--"},
    "dense": {"color": style.RIVAL, "marker": "^"},
}
AXES = {  # of a sweep: what varies, its name, and how to write a value
    "tokens": ("tokens", "tokens", "{:,}"),
    "vocabulary": ("vocab_size", "vocabulary", "{:,}"),
    "top_k": ("top_k", "K", "{}"),
    "masked": ("masked", "masked fraction", "{:.1%}"),
}
FROZEN = ",frozen"


def seconds(point: dict) -> float:
    """The least of a point's calls: what else runs on a machine only adds."""
    return min(point["seconds"])


def beside_gradients(point: dict) -> float:
    """MiB that a step needs and does not return."""
    return point["peak_mib"] - point["gradient_mib"]


def exponent(points: Sequence[dict], axis: str) -> tuple[float, float]:
    """`(a, d)`: seconds are proportional to `axis ** a` but for a factor within `1 + d` or its inverse."""
    x, y = ([math.log(value) for value in values] for values in columns(points, axis, seconds))
    fit = statistics.linear_regression(x, y)
    off = max(abs(b - fit.slope * a - fit.intercept) for a, b in zip(x, y, strict=True))
    return fit.slope, math.expm1(off)


def slope(points: Sequence[dict], axis: str, value: Callable[[dict], float]) -> float:
    """Of the least-squares line through `value` over `axis`."""
    return statistics.linear_regression(*columns(points, axis, value)).slope


def columns(points: Sequence[dict], axis: str, value: Callable[[dict], float]) -> tuple[list[float], list[float]]:
    return [point[axis] for point in points], [value(point) for point in points]


def of(sections: dict[str, dict], sweep: str, variant: str) -> list[dict]:
    """The points of one line, none if that sweep was not made."""
    return [point for point in sections.get(sweep, {}).get("points", []) if point["variant"] == variant]


def fits(sections: dict[str, dict]) -> str:
    """The fitted slopes: a row for each, a column for each variant."""

    def power(sweep: str) -> Callable[[list[dict]], str]:
        return lambda points: "{:.2f} (±{:.0%})".format(*exponent(points, AXES[sweep][0]))

    def memory(sweep: str) -> Callable[[list[dict]], str]:
        return lambda points: f"{slope(points, AXES[sweep][0], beside_gradients) * 2**20:,.0f}"

    def per_id(points: list[dict]) -> str:
        without = seconds(points[0])
        fit = statistics.linear_regression(*columns(points, "top_k", seconds))
        off = max(abs(seconds(p) / (fit.intercept + fit.slope * p["top_k"]) - 1) for p in points)
        return f"{fit.slope * 1e3:.2f} ms (±{off:.0%}); 64 ids: {fit.slope * 64 / without:.0%} of K = 0"

    rows = {
        "time ∝ tokens to the power of": ("tokens", power("tokens")),
        "memory beside gradients, bytes a token": ("tokens", memory("tokens")),
        "time ∝ vocabulary to the power of": ("vocabulary", power("vocabulary")),
        "memory beside gradients, bytes a vocabulary entry": ("vocabulary", memory("vocabulary")),
        "time of one more id": ("top_k", per_id),
    }
    lines = []
    for title, (sweep, text) in rows.items():
        lines.append(
            [title, *(text(of(sections, sweep, name)) if of(sections, sweep, name) else NOTHING for name in LABELS)]
        )
    return table(["Fitted", *LABELS.values()], lines)


def sizes(sections: dict[str, dict], sweep: str) -> str:
    """Seconds and memory of every variant over what varies."""
    axis, title, written = AXES[sweep]
    header = [title, "one logits tensor, MiB"]
    measured = [name for name in LABELS if of(sections, sweep, name)]
    for name in measured:
        header += [f"{LABELS[name]}: s", "MiB"]
    rows = []
    for value in dict.fromkeys(point[axis] for point in sections[sweep]["points"]):
        here = {point["variant"]: point for point in sections[sweep]["points"] if point[axis] == value}
        row = [written.format(value), f"{next(iter(here.values()))['logits_mib']:,.0f}"]
        for name in measured:
            found = here.get(name)
            row += [f"{seconds(found):.2f}", f"{beside_gradients(found):,.0f}"] if found else [NOTHING] * 2
        rows.append(row)
    return table(header, rows)


def budget(sections: dict[str, dict], sweep: str) -> str:
    rows = [
        [f"{allowed(point):,.0f}", f"{point['units']:.2f}", f"{seconds(point):.2f}", f"{beside_gradients(point):,.0f}"]
        for point in sections[sweep]["points"]
    ]
    return table(["`memory_budget`, MiB", "matrix products", "s", "MiB"], rows)


def allowed(point: dict) -> float:
    """MiB of a `budget=BYTES`."""
    return int(point["variant"].removeprefix("budget=")) / 2**20


def frozen(sections: dict[str, dict], sweep: str) -> str:
    """Every plan with a trained and with a frozen head."""
    found = {point["variant"]: point for point in sections[sweep]["points"]}
    rows = []
    for name in dict.fromkeys(variant.removesuffix(FROZEN) for variant in found):
        row = [LABELS.get(name, name)]
        for point in (found[name], found[name + FROZEN]):
            products = NOTHING if point["units"] is None else f"{point['units']:.2f}"
            row += [products, f"{seconds(point):.2f}", f"{point['peak_mib']:,.0f}"]
        rows.append([*row, f"{seconds(found[name + FROZEN]) / seconds(found[name]):.2f}"])
    measured = ["matrix products", "s", "MiB with gradients"]
    header = [f"{head}: {what}" for head in ("trained", "frozen") for what in measured]
    return table(["plan", *header, "frozen / trained"], rows)


TITLES: dict[str, tuple[str, Callable[[dict[str, dict], str], str]]] = {
    "tokens": ("Tokens", sizes),
    "vocabulary": ("Vocabulary", sizes),
    "top_k": ("K", sizes),
    "masked": ("Masked fraction", sizes),
    "budget": ("Memory budget: partial retention", budget),
    "frozen": ("Frozen head", frozen),
}


def constants(section: dict) -> str:
    """What a sweep holds fixed, in words."""
    written = {
        "tokens": "{:,} tokens",
        "masked": "{:.0%} masked",
        "vocab_size": "{:,} vocabulary entries",
        "top_k": "K = {}",
    }
    values = {key: {point[key] for point in section["points"]} for key in written}
    fixed = [text.format(*values[key]) for key, text in written.items() if len(values[key]) == 1]
    return ", ".join([f"H = {section['hidden_size']}", "float32", *fixed])


def estimates(sections: dict[str, dict]) -> str:
    """How well the package foresees its peaks."""
    ratios = [
        point["peak_mib"] / point["estimate_mib"]
        for section in sections.values() for point in section["points"] if point["estimate_mib"]
    ]  # fmt: skip
    return (
        f"At the {len(ratios)} points of this package the measured peak was {min(ratios):.2f} to {max(ratios):.2f} "
        "times what `dadpo_kernels.estimate_memory` (`dadpo memory`) says beforehand, "
        f"{statistics.median(ratios):.2f} times in the median."
    )


def markdown(sections: dict[str, dict]) -> str:
    parts = [
        "Forward and backward of DPO + top-K KL on a synthetic peaked head; the times are the least of a point's "
        "calls. Memory is the growth of the resident set over the inputs, without the gradients that are returned "
        "unless it says otherwise. The dense variant is left out where its logits would not fit comfortably.",
        fits(sections),
        "In brackets: the largest distance of a point from the fitted line. A machine may drift in speed: slopes and "
        "single times are no better than that.",
        estimates(sections),
    ]
    parts += [plot.markdown for plot in plots(sections)]
    for sweep, (title, text) in TITLES.items():
        if sweep in sections:
            section = sections[sweep]
            parts += [f"### {title}", f"{constants(section)}.", text(sections, sweep)]
            parts.append(caption(section["environment"], COMMAND.replace("--scaling", f"--scaling {sweep}")))
    return "\n\n".join(parts)


def plots(sections: dict[str, dict]) -> list[Plot]:
    measured = source([section["environment"] for section in sections.values()], COMMAND)
    return [
        Plot("scaling.png", "Time and memory over tokens and vocabulary", sections, measured, draw_sizes),
        Plot("options.png", "Time over K, masked fraction, budget and frozen head", sections, measured, draw_options),
    ]


def draw_lines(panel: Any, sections: dict[str, dict], sweep: str, value: Callable[[dict], float]) -> None:
    axis, title, _ = AXES[sweep]
    for name, label in LABELS.items():
        if points := of(sections, sweep, name):
            panel.plot(*columns(points, axis, value), label=label, **LINES[name])
    panel.set_xlabel(title)
    panel.legend(fontsize=8)


def draw_sizes(sections: dict[str, dict]) -> Any:
    drawing, axes = style.figure(2, 2, width=4.6, height=3.3)
    from matplotlib.ticker import LogLocator

    for row, sweep in zip(axes, ("tokens", "vocabulary"), strict=True):
        axis = AXES[sweep][0]
        if sweep not in sections:
            continue
        for panel, value, label in zip(
            row, (seconds, beside_gradients), ("seconds", "MiB beside gradients"), strict=True
        ):
            draw_lines(panel, sections, sweep, value)
            ticks = sorted({point[axis] for point in sections[sweep]["points"]})
            panel.set(xscale="log", yscale="log", ylabel=label, title=f"{label.split()[0]} over {AXES[sweep][1]}")
            panel.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:,g}")
        logits = {point[axis]: point["logits_mib"] for point in sections[sweep]["points"]}
        row[1].plot(list(logits), list(logits.values()), color=style.LIMIT, linewidth=1.2, label="one logits tensor")
        row[1].set_ylim(top=12 * max(logits.values()))  # room for the legend
        row[1].legend(fontsize=8)
    return drawing


def draw_options(sections: dict[str, dict]) -> Any:
    drawing, axes = style.figure(2, 2, width=4.6, height=3.3)
    by_k, by_masked, by_budget, by_head = axes.flat
    for panel, sweep in ((by_k, "top_k"), (by_masked, "masked")):
        draw_lines(panel, sections, sweep, seconds)
        panel.set(ylim=(0, None), ylabel="seconds", title=f"seconds over {AXES[sweep][1]}")

    points = sections.get("budget", {}).get("points", [])
    by_budget.plot([allowed(point) for point in points], [seconds(point) for point in points], **LINES["recompute"])
    if points:
        products = [seconds(points[0]) * point["units"] / points[0]["units"] for point in points]
        by_budget.plot([allowed(point) for point in points], products, color=style.LIMIT, linewidth=1.2)
        by_budget.legend(["measured", "by matrix products alone"], fontsize=8)
    by_budget.set(ylim=(0, None), xlabel="memory_budget, MiB", ylabel="seconds", title="seconds over the budget")

    heads = sections.get("frozen", {}).get("points", [])
    names = [
        f"{LABELS.get(name, name)}{', frozen' if comma else ''}"
        for name, comma, _ in (p["variant"].partition(",") for p in heads)
    ]
    colors = [style.RIVAL if point["units"] is None else style.OURS for point in heads]
    bars = by_head.barh(names[::-1], [seconds(point) for point in heads][::-1], color=colors[::-1])
    by_head.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    by_head.grid(axis="y", visible=False)
    by_head.margins(x=0.15)
    by_head.set(xlabel="seconds", title="a frozen head")
    return drawing

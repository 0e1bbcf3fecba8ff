"""From the rows of the experiment to tables, a plot and the comparisons the paper's claim rests on."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import style
from benchmarks.rows import Cell, Rows, caption, flat, markdown, table
from benchmarks.studies.recovery.settings import METHODS, STUDY

FIXED = {"teacher": "teacher, sampled again", "pruned": "pruned", "reference": "after SFT, where all start"}
# metric, header, digits, which end is better
COLUMNS = (
    ("preference_rate", "preference rate", 2, "higher"),
    ("teacher_logp", "teacher's log p of the answers", 2, "higher"),
    ("kl", "KL(teacher ‖ student)", 3, "lower"),
    ("reverse_kl", "KL(student ‖ teacher)", 3, "lower"),
    ("nll", "NLL of the teacher's answers", 3, "lower"),
    ("accuracy", "prefers the teacher's answer", 2, "higher"),
    ("distinct_2", "distinct-2", 2, ""),
    ("repetition", "repetition", 3, ""),
    ("answer_tokens", "tokens an answer", 0, ""),
)
COMPARISONS = (("dadpo", "ddpo"), ("dadpo", "dpkd"), ("dadpo+kl", "ddpo"), ("dadpo+kl", "dadpo"), ("sft+kl", "sft"))
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5%, 1 to 9 degrees


def interval(seeds: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (Student's t over seeds)."""
    if len(seeds) < 2:
        return statistics.mean(seeds), float("nan")
    return statistics.mean(seeds), QUANTILES[len(seeds) - 2] * statistics.stdev(seeds) / len(seeds) ** 0.5


def label(line: Rows) -> str:
    method = line[0].variant["method"]
    return FIXED.get(method) or METHODS[method].label


def final(rows: Rows) -> Rows:
    return rows.where(STUDY, stage="final")


def recovery(rows: Rows) -> str:
    source = caption(rows.where(STUDY), "studies.recovery --out benchmarks/results/recovery.json")
    return "\n\n".join([conditions(rows), methods(rows), differences(rows), tuned(rows), source])


def conditions(rows: Rows) -> str:
    rows = rows.where(STUDY)
    names = ("pairs", "epochs", "batch", "seeds", "heldout", "validation")
    lines = [[name, str(rows.get(name, method=None))] for name in names]
    for part in ("training", "measuring"):
        hours = sum(sum(flat(row.value)) for row in rows if row.metric == part) / 3600
        lines.append([f"hours of one core, {part}", f"{hours:.1f}"])
    return markdown(["setting", rows.get("setting", method=None)], lines)


def methods(rows: Rows) -> str:
    """Means ± 95% confidence over seeds (Student's t)."""

    def cell(metric: str, digits: int) -> Cell:
        def text(line: Rows) -> str:
            mean, half = interval(line.get(metric))
            return f"{mean:.{digits}f} ± {half:.{digits}f}" if half > 0 else f"{mean:.{digits}f}"

        return text

    ends = {"higher": " ↑", "lower": " ↓", "": ""}
    columns = [(header + ends[end], cell(metric, digits)) for metric, header, digits, end in COLUMNS]
    return table(final(rows), ["method"], [("", label), *columns])


def differences(rows: Rows) -> str:
    """Paired by seed: the same pairs in the same order, and the same random stream for the answers."""
    lines = []
    for names in COMPARISONS:
        first, second = (final(rows).where(method=name) for name in names)
        cells = []
        for metric, _, digits, end in COLUMNS:
            if end:
                seeds = zip(first.get(metric), second.get(metric), strict=True)
                mean, half = interval([a - b for a, b in seeds])
                better = (mean > 0) == (end == "higher")
                certain = "" if not abs(mean) > half else " **+**" if better else " **-**"
                cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}{certain}")
        lines.append([f"{label(first)} minus {label(second)}", *cells])
    header = ["difference, paired by seed", *(header for _, header, _, end in COLUMNS if end)]
    return markdown(header, lines) + (
        "\n\n**+** better, **-** worse beyond the confidence interval; the rest may be chance."
    )


def tuned(rows: Rows) -> str:
    """KL + reverse KL on the validation pairs: a line for each method, the chosen point in bold."""

    def divergence(point: Rows) -> float:
        return sum(flat([point.get("kl"), point.get("reverse_kl")]))

    lines = []
    for method in rows.where(STUDY, stage="tuning").groups("method"):
        points = method.groups("learning_rate", "beta")
        best, cells = min(map(divergence, points)), []
        for point in points:
            v, value = point[0].variant, divergence(point)
            text = f"{v['learning_rate']:g}{', {:g}'.format(v['beta']) if v['beta'] else ''}: {value:.3f}"
            cells.append(f"**{text}**" if value == best else text)
        lines.append([label(method), *cells])
    header = ["tuning (KL + reverse KL on validation pairs)", *["learning rate, β: value"] * len(lines[0][1:])]
    return markdown(header, lines)


def draw(rows: Rows) -> Any:
    """Mean and confidence interval of four figures for every method, the start as a line."""
    shown = [c for c in COLUMNS if c[0] in ("preference_rate", "kl", "reverse_kl", "nll")]
    drawing, axes = style.figure(1, len(shown), width=3.0, height=2.8, sharey=True)
    lines = [final(rows).where(method=name) for name in METHODS][::-1]
    for axis, (metric, header, _, end) in zip(axes[0], shown, strict=True):
        intervals = [interval(line.get(metric)) for line in lines]
        axis.errorbar(
            [mean for mean, _ in intervals], range(len(lines)), xerr=[half for _, half in intervals], fmt="o",
            color=style.OURS, capsize=3,
        )  # fmt: skip
        start = statistics.mean(final(rows).get(metric, method="reference"))
        axis.axvline(start, color=style.LIMIT, ls="--", lw=1)
        axis.set_title(f"{header}\n({end} is better)", fontsize=9)
    axes[0][0].set_yticks(range(len(lines)), [label(line) for line in lines])
    drawing.supxlabel("dashed: after SFT, where all methods start", fontsize=8)
    return drawing


TABLES = {"recovery": recovery}
PLOTS = {"benchmarks/results/recovery.png": draw}

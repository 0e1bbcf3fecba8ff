"""From the JSON of `benchmarks.restore` to a table, a plot and the comparisons the paper's claim rests on."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import style
from benchmarks.restore.settings import METHODS

FIXED = {"teacher": "teacher, sampled again", "pruned": "pruned", "reference": "after SFT, where all start"}
# column: (figure, header, digits, which end is better)
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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (Student's t over seeds)."""
    if len(values) < 2:
        return statistics.mean(values), float("nan")
    half = QUANTILES[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def figures(results: dict[str, Any], method: str, name: str) -> list[float]:
    """One value a seed, in the seeds' order."""
    return [r["figures"][name] for r in results["runs"] if r["method"] == method]


def label(method: str) -> str:
    return FIXED.get(method) or METHODS[method].label


def markdown(results: dict[str, Any]) -> str:
    """The tables and what was run, for `benchmarks/REPORT.md`."""
    parts = [conditions(results), table(results), differences(results), tuned(results)]
    return "\n\n".join(parts)


def conditions(results: dict[str, Any]) -> str:
    s, e = results["setting"], results["environment"]
    hours = {
        part: sum(r[f"{part}_seconds"] for r in results["tuning"] + results["runs"]) / 3600
        for part in ("training", "measuring")
    }
    return (
        f"Setting `{s['name']}`: {s['pairs']} pairs, {s['epochs']} epoch(s), batches of {s['batch']} pairs, "
        f"{s['seeds']} seeds, {s['heldout']} held-out prompts; tuning on a seed of its own by the sum of both KLs on "
        f"{s['validation']} validation pairs. Measured on the {e['cpu']}, {e['threads']} cores, at commit "
        f"`{e['commit']}`: {hours['training']:.1f} hours of one core for training and {hours['measuring']:.1f} for "
        "measuring, without the stages before; other work on the machine made them longer. Command: "
        f"`python -m benchmarks.restore --setting {s['name']} --results benchmarks/results/restore.json`. Means ± 95% "
        "confidence over seeds (Student's t)."
    )


def table(results: dict[str, Any]) -> str:
    lines = [["", *(f"{header}{' ↑' if end == 'higher' else ' ↓' if end else ''}" for _, header, _, end in COLUMNS)]]
    lines.append(["---"] + ["---:"] * len(COLUMNS))
    for method in [*FIXED, *METHODS]:
        cells = []
        for name, _, digits, _ in COLUMNS:
            mean, half = interval(figures(results, method, name))
            cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}" if half > 0 else f"{mean:.{digits}f}")
        lines.append([label(method), *cells])
    return rows(lines)


def differences(results: dict[str, Any]) -> str:
    """Paired by seed: the same pairs in the same order, and the same random stream for the answers."""
    lines = [["difference, paired by seed", *(header for _, header, _, end in COLUMNS if end)]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for first, second in COMPARISONS:
        cells = []
        for name, _, digits, end in COLUMNS:
            if end:
                pairs = zip(figures(results, first, name), figures(results, second, name), strict=True)
                mean, half = interval([a - b for a, b in pairs])
                better = (mean > 0) == (end == "higher")
                certain = " " if not abs(mean) > half else " **+**" if better else " **-**"
                cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}{certain}".rstrip())
        lines.append([f"{label(first)} minus {label(second)}", *cells])
    return rows(lines) + "\n\n**+** better, **-** worse beyond the confidence interval; the rest may be chance."


def tuned(results: dict[str, Any]) -> str:
    lines = [["tuning (KL + reverse KL on validation pairs)", "points: learning rate, β: value"], ["---", "---"]]
    for method in METHODS:
        tried = [r for r in results["tuning"] if r["method"] == method]
        value = {id(r): r["figures"]["kl"] + r["figures"]["reverse_kl"] for r in tried}
        best = min(value.values())
        points = ", ".join(
            f"{'**' if value[id(r)] == best else ''}{r['point']['learning_rate']:g}"
            + (f", {r['point']['beta']:g}" if r["point"]["beta"] else "")
            + f": {value[id(r)]:.3f}{'**' if value[id(r)] == best else ''}"
            for r in tried
        )
        lines.append([label(method), points])
    return rows(lines)


def rows(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[str, Any]) -> Any:
    """Mean and confidence interval of four figures for every method, the start as a line."""
    shown = [c for c in COLUMNS if c[0] in ("preference_rate", "kl", "reverse_kl", "nll")]
    drawing, axes = style.figure(1, len(shown), width=3.0, height=2.8, sharey=True)
    names = list(METHODS)[::-1]
    for axis, (name, header, _, end) in zip(axes[0], shown, strict=True):
        found = [interval(figures(results, method, name)) for method in names]
        axis.errorbar(
            [mean for mean, _ in found], range(len(names)), xerr=[half for _, half in found], fmt="o",
            color=style.OURS, capsize=3,
        )  # fmt: skip
        axis.axvline(statistics.mean(figures(results, "reference", name)), color=style.LIMIT, ls="--", lw=1)
        axis.set_title(f"{header}\n({end} is better)", fontsize=9)
    axes[0][0].set_yticks(range(len(names)), [label(method) for method in names])
    drawing.supxlabel("dashed: after SFT, where all methods start", fontsize=8)
    return drawing

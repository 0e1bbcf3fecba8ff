"""This package and its peers on one machine: README's table, and its plot."""

import statistics
from typing import Any

from benchmarks import style
from benchmarks.cases import CASES, TOP_K
from benchmarks.report.parts import NOTHING, Plot, source, table

COMMAND = "python -m benchmarks.run --device cpu --out benchmarks/results/cpu.json"
LENGTHS = "python -m benchmarks.run --tokens N --only recompute --out benchmarks/results/cpu.json"
OBJECTIVES = {"dpo": "DPO", "dpo+kl": "DPO + KL", "ce": "CE"}
BEGIN, END = "<!-- benchmark:cpu -->", "<!-- /benchmark:cpu -->"


def replace_between_markers(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `table` between `begin` and `end`; ValueError unless each marker is there once, in this order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file needs one {begin} and, below it, one {end}: put them where the table belongs")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n{table.strip()}\n{end}{tail}"


def tables(comparison: dict[str, dict]) -> str:
    """Markdown: one table per case, dtypes side by side, then the notes that make the figures readable."""
    if not comparison:
        raise ValueError("the file has no comparison section: run benchmarks.run without --scaling first")
    parts = [case_table(sections) for sections in tabled(comparison)]
    return "\n\n".join([*parts, notes(list(comparison.values()))])


def tabled(comparison: dict[str, dict]) -> list[list[dict]]:
    """The sections of each table: one case, its dtypes; a dtype that the processor only emulates stands alone."""
    groups: dict[tuple[str, bool], list[dict]] = {}
    for section in comparison.values():
        groups.setdefault((section["case"], emulated(section)), []).append(section)
    return list(groups.values())


def emulated(section: dict) -> bool:
    return section["floor_dtype"] != section["dtype"]


def case_table(sections: list[dict]) -> str:
    """One case: per dtype the time of DPO, of DPO + KL, peak memory and gradient error."""
    first = sections[0]
    title = f"**{CASES[first['case']]}** (H={first['hidden_size']:,}, V={first['vocab_size']:,})"
    if emulated(first):
        title += f", on a processor without {first['dtype']} products"
    header, seconds, lines = [title], [], []
    for section in sections:
        header += [f"{section['dtype']}: DPO", "DPO + KL", "peak MiB", "grad. error"]
        seconds.append(f"{section['floor_seconds']:.2f} s in {section['floor_dtype']}")
    for label in dict.fromkeys(row["label"] for section in sections for row in section["rows"]):
        line = [label]
        for section in sections:
            line += cells({row["objective"]: row for row in section["rows"] if row["label"] == label})
        lines.append(line)
    floor = f"Time 1 is the floor, three matrix products on the valid tokens: {', '.join(seconds)}. "
    gradients = " and ".join(f"{section['gradient_mib']:.0f}" for section in sections)
    return f"{table(header, lines)}\n\n{floor}Gradients take {gradients} MiB."


def cells(rows: dict[str, dict]) -> list[str]:
    """Time of `dpo` (or of cross-entropy, starred), time of `dpo+kl`, and the fullest objective's memory and error."""
    times = [f"{rows[objective]['ratio']:.2f}" if objective in rows else NOTHING for objective in ("dpo", "dpo+kl")]
    if "ce" in rows:
        times[0] += f" (CE: {rows['ce']['ratio']:.2f}\\*)"
    fullest = rows.get("dpo+kl") or rows.get("dpo")
    if fullest is None:
        return [*times, NOTHING, NOTHING]
    return [*times, f"{peak(fullest):,.0f}", f"{gradient_error(fullest):.1e}"]


def peak(row: dict) -> float:
    return statistics.median(row["peak_mib"])


def gradient_error(row: dict) -> float:
    """The worse of both gradients' relative errors against float64."""
    return max(row[key] for key in ("hidden_grad_error", "weight_grad_error") if row[key] is not None)


def notes(sections: list[dict]) -> str:
    first = sections[0]
    return (
        f"Forward and backward, {first['tokens']:,} tokens in two pairs, of which {first['valid_tokens']:,} are "
        "answer tokens; every variant in a process of its own, in turn, medians. Memory is the growth of the resident "
        "set over the inputs, gradients included. The gradient's error is relative, against float64. "
        "\\* plain cross-entropy on the same tokens: less work than DPO.\n\n" + "\n\n".join(machines(sections))
    )


def measured_in(section: dict) -> str:
    name = f"{CASES[section['case']].split(',')[0]} in {section['dtype']}"
    return f"{name} without instructions for it" if emulated(section) else name


def machines(sections: list[dict]) -> list[str]:
    """A line for each machine, with what was measured there if there are several; ratios are to the floor there."""
    groups: dict[str, list[dict]] = {}
    for section in sections:
        e = section["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        machine = f"{e['cpu']} ({e['cpu_capability']}), {e['threads']} threads; Python {e['python']}, {versions}"
        groups.setdefault(machine, []).append(section)
    lines = []
    for machine, here in groups.items():
        measured = ", ".join(map(measured_in, here))
        dates, commits = (", ".join(dict.fromkeys(s["environment"][key] for s in here)) for key in ("date", "commit"))
        lines.append(f"{measured + ': ' if len(groups) > 1 else ''}{machine}; {dates}, commit {commits}.")
    return lines


def draw(comparison: dict[str, dict]) -> Any:
    """One panel per section: time of the fullest objective that each variant computes, as multiples of the floor."""
    columns = max(map(len, tabled(comparison)))
    rows = -(-len(comparison) // columns)
    drawing, axes = style.figure(rows, columns, width=5.6, height=3.4)
    for panel in axes.flat[len(comparison) :]:
        panel.remove()
    for panel, section in zip(axes.flat, comparison.values(), strict=False):
        shown = {}
        for row in section["rows"]:
            if row["objective"] != "ce" and not row["frozen"]:  # CE alone and a frozen head are other, smaller tasks
                shown[row["label"]] = row  # of one variant, `dpo+kl` comes after `dpo`
        shown = dict(sorted(shown.items(), key=lambda item: -item[1]["ratio"]))
        ratios = [row["ratio"] for row in shown.values()]
        names = [label + (" + KL" if row["objective"] == "dpo+kl" else "") for label, row in shown.items()]
        bars = panel.barh(names, ratios, color=[style.OURS if row["ours"] else style.RIVAL for row in shown.values()])
        text = [f"{row['ratio']:.2f}   {peak(row):,.0f} MiB" for row in shown.values()]
        panel.bar_label(bars, text, padding=3, fontsize=8)
        panel.axvline(1, color=style.LIMIT, linewidth=1.2)
        panel.set_xlim(0, 1.3 * max(ratios))
        panel.grid(axis="y", visible=False)
        panel.set_title(measured_in(section))
        panel.set_xlabel("time / three matrix products (red), and peak memory")
    return drawing


def plots(comparison: dict[str, dict]) -> list[Plot]:
    measured = source([section["environment"] for section in comparison.values()], COMMAND)
    return [Plot("cpu.png", "Time and memory of every variant", comparison, measured, draw)]


def lengths(sections: dict[str, dict]) -> str:
    """Time and memory over the number of tokens."""
    rows, ordered = [], sorted(sections.values(), key=lambda section: section["tokens"])
    for section in ordered:
        for row in section["rows"]:
            head = [CASES[section["case"]].split(",")[0], section["dtype"], row["label"], OBJECTIVES[row["objective"]]]
            beside = f"{peak(row) - section['gradient_mib']:,.0f}"
            rows.append(
                [*head, f"{section['tokens']:,}", f"{section['valid_tokens']:,}", f"{row['ratio']:.2f}", beside]
            )
    header = ["head", "dtype", "variant", "loss", "tokens", "answer tokens", "time / floor", "MiB beside gradients"]
    measured = source([section["environment"] for section in ordered], f"`{LENGTHS}`")
    return f"{table(header, rows)}\n\nMeasured on {measured}."


def markdown(comparison: dict[str, dict]) -> str:
    """README's tables, how peaked the softmax was that they were measured on, and the plot."""
    peaked = [
        f"* {CASES[section['case']]}, {section['dtype']}: mean probability of the label "
        "{label_probability:.2f}, mean top-{k} mass {topk_mass:.2f}".format(**section["peakedness"], k=TOP_K)
        for section in comparison.values()
    ]
    drawn = [plot.markdown for plot in plots(comparison)]
    return "\n\n".join(
        [tables(comparison), f"Command: `{COMMAND}`", "The softmax of the teacher:", "\n".join(peaked), *drawn]
    )

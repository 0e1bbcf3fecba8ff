"""This package and its peers on one machine: the tables of `benchmarks.run`, and their plot."""

from typing import Any

from benchmarks import style
from benchmarks.cases import CASES, TOP_K
from benchmarks.rows import NOTHING, Cell, Rows, caption, machines, middle, of, show, table
from benchmarks.run import STUDY, TOKENS
from benchmarks.variants import VARIANTS

PROBLEM = ("tokens", "head", "dtype", "floor")
LOSSES = {"dpo": "DPO", "dpo+kl": "DPO + KL", "ce": "CE"}


def emulated(section: Rows) -> bool:
    """A dtype for which the processor has no products: it stands in a table of its own."""
    return section[0].variant["floor"] != section[0].variant["dtype"]


def sections(rows: Rows) -> list[Rows]:
    return rows.where(STUDY, tokens=TOKENS).groups("head", "dtype", "floor")


def comparison(rows: Rows) -> str:
    """A table for each head, dtypes side by side, then the notes that make the figures readable."""
    tables: dict[tuple[str, bool], list[Rows]] = {}
    for section in sections(rows):
        tables.setdefault((section[0].variant["head"], emulated(section)), []).append(section)
    valid = sections(rows)[0].get("valid_tokens", plan=None)
    note = (
        f"Forward and backward, {TOKENS:,} tokens in two pairs, of which {valid:,} are answer tokens; every variant "
        "in a process of its own, in turn, medians. Memory is the growth of the resident set over the inputs, "
        "gradients included. The gradient's error is relative, against float64. \\* plain cross-entropy on the same "
        "tokens: less work than DPO."
    )
    return "\n\n".join([*map(of_head, tables.values()), note, *measured_on(rows)])


def summary(rows: Rows) -> str:
    """The first head alone, in the dtypes for which the processor has products."""
    head = sections(rows)[0][0].variant["head"]
    return comparison(Rows(row for row in rows.where(STUDY, head=head) if not emulated(Rows([row]))))


def of_head(dtypes: list[Rows]) -> str:
    """Per dtype the time of DPO, of DPO + KL, peak memory and gradient error of the fuller loss."""
    first, title = dtypes[0], ""
    if emulated(first):
        title = f", on a processor without {first[0].variant['dtype']} products"
    sizes = (first.get(metric, plan=None) for metric in ("width", "vocabulary"))
    title = "**{}** (H={:,}, V={:,}){}".format(CASES[first[0].variant["head"]], *sizes, title)
    columns: list[tuple[str, Cell]] = [(title, label)]
    times, gradients = [], []
    for section in dtypes:
        dtype, floor = (section[0].variant[key] for key in ("dtype", "floor"))

        def in_dtype(cell: Cell, dtype=dtype, floor=floor) -> Cell:
            return lambda line: cell(line.where(dtype=dtype, floor=floor))

        columns += [
            (f"{dtype}: DPO", in_dtype(dpo)),
            ("DPO + KL", in_dtype(show("ratio", ".2f", loss="dpo+kl"))),
            ("peak MiB", in_dtype(lambda line: show("peak", ",.0f")(fullest(line)))),
            ("grad. error", in_dtype(lambda line: error(fullest(line)))),
        ]
        times.append(f"{section.get('floor', plan=None, product=None):.2f} s in {floor}")
        gradients.append(f"{section.get('gradients'):.0f}")
    floor = f"Time 1 is the floor, three matrix products on the valid tokens: {', '.join(times)}. "
    lines = Rows(row for section in dtypes for row in section)
    return f"{table(lines, ['plan'], columns)}\n\n{floor}Gradients take {' and '.join(gradients)} MiB."


def label(line: Rows) -> str:
    return VARIANTS[line[0].variant["plan"]].label


def dpo(line: Rows) -> str:
    """Its time, and that of cross-entropy, starred."""
    alone = line.get("ratio", loss="ce")
    return (show("ratio", ".2f", loss="dpo")(line) or NOTHING) + (f" (CE: {alone:.2f}\\*)" if alone else "")


def fullest(line: Rows) -> Rows:
    """The rows of the loss that computes most. CE alone is another, smaller task."""
    return line.where(loss="dpo+kl") or line.where(loss="dpo")


def error(line: Rows) -> str | None:
    """The worse of both gradients' relative errors against float64."""
    errors = [value for key in ("hidden", "weight") if (value := line.get(f"{key}_grad_error")) is not None]
    return f"{max(errors):.1e}" if errors else None


def measured_in(section: Rows) -> str:
    name = f"{CASES[section[0].variant['head']].split(',')[0]} in {section[0].variant['dtype']}"
    return f"{name} without instructions for it" if emulated(section) else name


def measured_on(rows: Rows) -> list[str]:
    """A line for each machine, with what was measured there if there are several; ratios are to the floor there."""
    by_machine = machines(rows.where(STUDY, tokens=TOKENS))
    names = (
        ", ".join(map(measured_in, sections(part))) + ": " if len(by_machine) > 1 else ""
        for part in by_machine.values()
    )
    return [f"{name}{machine}." for name, machine in zip(names, by_machine, strict=True)]


def softmax(rows: Rows) -> str:
    """How peaked the teacher's softmax was."""
    columns = [
        ("softmax of the teacher", measured_in),
        ("mean probability of the label", show("label_probability", ".2f")),
        (f"mean top-{TOP_K} mass", show("topk_mass", ".2f")),
    ]
    return table(rows.where(STUDY, tokens=TOKENS, plan=None), ["head", "dtype", "floor"], columns)


def lengths(rows: Rows) -> str:
    """Time and memory over the number of tokens."""
    rows = Rows(row for row in rows.where(STUDY) if row.variant["tokens"] != TOKENS)

    def whole(line: Rows, metric: str) -> float:
        """Of all variants of a line's problem."""
        return rows.get(metric, plan=None, **{key: line[0].variant[key] for key in PROBLEM})

    columns: list[tuple[str, Cell]] = [
        ("variant", label),
        ("head", measured_in),
        ("loss", lambda line: LOSSES[line[0].variant["loss"]]),
        ("tokens", of("tokens", ",")),
        ("answer tokens", lambda line: f"{whole(line, 'valid_tokens'):,}"),
        ("time / floor", show("ratio", ".2f")),
        ("MiB beside gradients", lambda line: f"{middle(line.get('peak')) - whole(line, 'gradients'):,.0f}"),
    ]
    source = caption(rows, "run --tokens N --only recompute --out benchmarks/results/cpu.json")
    return f"{table(rows, ['plan', 'loss', 'tokens', 'head', 'dtype', 'floor'], columns)}\n\n{source}"


def draw(rows: Rows) -> Any:
    """One panel per section: time of the fullest loss that each variant computes, as multiples of the floor."""
    parts = sections(rows)
    drawing, axes = style.figure(-(-len(parts) // 2), 2, width=5.6, height=3.4)
    for panel in axes.flat[len(parts) :]:
        panel.remove()
    for panel, section in zip(axes.flat, parts, strict=False):
        plans = [line for line in section.groups("plan") if not VARIANTS[line[0].variant["plan"]].frozen]
        shown = [line for plan in plans if (line := fullest(plan))]
        shown.sort(key=lambda line: -line.get("ratio"))
        ratios = [line.get("ratio") for line in shown]
        names = [label(line) + (" + KL" if line[0].variant["loss"] == "dpo+kl" else "") for line in shown]
        ours = [VARIANTS[line[0].variant["plan"]].ours for line in shown]
        bars = panel.barh(names, ratios, color=[style.OURS if is_ours else style.RIVAL for is_ours in ours])
        text = [f"{line.get('ratio'):.2f}   {middle(line.get('peak')):,.0f} MiB" for line in shown]
        panel.bar_label(bars, text, padding=3, fontsize=8)
        panel.axvline(1, color=style.LIMIT, linewidth=1.2)
        panel.set_xlim(0, 1.3 * max(ratios))
        panel.grid(axis="y", visible=False)
        panel.set_title(measured_in(section))
        panel.set_xlabel("time / three matrix products (red), and peak memory")
    return drawing


TABLES = {"comparison": comparison, "comparison-summary": summary, "softmax": softmax, "lengths": lengths}
PLOTS = {"benchmarks/results/cpu.png": draw}

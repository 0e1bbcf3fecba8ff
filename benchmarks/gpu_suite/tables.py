"""Tables, and a plot with `--plot`, from a file of the suite: `python -m benchmarks.gpu_suite.tables FILE.json`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import style
from benchmarks.gpu_suite import cost_model
from benchmarks.gpu_suite.runner import complaints
from benchmarks.gpu_suite.settings import REPEATS, SHAPES, TOKENS, TOP_K
from benchmarks.rows import NOTHING, markdown

# What the backends are built for, on an H100: milliseconds of a step with 64 top-k ids and 8,192 tokens; a step over
# its three products, where H is WIDE or more; bytes beside the gradients (and the exponentials, if they are retained);
# a row pass over the copy.
MILLISECONDS = {
    ("Llama-3-8B", "retain"): 42,
    ("Llama-3-8B", "recompute"): 55,
    ("Qwen2.5-0.5B", "retain"): 12,
    ("Qwen2.5-0.5B", "recompute"): 16,
}
STEP, WIDE, ROOM, PASS = {"retain": 1.15, "recompute": 1.45}, 3072, 300 * 2**20, 0.85


def listed(columns: Sequence[str], rows: Sequence[dict]) -> str:
    return markdown(columns, [[cell(row.get(column)) for column in columns] for row in rows])


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def readable(row: dict) -> dict:
    """Seconds to ms, flops to TFLOP/s, bytes to MiB or GB/s, with the unit in the name."""
    out = {}
    for name, value in row.items():
        if value is None:
            continue
        if name.endswith("seconds"):
            out[name.replace("seconds", "ms").replace("_", " ")] = value * 1e3
        elif name == "bytes_per_second":
            out["GB/s"] = value / 1e9
        elif name.endswith("flops"):
            out[name.replace("flops", "TFLOP/s").replace("_", " ")] = value / 1e12
        elif "bytes" in name:
            out[name.replace("bytes", "MiB").replace("_", " ")] = value / 2**20
        else:
            out[name.replace("_", " ")] = value
    return out


def rows_of(results: dict, *stages: str) -> list[dict]:
    return [row for name in stages for row in results["stages"].get(name, {"rows": []})["rows"]]


STEPS = ("table", "rivals", "quack")  # the stages that measure whole steps
COMPARED = ("times the products", "predicted ms", "measured / predicted")


def timed_steps(results: dict) -> list[dict]:
    return [row for row in rows_of(results, *STEPS) if "top_k" in row and "both_seconds" in row]


def heads(results: dict) -> dict[str, dict]:
    """By shape, the row of its three products alone."""
    return {row["shape"]: row for row in rows_of(results, *STEPS) if "width" in row}


def plan_of(row: dict) -> tuple[str, str] | None:
    """`(backend, plan)` of a step of ours."""
    ours, _, rest = row.get("name", "").partition("dadpo-kernels ")
    backend, _, plan = rest.partition(", ")
    return None if ours or plan not in STEP or "top_k" not in row else (backend, plan)


def compared(row: dict, results: dict) -> dict:
    """A step's time over its three products, and beside what the cost model predicted."""
    head, gpu = heads(results).get(row.get("shape", "")), cost_model.gpu_named(results["environment"]["device"])
    if head is None or "both_seconds" not in row:
        return {}
    sizes, out = (head["tokens"], head["width"], head["vocab"]), {}
    if "top_k" in row and "both_seconds" in head:
        out["times the products"] = row["both_seconds"] / head["both_seconds"]
    if gpu and row is head:
        out["predicted ms"] = cost_model.three_products(gpu, *sizes) * 1e3
    elif gpu and (plan := plan_of(row)):
        out["predicted ms"] = cost_model.step(gpu, *plan, *sizes, row["top_k"]) * 1e3
    if "predicted ms" in out:
        out["measured / predicted"] = row["both_seconds"] * 1e3 / out["predicted ms"]
    return out


def misses(results: dict) -> list[str]:
    """What the cost model did not foresee, furthest first: the next thing to understand."""
    missed = []
    for row in rows_of(results, *STEPS):
        ratio = compared(row, results).get("measured / predicted", 1)
        if abs(ratio - 1) > cost_model.MISS:
            what = f"{row['shape']}, {row['name']}" + (f", K = {row['top_k']}" if "top_k" in row else "")
            missed.append((abs(ratio - 1), f"{what}: {ratio:.2f} of the prediction"))
    return [text for _, text in sorted(missed, reverse=True)]


def goals(results: dict) -> list[dict]:
    """Every measured figure that has a goal, and whether it reaches it."""
    figures, known = [], heads(results)
    on_h100 = cost_model.gpu_named(results["environment"]["device"]) is cost_model.GPUS["H100"]

    def add(goal: str, of: str, measured: float, limit: float, reached: bool) -> None:
        figures.append({"goal": goal, "of": of, "measured": measured, "limit": limit, "reached": reached})

    for row in rows_of(results, "table"):
        plan, head = plan_of(row), known.get(row.get("shape", ""))
        if plan is None or head is None or "both_seconds" not in row:
            continue
        ratio = compared(row, results).get("times the products")
        of = f"{row['shape']}, K = {row['top_k']}{', half masked' if row['masked'] else ''}: {row['name']}"
        meant = on_h100 and row["top_k"] and not row["masked"]
        if limit := MILLISECONDS.get((row["shape"], plan[1])) if meant else None:
            time = row["both_seconds"] * 1e3
            add("step on an H100, ms, at most", of, time, limit, time <= limit)
        if head["width"] >= WIDE and ratio is not None:
            add("step, times the products, at most", of, ratio, STEP[plan[1]], ratio <= STEP[plan[1]])
        peak = row["peak_bytes_above_gradients"]
        if peak is not None:
            room = ROOM + (2 * head["tokens"] * head["vocab"] if plan[1] == "retain" else 0)
            add("MiB beside gradients, at most", of, peak / 2**20, room / 2**20, peak <= room)
    for row in rows_of(results, "passes"):
        if "of_copy" in row:
            of = f"{row['backend']}, {row['pass']}"
            add("row pass, share of the copy, at least", of, row["of_copy"], PASS, row["of_copy"] >= PASS)
    return figures


def flat(row: dict, more: dict) -> list[dict]:
    """A row and what is known beside it, readable; of a profile, a row for each of its kernels too."""
    kernels = row["kernels"] if isinstance(row.get("kernels"), list) else []
    first = {name: value for name, value in row.items() if name != "kernels" or not kernels}
    listed = [
        {"shape": row["shape"], "name": row["name"], "kernel": name, "calls": calls, "seconds": time,
         "share": time / max(row["all_kernels_seconds"], 1e-12)}
        for name, calls, time in kernels
    ]  # fmt: skip
    return [readable(first) | more, *map(readable, listed)]


def report(results: dict, only: Sequence[str] = ()) -> str:
    """Tables of all stages, or of some; the goals last."""
    environment = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    parts = [f"{environment['device']}; {versions}; {environment['date']}, commit {environment['commit']}"]
    for name, stage in results["stages"].items():
        if only and name not in only:
            continue
        rows = [part for row in stage["rows"] for part in flat(row, compared(row, results))]
        columns = list(dict.fromkeys(column for row in rows for column in row if column not in COMPARED))
        columns += [column for column in COMPARED if any(column in row for row in rows)]
        parts.append(f"### {name} ({stage['status']}; {stage['seconds']:.0f} of {stage['limit']:.0f} s)")
        if rows:
            parts.append(listed(columns, rows))
    if wrong := complaints(results):
        parts += ["### failures", "\n".join(f"- {line}" for line in wrong)]
    if missed := misses(results):
        parts += [f"### further than {cost_model.MISS:.0%} from the cost model", "\n".join(f"- {m}" for m in missed)]
    if figures := goals(results):
        parts += ["### goals", listed(list(figures[0]), figures)]
    return "\n\n".join(parts) + "\n"


def readme(files: Sequence[dict]) -> str:
    """The table for README: the faster backend of each plan, beside the products and rivals of the same run."""
    files = [results for results in files if "table" in results["stages"]]
    if not files:
        header = ["GPU, bfloat16, 8,192 answer tokens", "retain", "recompute", "rivals"]
        return markdown(header, [[", ".join(shape.name for shape in SHAPES), *["not measured yet"] * 3]])
    return "\n\n".join(readme_table(results) for results in files)


def readme_table(results: dict) -> str:
    environment, most = results["environment"], max(TOP_K)
    lines = []
    for shape, head in heads(results).items():
        timed = [row for row in timed_steps(results) if row["shape"] == shape and not row["masked"]]
        with_ids, alone = ([row for row in timed if bool(row["top_k"]) == wanted] for wanted in (True, False))
        ours = [row for row in with_ids if plan_of(row)]
        cells = [
            fastest([head]),
            *(fastest([row for row in ours if plan_of(row)[1] == plan], head) for plan in STEP),
            fastest([row for row in with_ids if not plan_of(row)], head),
            fastest([row for row in alone if plan_of(row)], head),
            fastest([row for row in alone if not plan_of(row)], head),
        ]
        lines.append([f"{shape} (H={head['width']:,}, V={head['vocab']:,})", *cells])
    header = [
        f"{environment['device']}, bfloat16, {TOKENS:,} answer tokens", "three products",
        f"label + top-{most} + tail: retain", "recompute", "PyTorch, full logits", "label alone: ours",
        "fastest rival",
    ]  # fmt: skip
    note = f"Forward and backward, ms and in brackets times the three products; medians of {REPEATS}; commit "
    return markdown(header, lines) + f"\n\n{note}{environment['commit']}, {environment['date']}."


def fastest(rows: Sequence[dict], head: dict | None = None) -> str:
    """`45.1 (1.35, triton)` of the fastest of these rows."""
    rows = [row for row in rows if "both_seconds" in row]
    if not rows:
        return NOTHING
    row = min(rows, key=lambda row: row["both_seconds"])
    time = f"{row['both_seconds'] * 1e3:.1f}"
    if head is None or "both_seconds" not in head:
        return time
    plan = plan_of(row)
    return f"{time} ({row['both_seconds'] / head['both_seconds']:.2f}, {plan[0] if plan else row['name']})"


def drawable(results: dict) -> bool:
    return any(not row["masked"] for row in timed_steps(results))


def draw(results: dict) -> Any:
    """Forward with backward of everyone, a panel for each shape, without top-k ids where there are such rows.

    A line marks what the three matrix products alone take.
    """
    rows = [row for row in timed_steps(results) if not row["masked"]]
    least, known = min(row["top_k"] for row in rows), heads(results)
    shapes = list(dict.fromkeys(row["shape"] for row in rows if row["top_k"] == least))
    drawing, axes = style.figure(len(shapes), 1)
    for panel, shape in zip(axes.flat, shapes, strict=True):
        shown = [row for row in rows if row["shape"] == shape and row["top_k"] == least]
        shown.sort(key=lambda row: -row["both_seconds"])
        colors = [style.OURS if row["name"].startswith("dadpo") else style.RIVAL for row in shown]
        bars = panel.barh([row["name"] for row in shown], [row["both_seconds"] * 1e3 for row in shown], color=colors)
        panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        if "both_seconds" in known.get(shape, {}):
            panel.axvline(known[shape]["both_seconds"] * 1e3, color=style.LIMIT)
        panel.set(title=f"{shape}, K = {least}", xlabel="forward and backward, ms")
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG file to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    print(report(results))
    if args.plot:
        style.save(draw(results), args.plot)


if __name__ == "__main__":
    main()

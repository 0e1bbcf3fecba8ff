"""Tables, and a plot with `--plot`, from a file of the suite: `python -m benchmarks.gpu_suite.tables gpu.json`."""

import argparse
import json
from pathlib import Path
from typing import Any

from .. import style

# What the backends are built for. A step over its three products, where H is WIDE or more; bytes beside the gradients
# (and the exponentials, if they are retained); a row pass over the copy.
STEP, WIDE, ROOM, PASS = {"retain": 1.15, "recompute": 1.55}, 3072, 300 * 2**20, 0.85


def markdown(columns: list[str], rows: list[dict]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


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


def floors(results: dict) -> dict[str, float]:
    """Seconds that the three matrix products of a shape take alone."""
    rows = results["stages"].get("table", {"rows": []})["rows"]
    return {row["shape"]: row["both_seconds"] for row in rows if "top_k" not in row and "both_seconds" in row}


def over_floor(row: dict, floor: dict[str, float]) -> dict:
    known = "top_k" in row and "both_seconds" in row and row["shape"] in floor
    return {"times the products": row["both_seconds"] / floor[row["shape"]]} if known else {}


def goals(results: dict) -> list[dict]:
    """Every measured figure that has a goal, and whether it reaches it."""
    found, floor = [], floors(results)
    rows = {name: stage["rows"] for name, stage in results["stages"].items()}
    heads = {row["shape"]: row for row in rows.get("table", []) if "width" in row}

    def add(goal: str, of: str, measured: float, limit: float, reached: bool) -> None:
        found.append({"goal": goal, "of": of, "measured": measured, "limit": limit, "reached": reached})

    for row in rows.get("table", []):
        plan = row["name"].rpartition(", ")[2]
        if plan not in STEP or row["shape"] not in heads or "both_seconds" not in row:
            continue
        head, ratio = heads[row["shape"]], over_floor(row, floor).get("times the products")
        of = f"{row['shape']}, K = {row['top_k']}{', half masked' if row['masked'] else ''}: {row['name']}"
        if head["width"] >= WIDE and ratio is not None:
            add("step, times the products, at most", of, ratio, STEP[plan], ratio <= STEP[plan])
        peak = row["peak_bytes_above_gradients"]
        if peak is not None:
            room = ROOM + (2 * head["tokens"] * head["vocab"] if plan == "retain" else 0)
            add("MiB beside gradients, at most", of, peak / 2**20, room / 2**20, peak <= room)
    for row in rows.get("row_passes", []):
        if "of_copy" in row:
            of = f"{row['backend']}, {row['pass']}"
            add("row pass, share of the copy, at least", of, row["of_copy"], PASS, row["of_copy"] >= PASS)
    return found


def report(results: dict) -> str:
    environment, floor = results["environment"], floors(results)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    parts = [f"{environment['device']}; {versions}; {environment['date']}, commit {environment['commit']}"]
    for name, stage in results["stages"].items():
        rows = [readable(row) | over_floor(row, floor) for row in stage["rows"]]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        parts.append(f"### {name.replace('_', ' ')} ({stage['status']})")
        if rows:
            parts.append(markdown(columns, rows))
    if found := goals(results):
        parts += ["### goals", markdown(list(found[0]), found)]
    return "\n\n".join(parts) + "\n"


def draw(results: dict) -> Any:
    """Forward with backward of everyone, a panel for each shape, without top-k ids where there are such rows.

    A line marks what the three matrix products alone take.
    """
    timed = [row for name in ("table", "compiled") for row in results["stages"].get(name, {"rows": []})["rows"]]
    timed, floor = [row for row in timed if "both_seconds" in row], floors(results)
    rows = [row for row in timed if "top_k" in row and not row["masked"]]
    least = min(row["top_k"] for row in rows)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    drawing, axes = style.figure(len(shapes), 1)
    for panel, shape in zip(axes.flat, shapes, strict=True):
        shown = [row for row in rows if row["shape"] == shape and row["top_k"] == least]
        shown.sort(key=lambda row: -row["both_seconds"])
        colors = [style.OURS if row["name"].startswith("dadpo") else style.RIVAL for row in shown]
        bars = panel.barh([row["name"] for row in shown], [row["both_seconds"] * 1e3 for row in shown], color=colors)
        panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        if shape in floor:
            panel.axvline(floor[shape] * 1e3, color=style.LIMIT)
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

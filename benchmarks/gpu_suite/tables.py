"""Tables, and a plot with `--plot`, from a file of the suite: `python -m benchmarks.gpu_suite.tables gpu.json`."""

import argparse
import json
from pathlib import Path
from typing import Any

from .. import style


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
            out["TFLOP/s"] = value / 1e12
        elif "bytes" in name:
            out[name.replace("bytes", "MiB").replace("_", " ")] = value / 2**20
        else:
            out[name.replace("_", " ")] = value
    return out


def report(results: dict) -> str:
    environment = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    parts = [f"{environment['device']}; {versions}; {environment['date']}, commit {environment['commit']}"]
    for name, stage in results["stages"].items():
        rows = [readable(row) for row in stage["rows"]]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        parts.append(f"### {name.replace('_', ' ')} ({stage['status']})")
        if rows:
            parts.append(markdown(columns, rows))
    return "\n\n".join(parts) + "\n"


def draw(results: dict) -> Any:
    """Forward with backward of everyone, a panel for each shape, without top-k ids where there are such rows.

    A line marks what the three matrix products alone take.
    """
    timed = [row for name in ("table", "compiled") for row in results["stages"].get(name, {"rows": []})["rows"]]
    timed = [row for row in timed if "both_seconds" in row]
    floors = {row["shape"]: row["both_seconds"] * 1e3 for row in timed if "top_k" not in row}
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
        if shape in floors:
            panel.axvline(floors[shape], color=style.LIMIT)
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

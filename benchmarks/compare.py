"""Two results files side by side: `python -m benchmarks.compare A.json B.json`.

Files of rows (`benchmarks.rows`) or of the GPU suite: what both measured, B over A, for people to read. Times fail
nothing: counts do (`tools.work`).
"""

import argparse
import json
from pathlib import Path

from benchmarks.gpu_suite.tables import timed_steps
from benchmarks.rows import Rows, load, middle


def row_lines(before: Rows, after: Rows) -> list[str]:
    """`study variant: metric` of the rows that have a unit."""
    a, b = (
        {" ".join(map(str, [row.study, *row.variant.values(), row.metric])): row for row in rows if row.unit}
        for rows in (before, after)
    )
    lines = []
    for key in a.keys() & b.keys():
        old, new = middle(a[key].value), middle(b[key].value)
        lines.append(f"{key}: {old:.4g} -> {new:.4g} {a[key].unit} ({new / old if old else 0:.2f}x)")
    return sorted(lines)


def gpu_lines(before: dict, after: dict) -> list[str]:
    """`shape, K, masked, name: time, peak` of what both files of the suite measured."""
    a, b = (
        {
            (row["shape"], f"K={row['top_k']}", "half masked" if row["masked"] else "", row["name"]): row
            for row in timed_steps(file)
        }
        for file in (before, after)
    )  # fmt: skip
    lines = []
    for key in a.keys() & b.keys():
        times = [row[key]["both_seconds"] * 1e3 for row in (a, b)]
        line = f"{' '.join(filter(None, key))}: {times[0]:.2f} -> {times[1]:.2f} ms ({times[1] / times[0]:.2f}x)"
        peaks = [row[key]["peak_bytes_above_gradients"] for row in (a, b)]
        if None not in peaks:
            line += f", peak {peaks[0] / 2**20:.0f} -> {peaks[1] / 2**20:.0f} MiB"
        lines.append(line)
    return sorted(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    files = [json.loads(path.read_text()) for path in (args.before, args.after)]
    if all("stages" in file for file in files):
        lines = gpu_lines(*files)
    else:
        lines = row_lines(load(args.before), load(args.after))
    print("\n".join(lines) or "nothing that both measured")


if __name__ == "__main__":
    main()

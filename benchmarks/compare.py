"""Two results files side by side: `python -m benchmarks.compare A.json B.json`.

Files of `benchmarks.work` (counts): every count of B against A's; exit status 1 if one grew, so that continuous
integration can hold a change against the committed file. Files of `benchmarks.run` or `benchmarks.gpu_suite`
(times): every variant's time and peak memory in B over A's, for people to read; times never fail anything.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.gpu_suite.tables import timed_steps

SLACK = 0.01  # of the counted unit: index arithmetic on a few rows may come and go


def grown(before: dict, after: dict) -> list[str]:
    """One line per count of `after` that is missing in, or larger than in, `before`.

    Raises:
        ValueError: the counts are from different PyTorch versions, whose operations differ inside.
    """
    if before["torch"] != after["torch"]:
        raise ValueError(
            f"counted with torch {before['torch']} and {after['torch']}; count both with the same: "
            "python -m benchmarks.work --out FILE"
        )
    lines = []
    for plan, counts in after["work"].items():
        for name, value in counts.items():
            old = before["work"].get(plan, {}).get(name)
            if old is None:
                lines.append(f"{plan}: {name} is new ({value}): commit a new file")
            elif value > old + SLACK:
                lines.append(f"{plan}: {name} grew from {old} to {value}")
    return lines


def timing_lines(before: dict, after: dict) -> list[str]:
    """`section variant objective: time ratio, memory ratio` of what both files measured."""
    lines = []
    for name in before["comparison"].keys() & after["comparison"].keys():
        a, b = (
            {(row["variant"], row["objective"]): row for row in file["comparison"][name]["rows"]}
            for file in (before, after)
        )
        for key in a.keys() & b.keys():
            times = [row[key]["ratio"] for row in (a, b)]
            peaks = [statistics.median(row[key]["peak_mib"]) for row in (a, b)]
            lines.append(
                f"{name} {' '.join(key)}: time {times[0]:.2f} -> {times[1]:.2f} floors ({times[1] / times[0]:.2f}x), "
                f"peak {peaks[0]:.0f} -> {peaks[1]:.0f} MiB ({peaks[1] / peaks[0]:.2f}x)"
            )
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
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    for kind, compare in (("work", grown), ("comparison", timing_lines), ("stages", gpu_lines)):
        if kind in before and kind in after:
            lines = compare(before, after)
            print("\n".join(lines) or ("nothing grew" if kind == "work" else "nothing that both measured"))
            sys.exit(kind == "work" and bool(lines))
    sys.exit("the files hold no results of the same kind: give two of benchmarks.work, benchmarks.run or gpu_suite")


if __name__ == "__main__":
    main()

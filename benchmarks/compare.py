"""Two results files side by side: `python -m benchmarks.compare A.json B.json`.

Files of rows (`benchmarks.rows`) or of the GPU suite: what both measured, B over A, for people to read. Times fail
nothing: counts do (`tools.work`).
"""

import argparse
import json
from pathlib import Path

from benchmarks.gpu_suite.tables import timed_steps
from benchmarks.rows import Rows, load, measured, middle


def read(path: Path) -> Rows:
    """A file's rows; of the GPU suite's, those of whole steps."""
    content = json.loads(path.read_text())
    if "stages" not in content:
        return load(path)
    rows = Rows()
    for row in timed_steps(content):
        peak = row["peak_bytes_above_gradients"]
        metrics = {"time, ms": row["both_seconds"] * 1e3, "peak, MiB": peak and peak / 2**20}
        variant = {key: row[key] for key in ("shape", "top_k", "masked", "name")}
        rows += measured("gpu", content["environment"], metrics, **variant)
    return rows


def lines(before: Rows, after: Rows) -> list[str]:
    """Of what has a unit, since sizes and losses do not change."""
    a, b = ({(row.study, str(row.variant), row.metric): row for row in rows if row.unit} for rows in (before, after))
    texts = []
    for key in sorted(a.keys() & b.keys()):
        old, new, unit = middle(a[key].value), middle(b[key].value), a[key].unit
        ratio = f"{new / old:.2f}x" if old else "from nothing"
        texts.append(
            f"{' '.join(map(str, a[key].variant.values()))} {key[2]}: {old:.4g} -> {new:.4g} {unit} ({ratio})"
        )
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    print("\n".join(lines(read(args.before), read(args.after))) or "nothing that both measured")


if __name__ == "__main__":
    main()

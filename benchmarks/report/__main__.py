"""README's tables, `benchmarks/REPORT.md` and their plots, from what was measured: `python -m benchmarks.report`.

Every JSON file beside the given one takes part. README's markers must be there already; what stands between them is
rewritten. The plots go beside the results, and each carries a digest of what it was drawn from.
"""

import argparse
from pathlib import Path

from benchmarks import style
from benchmarks.report import comparison, document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("benchmarks/results/cpu.json")
    parser.add_argument("results", type=Path, nargs="?", default=default, help=f"of benchmarks.run ({default})")
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help=f"file with {comparison.BEGIN} and {comparison.END}"
    )
    parser.add_argument("--report", type=Path, default=Path("benchmarks/REPORT.md"), help="file to write")
    args = parser.parse_args()
    results = document.read_results(args.results.parent)
    readme = document.readme(args.readme.read_text(), results, args.results.stem)
    report = document.markdown(results)
    for plot in document.plots(results):
        style.save(plot.draw(plot.data), args.results.parent / plot.name, plot.source, style.digest(plot.data))
    args.readme.write_text(readme)
    args.report.write_text(report)


if __name__ == "__main__":
    main()

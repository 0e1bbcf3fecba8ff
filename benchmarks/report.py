"""The measured tables and plots of README, `benchmarks/REPORT.md` and `docs`: `python -m benchmarks.report`.

A page says with a pair of markers where a table stands (`benchmarks.rows.fill`). Tables of rows are functions of all
rows in `benchmarks/results`; those of the GPU suite and of the compiled kernels have files of their own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import comparison, style
from benchmarks.gpu_suite import tables as gpu
from benchmarks.rows import Rows, fill, is_gpu, load
from benchmarks.studies import capture, live_cost, live_training, phases, scaling, trl_step
from benchmarks.studies.recovery import report as recovery

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = ("README.md", "benchmarks/REPORT.md", "docs/teacher.md", "docs/trainers.md", "docs/triton.md")
GPU_STAGES = ("profiles", "table", "passes", "rivals", "sanitizers", "quack")  # the others are in the files

TABLES: dict[str, Callable[[Rows], str]] = {}
PLOTS: dict[str, Callable[[Rows], Any]] = {}
for module in (comparison, phases, scaling, live_cost, live_training, capture, trl_step, recovery):
    TABLES |= module.TABLES
    PLOTS |= getattr(module, "PLOTS", {})


def gpu_files() -> dict[str, dict]:
    """Of the GPU suite, a file for each device and call: `{name: content}`."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")) if is_gpu(path)}


def gpu_report(files: dict[str, dict]) -> str:
    parts = []
    for name, file in files.items():
        parts.append(gpu.report(file, GPU_STAGES).strip())
        if gpu.drawable(file):
            parts.append(f"![Everyone on {file['environment']['device']}](results/{name}.png)")
    return "\n\n".join(parts) or "Not measured yet: `tools/gpu_suite.sh first`."


def of_kernels(name: str) -> str:
    from tools import static_report  # needs Triton

    return static_report.TABLES[name](json.loads(static_report.COMMITTED.read_text()))


def generated(name: str, rows: Rows) -> str:
    """The table of that name."""
    if name in TABLES:
        return TABLES[name](rows)
    if name.startswith("gpu-"):
        files = gpu_files()
        return gpu.readme(list(files.values())) if name == "gpu-summary" else gpu_report(files)
    return of_kernels(name)


def pages(rows: Rows) -> dict[Path, str]:
    """Every page with the tables of today's results."""
    return {ROOT / page: fill((ROOT / page).read_text(), lambda name: generated(name, rows)) for page in PAGES}


def main() -> None:
    rows = load(RESULTS)
    for path, text in pages(rows).items():
        path.write_text(text)
    for plot, draw in PLOTS.items():
        style.save(draw(rows), ROOT / plot)
    for name, file in gpu_files().items():
        if gpu.drawable(file):
            style.save(gpu.draw(file), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

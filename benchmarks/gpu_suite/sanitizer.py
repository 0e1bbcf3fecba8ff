"""NVIDIA's compute-sanitizer over our kernels: each of its tools on a process that runs a backend's kernels.

`python -m benchmarks.gpu_suite.sanitizer BACKEND` is that process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from .checks import compare_topk, evaluate, problem
from .settings import GPU_BACKENDS, PLANS, Settings
from .task import Task
from .timing import Unavailable

ROOT = Path(__file__).parents[2]
# What cuBLAS has written must be seen as written; in its own barriers racecheck sees races.
TOOLS = {"memcheck": True, "racecheck": True, "initcheck": False}  # whether it looks at our kernels alone
FOUND = 77  # the exit status when the tool found something and the process nothing
# Several blocks share a row or one has it; with entries masked and a width that nothing divides.
CASES = ((torch.bfloat16, 203), (torch.float32, 5))
TRITON_KERNELS = (
    "absorb", "column_sums", "enter_values", "logit_gradient", "restore", "select", "statistics",
)  # fmt: skip
LANES = tuple(f"{backend} {tool}" for backend in GPU_BACKENDS for tool in TOOLS)


def sanitizers(s: Settings, lane: str) -> Iterator[Task]:
    backend, tool = lane.split()
    yield Task(lane, {"backend": backend, "tool": tool}, partial(sanitize, s, backend, tool), 60)


def sanitize(s: Settings, backend: str, tool: str) -> dict:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Unavailable("compute-sanitizer is not on the PATH; it comes with CUDA's toolkit")
    command = [program, "--tool", tool, *(filters(backend) if TOOLS[tool] else ()), "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "benchmarks.gpu_suite.sanitizer", s.backend(backend)]
    # Without PyTorch's cache every tensor is an allocation of its own, whose ends the tools know.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DADPO_AUTOTUNE": "0"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    row = {"ok": done.returncode == 0, "summary": lines[-1].strip("= ") if lines else ""}
    return row if row["ok"] else row | {"error": (done.stdout + done.stderr)[-2000:]}


def filters(backend: str) -> list[str]:
    """Options that name a backend's kernels; CUDA's have the namespace in their mangled names."""
    if backend == "cuda":
        return ["--kernel-name", "kns=dadpo"]
    return [word for name in TRITON_KERNELS for word in ("--kernel-name", f"kne={name}")]


def run_kernels(device: torch.device, backend: str) -> None:
    for dtype, rows in CASES:
        for budget in PLANS.values():
            evaluate(problem("ragged", device, rows), dtype, backend, budget)
        compare_topk(device, dtype, backend, 150)


if __name__ == "__main__":
    run_kernels(torch.device("cuda"), sys.argv[1])

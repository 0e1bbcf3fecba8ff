"""NVIDIA's compute-sanitizer over the CUDA C++ kernels: each of its tools on a process that runs them all once.

`python -m benchmarks.gpu_suite.sanitizer` is that process.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .checks import compare_topk, evaluate, problem
from .contenders import PLANS

ROOT = Path(__file__).parents[2]
OURS = ("--kernel-name", "kns=dadpo")  # a part of their names
# What cuBLAS has written must be seen as written; in its own barriers racecheck sees races.
TOOLS = {"memcheck": OURS, "racecheck": OURS, "initcheck": ()}
FOUND = 77  # the exit status when the tool found something and the process nothing


def sanitizers() -> Iterator[dict]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield {"tool": "none", "skipped": "compute-sanitizer is not on the PATH; it comes with CUDA's toolkit"}
        return
    # Without PyTorch's cache every tensor is an allocation of its own, whose ends the tools know.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, options in TOOLS.items():
        command = [program, "--tool", tool, *options, "--error-exitcode", str(FOUND)]
        command += [sys.executable, "-m", "benchmarks.gpu_suite.sanitizer"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        row = {"tool": tool, "ok": done.returncode == 0, "summary": lines[-1].strip("= ") if lines else ""}
        yield row if row["ok"] else row | {"error": (done.stdout + done.stderr)[-2000:]}


def run_kernels(device: torch.device, backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for rows, budget in itertools.product((5, 203), PLANS.values()):  # several blocks share a row, or one has it
            evaluate(problem("ragged", device, rows), dtype, backend, budget)
        compare_topk(device, dtype, backend, 150)


if __name__ == "__main__":
    run_kernels(torch.device("cuda"), "cuda")

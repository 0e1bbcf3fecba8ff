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
from unittest import mock

import torch

from benchmarks.gpu_suite.checks import compare_topk, evaluate, nth_choice, problem
from benchmarks.gpu_suite.settings import GPU_BACKENDS, PLANS, Settings
from benchmarks.gpu_suite.task import Task
from benchmarks.gpu_suite.timing import Unavailable
from dadpo_kernels.ops.backends import triton_
from dadpo_kernels.ops.backends.tuning import candidates

ROOT = Path(__file__).parents[2]
# What cuBLAS has written must be seen as written; in its own barriers racecheck sees races.
TOOLS = {"memcheck": True, "racecheck": True, "initcheck": False}  # whether it looks at our kernels alone
PORT = 49152  # the first that it may take
FOUND = 77  # the exit status when the tool found something and the process nothing
# A width that nothing divides, and one that takes the larger blocks.
CASES = (("softcap", torch.bfloat16, 203), ("ragged", torch.float32, 5))
TRITON_KERNELS = (
    "column_sums", "exchange", "forward", "logit_gradient", "merge", "repair", "select", "starts",
)  # fmt: skip
LANES = tuple(f"{backend} {tool}" for backend in GPU_BACKENDS for tool in TOOLS)


def sanitizers(s: Settings, lane: str) -> Iterator[Task]:
    backend, tool = lane.split()
    yield Task(lane, {"backend": backend, "tool": tool}, partial(sanitize, s, backend, tool), 60)


def sanitize(s: Settings, backend: str, tool: str) -> dict:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Unavailable("compute-sanitizer is not on the PATH; it comes with CUDA's toolkit")
    # A port of its own, since all run at once; PyTorch's own calls may fail as they like, and take a while to start.
    options = ["--port", str(PORT + 100 * LANES.index(f"{backend} {tool}")), "--launch-timeout", "120"]
    options += ["--target-processes", "application-only", "--error-exitcode", str(FOUND)]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [program, "--tool", tool, *options, *(filters(backend) if TOOLS[tool] else ())]
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
    for case, dtype, rows in CASES:
        for budget in PLANS.values():
            evaluate(problem(case, device, rows), dtype, backend, budget)
        compare_topk(device, dtype, backend, 150)
    if backend == "triton":  # and the other configurations
        capability = 10 * torch.cuda.get_device_properties(device).major
        for choice in range(1, len(candidates("retain", capability // 10, torch.bfloat16, 128))):
            with mock.patch.object(triton_, "choose", nth_choice(choice, capability)):
                for budget in PLANS.values():
                    evaluate(problem("softcap", device), torch.bfloat16, backend, budget)


if __name__ == "__main__":
    run_kernels(torch.device("cuda"), sys.argv[1])

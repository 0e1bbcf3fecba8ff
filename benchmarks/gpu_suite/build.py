"""What has to be compiled before anything can be measured: the extension by nvcc, and Triton's kernels beside it.

Triton compiles a kernel when it is first launched, one after the other, a second or two each. Here many processes
compile every kernel of the suite by the very calls that will launch it, on tensors without memory (`offline.py`), so
that those find it in Triton's cache. What the host compiler makes for a launch is left to the launch.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.gpu_suite.checks import CASES, MASKED, ROWS, TIES, VOCAB, K, nth_choice, width_of
from benchmarks.gpu_suite.settings import SHAPES, TOKENS, TOP_K, Settings
from benchmarks.gpu_suite.task import Task
from benchmarks.gpu_suite.timing import Unavailable
from dadpo_kernels.ops.backends import triton_, tuning
from dadpo_kernels.ops.backends.registry import BACKENDS

ROOT = Path(__file__).parents[2]
PROCESSES = 12


def build(s: Settings, lane: str) -> Iterator[Task]:
    if lane == "extension":
        yield Task(lane, {"what": "extension, by nvcc"}, partial(extension, s), 15)
    else:
        yield Task(lane, {"what": "Triton's kernels"}, partial(compile_all, s), 25)


def extension(s: Settings) -> dict:
    """`dadpo_kernels._cuda` for this device alone, where the package lies."""
    if s.dry:
        raise Unavailable("a dry run leaves what is built as it is")
    major, minor = torch.cuda.get_device_capability()
    only = {"DADPO_CPU": "0", "DADPO_REQUIRE": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{'a' * (major >= 9)}"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=os.environ | only, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    sys.stderr.write(done.stdout)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: ... {done.stdout[-250:]}")
    return {"seconds": time.monotonic() - start}


class Job(NamedTuple):
    """One tile of a backend, all whose passes are compiled, the fused ones with the `choice`-th configuration."""

    backend: str
    dtype: torch.dtype
    rows: int
    columns: int
    width: int
    top_k: int
    best: int = 0
    bias: bool = False
    softcap: bool = False
    choice: int = 0


def jobs(capability: int) -> list[Job]:
    """Every kind of tile that the suite's stages meet, the fixed configurations first: nothing runs without those."""
    bfloat16, width, most = torch.bfloat16, SHAPES[0].width, TOP_K[0]
    lists = [tuning.candidates(kernel, capability // 10, bfloat16, width) for kernel in tuning.CONFIGS]
    needed = [Job("triton", bfloat16, TOKENS, 4096, width, most)]
    valid, vocab = ROWS - len(range(*MASKED.indices(ROWS))), VOCAB
    for backend in ("triton", "triton_rows"):
        tiles = BACKENDS[backend].tiles
        for shape in SHAPES:
            full = tiles.tile_columns(TOKENS, shape.width, bfloat16)
            for columns in (full, shape.vocab % full or full):
                needed += [Job(backend, bfloat16, TOKENS, columns, shape.width, k, best=k) for k in TOP_K]
        for dtype in triton_.DTYPES:
            for case in CASES:
                options = {"bias": True, "softcap": case == "softcap"}
                needed.append(Job(backend, dtype, valid, vocab, width_of(case), K, **options))
            needed += [Job(backend, dtype, ROWS, vocab, 8, 0, best=k) for k in TIES]
    for choice in range(1, max(map(len, lists))):
        needed.append(Job("triton", bfloat16, TOKENS, 4096, width, most, choice=choice))
        for softcap in (False, True):
            needed.append(Job("triton", bfloat16, valid, vocab, width_of("softcap"), K, 0, True, softcap, choice))
    return list(dict.fromkeys(needed))


def compile_job(job: Job, capability: int) -> dict:
    """`{kernel's hash: (name, CompiledKernel)}`"""
    from tools import offline  # needs Triton

    chosen = mock.patch.object(triton_, "choose", nth_choice(job.choice, capability))
    with offline.compiling(capability) as compiled, chosen:
        tiles = offline.problem(
            BACKENDS[job.backend].tiles, job.dtype, rows=job.rows, columns=job.columns, width=job.width,
            top_k=job.top_k, bias=job.bias, softcap=job.softcap, device="meta",
        )  # fmt: skip
        offline.passes(tiles, job.best)
    return compiled


def attempted(capability: int, job: Job) -> tuple[int, float, str]:
    """How many kernels a job met, seconds, and why it failed if it did."""
    start, error, met = time.monotonic(), "", 0
    try:
        met = len(compile_job(job, capability))
    except Exception as reason:
        error = f"{job}: {type(reason).__name__}: {reason}"[:300]
    return met, time.monotonic() - start, error


def compile_all(s: Settings) -> dict:
    """Runs `jobs`; the slowest tells whether more processes would help."""
    if not triton_.INSTALLED:
        raise Unavailable("the package triton is not installed")
    needed = jobs(s.capability)[: 1 if s.dry else None]
    start = time.monotonic()
    with ProcessPoolExecutor(min(PROCESSES, len(needed)), get_context("spawn")) as pool:
        done = list(pool.map(partial(attempted, s.capability), needed))
    met, took, errors = zip(*done, strict=True)
    if any(errors):
        raise RuntimeError(f"{sum(map(bool, errors))} of {len(needed)} jobs: {next(filter(None, errors))}")
    return {
        "kernels": sum(met),
        "slowest_seconds": max(took),
        "seconds": time.monotonic() - start,
    }

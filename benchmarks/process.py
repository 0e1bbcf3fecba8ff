"""A fresh process for every measurement, and the record of what it ran on."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "liger-kernel", "trl", "cut-cross-entropy", "transformers")


def child(inputs: Path, variant: str, threads: int, calls: int, *options: str) -> dict:
    """Measure one variant with `benchmarks.measure` in a fresh process and return what it reports."""
    command = [sys.executable, "-m", "benchmarks.measure", str(inputs), "--variant", variant, "--calls", str(calls)]
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run([*command, *options], cwd=ROOT, env=os.environ | limits, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {variant} {' '.join(options)} ended with exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every program that measures takes: `--out` and `--threads`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="JSON file of rows to write or to update")
    return parser


def environment(threads: int) -> dict:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine()
    )
    return {
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The checkout's commit, `-dirty` where code differs from it (measuring writes results, not code).

    `DADPO_COMMIT` comes first: a tree that was copied to the machine that measures is no checkout.
    """
    if given := os.environ.get("DADPO_COMMIT"):
        return given
    program = shutil.which("git")
    if program is None:
        return "unknown (no git, and DADPO_COMMIT is not set)"
    git = [program, "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown (not a git checkout, and DADPO_COMMIT is not set)"
    code = ["--", ".", ":(exclude)benchmarks/results", ":(exclude)*.md"]
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD", *code]).returncode == 0
    return head.stdout.strip() + ("" if clean else "-dirty")


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

"""Stages in processes of their own, each with a time limit, and one JSON file that is complete at every moment.

    {"environment": {...}, "stages": {name: {"status": STATUS, "rows": [{...}, ...]}}}

STATUS: `complete`, `running`, `out of time`, `not started`, or `exit status N`.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..process import commit

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl")


def environment() -> dict:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_properties() if torch.cuda.is_available() else None
    return {
        "device": gpu.name if gpu else f"CPU, {platform.machine()}",
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "memory_bytes": gpu.total_memory if gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    }


def run_all(limits: dict[str, float], options: Sequence[str], path: Path, seconds: float) -> dict:
    """Runs stages one after the other: each at most its limit, and all together at most `seconds`."""
    results: dict = {"environment": environment(), "stages": {}}
    for name in limits:
        results["stages"][name] = {"status": "not started", "rows": []}
    end = time.monotonic() + seconds
    for name, limit in limits.items():
        left = min(limit, end - time.monotonic())
        if left <= 0:
            continue
        stage = results["stages"][name]
        stage["status"] = "running"
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--stage", name, *options]

        def add(row: dict, stage: dict = stage) -> None:
            stage["rows"].append(row)
            write(path, results)

        stage["status"] = run_child(command, left, add)
        write(path, results)
        print(f"{name}: {stage['status']}, {len(stage['rows'])} rows", file=sys.stderr)
    return results


def complaints(results: dict) -> list[str]:
    """What is wrong with us: a stage that did not end by itself, a check that failed, a call that raised."""
    found = []
    for name, stage in results["stages"].items():
        if stage["status"] != "complete":
            found.append(f"{name}: {stage['status']} after {len(stage['rows'])} rows")
        for row in stage["rows"]:
            rival = name in ("table", "compiled", "end_to_end") and not row["name"].startswith("dadpo-kernels")
            if not row.get("ok", True) or ("error" in row and not rival):
                found.append(f"{name}: {row}")
    return found


def run_child(command: Sequence[str], seconds: float, add: Callable[[dict], None]) -> str:
    """Passes every line of JSON that the command prints to `add`; kills it after `seconds`. Returns the status.

    It is killed with the processes that it started: compilers that live on would hold its output open.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, process_group=0)
    late = threading.Event()

    def kill() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    assert process.stdout is not None  # asked for above
    for line in process.stdout:
        if line.startswith("{") and line.endswith("}\n"):  # libraries print too, and a killed process half a line
            add(json.loads(line))
    code = process.wait()
    timer.cancel()
    return "out of time" if late.is_set() else "complete" if code == 0 else f"exit status {code}"


def write(path: Path, results: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)

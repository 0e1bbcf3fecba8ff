"""Stages in processes of their own, each with a time limit, and one JSON file that is complete at every moment.

    {"environment": {...}, "stages": {name: {"status": STATUS, "seconds": ..., "limit": ..., "rows": [{...}, ...]}}}

STATUS: `complete` (after how many deaths, if any), `running`, `out of time`, `not started`, or why it did not start.
A process that dies or hangs costs the row that it was at and what is left of that row's group.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_suite.task import Stage
from benchmarks.process import commit

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "quack-kernels")
START = 6.0  # seconds until a process has imported PyTorch
CLOSED, TEARDOWN = "closed its output", 10.0  # seconds it may take to end then
PATIENCE = {  # real seconds beyond four times what a task should take, after which a process hangs
    False: 45.0,
    True: 600.0,  # of a dry run, on whatever CPU
}


def environment(dry: bool) -> dict:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_properties() if torch.cuda.is_available() and not dry else None
    return {
        "dry_run": dry,
        "device": gpu.name if gpu else f"dry run on a CPU, {platform.machine()}",
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "memory_bytes": gpu.total_memory if gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    }


class Clock:
    """Seconds since it was made. A planned one runs by what tasks are expected to take instead."""

    def __init__(self, planned: bool) -> None:
        self.planned, self.start, self.planned_seconds = planned, time.monotonic(), 0.0

    def now(self) -> float:
        return self.planned_seconds if self.planned else time.monotonic() - self.start

    def plan(self, seconds: float) -> None:
        self.planned_seconds += seconds


def run_all(stages: dict[str, Stage], options: Sequence[str], path: Path, seconds: float, dry: bool) -> dict:
    """Runs stages one after the other: each at most its limit, and all together at most `seconds`."""
    results: dict = {"environment": environment(dry), "stages": {}}
    for name, stage in stages.items():
        results["stages"][name] = {"status": "not started", "seconds": 0.0, "limit": stage.seconds, "rows": []}
    suite, lock = Clock(dry), threading.Lock()
    for name, stage in stages.items():
        limit = min(stage.seconds, seconds - suite.now())
        if limit <= 0:
            continue
        result = results["stages"][name]

        def add(row: dict, result: dict = result) -> None:
            with lock:
                result["rows"].append(row)
                write(path, results)

        together = Clock(dry)

        def run_in(lane: str, name: str = name, limit: float = limit, add=add, together=together) -> tuple[str, float]:
            clock = Clock(dry) if dry else together
            command = [sys.executable, "-m", "benchmarks.gpu_suite.worker", name, "--lane", lane, *options]
            return run_lane(command, limit, clock, add), clock.now()

        result["status"] = "running"
        with ThreadPoolExecutor(min(len(stage.lanes), os.cpu_count() or 1)) as pool:
            lanes = list(pool.map(run_in, stage.lanes))
        result["status"] = "; ".join(dict.fromkeys(status for status, _ in lanes))
        result["seconds"] = max(taken for _, taken in lanes)
        suite.plan(result["seconds"])
        write(path, results)
        print(
            f"{name}: {result['status']}, {len(result['rows'])} rows in "
            f"{result['seconds']:.0f} of {stage.seconds:.0f} s",
            file=sys.stderr,
        )
    return results


class End(NamedTuple):
    """How a process ended."""

    reason: str
    task: dict | None = None  # what it was at, if it died or hung: the next process goes on behind it


def run_lane(command: Sequence[str], limit: float, clock: Clock, add: Callable[[dict], None]) -> str:
    """Runs the command, again behind every task that ended a process before its time. Returns the status."""
    first, without, deaths = 0, [], 0
    while True:
        options = ["--first", str(first), *(word for group in without for word in ("--without", group))]
        end = run_worker([*command, *options], limit, clock, add)
        if end.task is None:
            return end.reason + (f", processes that died: {deaths}" if deaths else "")
        add(end.task["name"] | {"error": end.reason})
        first, deaths = end.task["begin"] + 1, deaths + 1
        without.append(end.task["group"])


def run_worker(command: Sequence[str], limit: float, clock: Clock, add: Callable[[dict], None]) -> End:
    """Passes the rows of a process to `add`. Kills it after `limit`, or where one task takes far too long.

    It is killed with the processes that it started: compilers that live on would hold its output open.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, process_group=0)
        lines: queue.Queue = queue.Queue()
        threading.Thread(target=pass_lines, args=(process.stdout, lines), daemon=True).start()
        end = follow(lines, limit, clock, add)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TEARDOWN if end.reason == CLOSED else 0)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver, where no signal reaches it
            process.wait(timeout=TEARDOWN)
        log.seek(0)
        said = log.read()
    sys.stderr.write(said)
    if end.reason != CLOSED:
        return end
    if process.returncode == 0:
        return End("complete")
    return End(f"exit status {process.returncode}: {said.strip()[-500:]}", end.task)


def pass_lines(output: Iterable[str], lines: queue.Queue) -> None:
    for line in output:
        lines.put(line)
    lines.put(None)


def follow(lines: queue.Queue, limit: float, clock: Clock, add: Callable[[dict], None]) -> End:
    """Reads what a worker says until it closes its output, is out of time, hangs, or has lost its device."""
    task: dict | None = None
    patience = 3 * PATIENCE[clock.planned]  # to import PyTorch
    while True:
        left = patience if clock.planned else min(patience, limit - clock.now())
        try:
            line = lines.get(timeout=max(left, 0))
        except queue.Empty:
            at = f" at {task['name']}" if task else ""
            if left < patience:
                return End(f"out of time{at}")
            return End(f"hung for {patience:.0f} s", task)
        if line is None:
            return End(CLOSED, task)
        message = parse(line)
        if "ready" in message:
            clock.plan(START)
        elif "begin" in message:
            task = message
        elif "row" in message:
            add(message["row"])
            clock.plan(task["expected"] if task else 0)
            task = None
        elif "lost" in message:
            return End(message["lost"], task)
        patience = PATIENCE[clock.planned] + 4 * (task["expected"] if task else 0)
        if clock.now() > limit:
            return End("out of time")


def parse(line: str) -> dict:
    """A worker's message; nothing, if its process was killed in the middle of the line."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def complaints(results: dict) -> list[str]:
    """What is wrong with us: a stage that did not end by itself, a check that failed, a call that did not run."""
    lines = []
    for name, stage in results["stages"].items():
        if stage["status"] != "complete":
            lines.append(f"{name}: {stage['status']} after {len(stage['rows'])} rows")
        for row in stage["rows"]:
            rival = "name" in row and not row["name"].startswith(("dadpo-kernels", "the three products"))
            missing = "error" in row or ("skipped" in row and not results["environment"]["dry_run"])
            if not row.get("ok", True) or (missing and not rival):
                lines.append(f"{name}: {row}")
    return lines


def write(path: Path, results: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)

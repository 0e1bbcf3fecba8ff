"""The suite that waits for a GPU: its order and limits, what it does when something dies, and its tables, on a CPU."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import process
from benchmarks.gpu_suite import build, checks, kernels, runner, sanitizer, steps, tables, timing
from benchmarks.gpu_suite.__main__ import SECONDS, device_name
from benchmarks.gpu_suite.contenders import RIVALS
from benchmarks.gpu_suite.settings import GPU_BACKENDS, PLANS, SHAPES, TINY, TOP_K, Settings
from benchmarks.gpu_suite.stages import CALLS, STAGES
from benchmarks.gpu_suite.task import Stage
from dadpo_kernels.ops.backends import triton_
from dadpo_kernels.ops.backends.registry import BACKENDS
from tools import offline

ROOT = Path(__file__).parents[2]
DRY = Settings(dry=True)
TOOLS = ("bash", "cat", "dirname", "mkdir", "mktemp", "rm", "tee", "uname", "wc")  # all that the command may need


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with a shell, this Python as python3, and no git."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python3").chmod(0o755)
    return str(folder)


def suite(path, *arguments, **environment):
    without = {name: value for name, value in os.environ.items() if name != "DADPO_COMMIT"}
    return subprocess.run(
        [f"{path}/bash", "tools/gpu_suite.sh", *arguments], cwd=ROOT, env={**without, "PATH": path, **environment},
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_first_call_goes_through_every_stage_within_its_limits(bare_path, tmp_path):
    """As it will on a GPU, without git: the whole command, a clock as planned, tiny problems."""
    done = suite(bare_path, "first", "--dry-run", OUT=str(tmp_path / "out"), WHEELS=str(tmp_path / "none"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["gpu-dry-run-first.json", "gpu-dry-run-first.md", "suite.log"]
    results = json.loads((tmp_path / "out" / files[0]).read_text())
    assert list(results["stages"]) == list(CALLS["first"])
    assert {stage["status"] for stage in results["stages"].values()} == {"complete"}
    assert all(0 < stage["seconds"] <= stage["limit"] for stage in results["stages"].values())
    assert results["environment"]["commit"].startswith("unknown (no git")
    last = done.stdout[done.stdout.index("### goals") :]
    assert "###" not in last[3:]  # nothing behind the goals
    assert last.count("| step, times the products, at most |") == 2 * 5 * len(GPU_BACKENDS)  # Llama twice, and Vicuna
    log = (tmp_path / "out" / "suite.log").read_text()
    assert all(f"{name}: complete" in log for name in CALLS["first"])


def test_limits_fit_into_one_call():
    for stages in CALLS.values():
        assert sum(stage.seconds for stage in stages.values()) <= SECONDS
    assert SECONDS <= 480


def test_tasks_have_names_of_their_own_and_the_most_telling_come_first():
    for name, stage in STAGES.items():
        tasks = [task for lane in stage.lanes for task in stage.tasks(DRY, lane)]
        names = [json.dumps(task.name, sort_keys=True) for task in tasks]
        assert len(set(names)) == len(names) > 0, name
        assert all(task.expected > 0 for task in tasks)
    steps_ = [task.name for task in STAGES["table"].tasks(DRY, "all") if "top_k" in task.name]
    ours = len(GPU_BACKENDS) * len(PLANS)
    assert [(row["shape"], row["top_k"], row["masked"]) for row in steps_[: 3 * ours]] == [
        *[("Llama-3-8B", 64, False)] * ours, *[("Llama-3-8B", 64, True)] * ours, *[("Qwen2.5-0.5B", 64, False)] * ours,
    ]  # fmt: skip
    assert len(steps_) == ours * (len(SHAPES) * len(TOP_K) + 1)
    assert not any("torch" in row["name"] for row in steps_)


WORKER = """
import os, sys, time
import torch
from benchmarks.gpu_suite import worker
from benchmarks.gpu_suite.task import Stage, Task

def lost():
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = raises
    raises()

def raises():
    raise RuntimeError("an illegal memory access was encountered")

def tasks(settings, lane):
    acts = {"fine": lambda: {"ok": True}, "dies": os.abort, "raises": raises, "lost": lost,
            "hangs": lambda: time.sleep(600), "absent": lambda: __import__("no_such_rival")}
    for group, act in (("a", "fine"), ("b", "dies"), ("b", "fine"), ("c", "raises"), ("c", "fine"), ("d", "lost"),
                       ("d", "fine"), ("e", "hangs"), ("e", "fine"), ("f", "absent"), ("a", "fine")):
        os.write(1, b"a library prints half a line")
        yield Task(group, {"group": group, "act": act, "lane": lane}, acts[act], 0.1)

worker.STAGES["all kinds"] = Stage(tasks, 100)
sys.argv[1:] = ["all kinds", "--lane", "x", *sys.argv[1:]]
worker.main()
"""


def test_whatever_ends_a_process_costs_its_row_and_its_group(monkeypatch):
    monkeypatch.setitem(runner.PATIENCE, False, 12.0)
    rows = []
    status = runner.run_lane([sys.executable, "-c", WORKER], 500, runner.Clock(False), rows.append)
    assert status == "complete, processes that died: 3"
    assert {row["lane"] for row in rows} == {"x"}
    outcomes = [(row["group"], row["act"], row.get("error", row.get("skipped", "fine"))) for row in rows]
    want = [
        ("a", "fine", "fine"), ("b", "dies", "exit status -6"), ("b", "fine", "a process died with b"),
        ("c", "raises", "RuntimeError: an illegal memory access"), ("c", "fine", "fine"),
        ("d", "lost", "RuntimeError: an illegal memory access"), ("d", "fine", "a process died with d"),
        ("e", "hangs", "hung for 12 s"), ("e", "fine", "a process died with e"),
        ("f", "absent", "No module named 'no_such_rival'"), ("a", "fine", "fine"),
    ]  # fmt: skip
    assert [f[:2] for f in outcomes] == [w[:2] for w in want]
    assert all(f[2].startswith(w[2]) for f, w in zip(outcomes, want, strict=True)), outcomes


SLOW = """
import json, sys
for n in range(5):
    print(json.dumps({"begin": n, "group": "a", "name": {"n": n}, "expected": 10.0}))
    print(json.dumps({"row": {"n": n}}), flush=True)
"""
CHILDREN = {
    "exit status 3: no such module": "import sys; print('no such module', file=sys.stderr); sys.exit(3)",
    "out of time": "import time; print('half a line', flush=True); time.sleep(60)",
    "out of time at {'n': 7}": 'import time; print(\'{"begin": 0, "group": "a", "name": {"n": 7}, '
    '"expected": 90}\', flush=True); time.sleep(60)',
}


@pytest.mark.parametrize(("status", "code"), CHILDREN.items())
def test_ends_of_processes(status, code):
    assert runner.run_lane([sys.executable, "-c", code], 15, runner.Clock(False), print) == status


def test_a_process_that_does_not_end_is_ended(monkeypatch):
    """As when a driver hangs while it tidies up, long after the last row."""
    monkeypatch.setattr(runner, "TEARDOWN", 1.0)
    begin = time.monotonic()
    code = "import os, time; os.close(1); time.sleep(60)"
    assert "exit status -9" in runner.run_lane([sys.executable, "-c", code], 50, runner.Clock(False), print)
    assert time.monotonic() - begin < 30


def test_a_process_that_cannot_be_killed_is_left(monkeypatch):
    """As one that waits in the driver: the stage goes on, and its row says so."""

    class Stuck:
        pid, returncode = 0, None
        stdout = ('{"begin": 0, "group": "a", "name": {"n": 7}, "expected": 1}\n',)

        def wait(self, timeout):
            raise subprocess.TimeoutExpired("worker", timeout)

    starts = iter([Stuck(), subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE, text=True)])
    killed, rows = [], []
    monkeypatch.setattr(runner.os, "killpg", lambda pid, _: killed.append(pid))
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, **__: next(starts))
    assert runner.run_lane(["worker"], 50, runner.Clock(False), rows.append) == "complete, processes that died: 1"
    assert rows == [{"n": 7, "error": "exit status None: "}]
    assert killed[0] == 0


def test_a_stage_is_killed_with_what_it_started():
    """A compiler process that outlives its parent would keep the pipe open and the suite waiting."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    assert runner.run_lane([sys.executable, "-c", code], 2, runner.Clock(False), print) == "out of time"
    assert time.monotonic() - begin < 30


def test_a_planned_clock_cuts_what_takes_too_long():
    clock, rows = runner.Clock(True), []
    assert runner.run_lane([sys.executable, "-c", SLOW], 25, clock, rows.append) == "out of time"
    assert [row["n"] for row in rows] == [0, 1, 2]
    assert clock.now() == 30
    assert runner.run_lane([sys.executable, "-c", SLOW], 50, runner.Clock(True), rows.append) == "complete"


def test_what_no_time_is_left_for_is_not_started(tmp_path, monkeypatch):
    """And the file is whole after every row."""
    path, seen = tmp_path / "gpu.json", []

    def lane(command, limit, clock, add):
        add({"lane": command[command.index("--lane") + 1]})
        seen.append(json.loads(path.read_text())["stages"]["build"]["status"])
        clock.plan(30)
        return "complete"

    monkeypatch.setattr(runner, "run_lane", lane)
    stages = {name: Stage(STAGES[name].tasks, 40, ("x", "y")) for name in ("build", "table", "quack")}
    results = runner.run_all(stages, [], path, 50, dry=True)
    assert json.loads(path.read_text()) == results
    assert seen[0] == "running"
    assert [(stage["status"], len(stage["rows"])) for stage in results["stages"].values()] == [
        ("complete", 2), ("complete", 2), ("not started", 0),
    ]  # fmt: skip
    assert "quack: not started after 0 rows" in runner.complaints(results)


def test_complaints():
    stages = {
        "correctness": {"status": "complete", "rows": [{"case": "a", "ok": True}, {"case": "b", "ok": False}]},
        "table": {
            "status": "out of time",
            "rows": [
                {"name": "Liger", "error": "no"},
                {"name": "dadpo-kernels cuda, retain", "error": "no"},
                {"name": "dadpo-kernels triton, retain", "skipped": "not built"},
                {"name": "the three products", "error": "out of memory"},
            ],
        },
        "passes": {"status": "complete", "rows": [{"kernel": "gradient", "error": "no"}]},
    }
    complaints = runner.complaints({"environment": {"dry_run": False}, "stages": stages})
    words = ("'b'", "after 4 rows", "cuda", "not built", "out of memory", "gradient")
    assert [word for word, line in zip(words, complaints, strict=True) if word in line] == list(words)


def test_the_commit_needs_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DADPO_COMMIT", raising=False)
    assert "DADPO_COMMIT" in process.commit()
    monkeypatch.setenv("DADPO_COMMIT", "0123456789ab")
    assert process.commit() == "0123456789ab"
    assert runner.environment(dry=True)["commit"] == "0123456789ab"


def test_rivals_come_from_a_folder(bare_path, tmp_path):
    """A wheel and packed site-packages are importable in the workers; too many bytes are refused."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "huge.whl").write_bytes(b"")
    os.truncate(folder / "huge.whl", 60 * 2**20 + 1)
    done = suite(bare_path, "second", "--dry-run", OUT=str(tmp_path / "out"), WHEELS=str(folder))
    assert done.returncode == 2
    assert "more than the 58720256" in done.stderr
    (folder / "huge.whl").unlink()
    package = tmp_path / "quack_kernels-9.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: quack-kernels\nVersion: 9.8.7\n")
    with zipfile.ZipFile(folder / "liger_kernel-9.9.9-py3-none-any.whl", "w") as wheel:
        info = "liger_kernel-9.9.9.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: liger-kernel\nVersion: 9.9.9\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner.pth").write_text("inner")
    (tmp_path / "inner" / "sitecustomize.py").write_text("import sys; print('inner is on the path', file=sys.stderr)")
    with tarfile.open(folder / "rivals.tar.xz", "w:xz") as archive:
        for name in (package.name, "inner", "inner.pth"):
            archive.add(tmp_path / name, name)
    done = suite(bare_path, "second", "--dry-run", "--only", "quack", OUT=str(tmp_path / "out"), WHEELS=str(folder))
    assert done.returncode == 0, done.stderr
    assert "quack-kernels 9.8.7" in done.stdout
    assert "liger-kernel 9.9.9" in done.stdout
    assert "inner is on the path" in done.stdout
    assert (tmp_path / "out" / "gpu-dry-run-second-quack.json").exists()  # not in the place of a whole call's


def test_what_a_session_needs_fits_its_limits():
    """The command of docs/gpu.md in 2,000 characters; the tree in 8 MiB beside 56 MiB of rivals."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    commands = re.findall(r"^    (.*tools/gpu_suite\.sh.*)$", page, re.MULTILINE)
    assert len(commands) >= 2
    assert all(len(command) < 2000 for command in commands)
    for command in commands:
        call = re.search(r"gpu_suite\.sh (\w+)", command)
        assert call
        assert call[1] in CALLS
    if git := shutil.which("git"):
        listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout
        assert sum((ROOT / name).stat().st_size for name in listed.split("\0") if (ROOT / name).is_file()) < 8 * 2**20


@pytest.mark.parametrize(
    ("name", "file"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
     ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090")],
)  # fmt: skip
def test_results_of_other_devices_are_other_files(monkeypatch, name, file):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_name(dry=False) == file
    assert device_name(dry=True) == "dry-run"


@pytest.mark.parametrize("case", checks.CASES)
def test_correctness_passes_and_fails(monkeypatch, case):
    device, true = torch.device("cpu"), checks.evaluate
    assert checks.compare(device, torch.bfloat16, "torch", case, PLANS["retain"])["ok"]

    def wrong(p, dtype, backend, budget):
        got = true(p, dtype, backend, budget)
        return got if backend == "reference" else {name: value * 0 for name, value in got.items()}

    monkeypatch.setattr(checks, "evaluate", wrong)
    assert not checks.compare(device, torch.bfloat16, "torch", case, PLANS["retain"])["ok"]


def test_other_checks_pass():
    device = torch.device("cpu")
    assert all(checks.compare_topk(device, torch.float16, "torch", k)["ok"] for k in checks.TIES)
    assert checks.compare_last_rows(device, torch.bfloat16, "torch", 0, (40, 600, 64))["ok"]
    assert {lane.split()[0] for lane in checks.LANES} == {*GPU_BACKENDS, "torch"}


def test_every_configuration_meets_an_edge():
    """Of Hopper's: each but the fixed one, with rows and columns that no block divides."""
    tasks = list(checks.correctness(DRY, checks.CONFIGURATIONS))
    lists = [build.tuning.candidates(kernel, 9, torch.bfloat16, 128) for kernel in build.tuning.CONFIGS]
    assert {task.name["choice"] for task in tasks} == set(range(1, max(map(len, lists))))
    hidden = torch.zeros(1, 128, dtype=torch.bfloat16)
    chosen = {checks.nth_choice(task.name["choice"], 90)("retain", hidden, False, True) for task in tasks}
    assert chosen == {*build.tuning.CONFIGS["retain"][9][1:]}
    row = tasks[0].run()
    assert row["ok"], row


@pytest.mark.parametrize("name", ["label", "grad_hidden"])
def test_a_nan_anywhere_is_an_error(monkeypatch, name):
    true = checks.evaluate

    def spoilt(p, dtype, backend, budget):
        got = true(p, dtype, backend, budget)
        if backend == "torch":
            got[name].data.view(-1)[0] = torch.nan
        return got

    monkeypatch.setattr(checks, "evaluate", spoilt)
    comparison = checks.compare(torch.device("cpu"), torch.float32, "torch", "ragged", 0)
    assert comparison["worst"] == name
    assert not comparison["ok"]


def test_what_cancels_reaches_the_selected_entries_alone():
    p = checks.problem("dlse = 0", torch.device("cpu"))
    grad = checks.evaluate(p, torch.float64, "reference", None)["grad_bias"]
    valid = p["labels"] != -100
    selected = torch.cat([p["topk_ids"][valid].flatten(), p["labels"][valid]])
    assert grad[selected].abs().max() > 0.1
    grad[selected] = 0
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["triton", "triton_rows"])
def test_the_pool_compiles_what_the_checks_launch(monkeypatch, backend):
    """By hash: each launch of a real call, compiled and not run, was met by a job before."""
    entry = BACKENDS[backend]
    monkeypatch.setitem(BACKENDS, backend, entry._replace(obstacle=lambda *_: None))
    monkeypatch.setattr(triton_, "choose", checks.nth_choice(0, 90))  # as on the device, with DADPO_AUTOTUNE=0
    with offline.compiling(90) as launched:
        for plan in PLANS.values():
            checks.evaluate(checks.problem("softcap", torch.device("cpu")), torch.bfloat16, backend, plan)
    met: dict = {}
    for job in build.jobs(90):
        if (job.backend, job.dtype, job.softcap, job.choice) == (backend, torch.bfloat16, True, 0):
            met |= build.compile_job(job, 90)
    assert launched.keys() <= met.keys(), [launched[key][0] for key in launched.keys() - met.keys()]
    assert len(launched) >= 5
    names = {name.rpartition(".")[2] for name, _ in met.values()}
    assert names <= set(sanitizer.TRITON_KERNELS)


def test_jobs_cover_every_shape_and_configuration():
    jobs = build.jobs(90)
    assert {job.width for job in jobs} >= {shape.width for shape in SHAPES}
    assert {job.top_k for job in jobs} >= set(TOP_K)
    lists = [build.tuning.candidates(kernel, 9, torch.bfloat16, 4096) for kernel in build.tuning.CONFIGS]
    assert {job.choice for job in jobs if job.backend == "triton"} == set(range(max(map(len, lists))))


def test_a_job_that_fails_says_which(monkeypatch):
    monkeypatch.setattr(build, "compile_job", lambda *_: 1 / 0)
    met, _, error = build.attempted(90, build.jobs(90)[0])
    assert met == 0
    assert "Job(backend='triton'" in error
    assert "ZeroDivisionError" in error


def test_profiles_hold_the_hottest_kernels():
    rows = [task.name | timing.attempt(task.run) for task in itertools.islice(steps.profiles(DRY, "all"), 2)]
    for row in rows:
        assert 3 <= len(row["kernels"]) <= steps.HOTTEST
        times = [seconds for _, _, seconds in row["kernels"]]
        assert times == sorted(times, reverse=True)
        assert 0 < times[0] <= row["all_kernels_seconds"]
        shown = tables.flat(row, {"times the products": 2.0})
        assert len(shown) == 1 + len(row["kernels"])
        assert ["times the products" in part for part in shown] == [True] + [False] * len(row["kernels"])
        assert sum(part.get("share", 0) for part in shown) <= 1 + 1e-9


def test_products_measure_what_they_say():
    """In a dry run: the flops follow from the operands that were really multiplied."""
    tokens, width, vocab = TINY
    for task in kernels.products(DRY, SHAPES[0], 8192):
        row = task.run()
        assert row["flops"] * row["seconds"] == pytest.approx(2 * tokens * width * vocab), task.name


TOOL = """#!/bin/sh
echo "$@" >> {log}
echo "========= COMPUTE-SANITIZER"
case "$2" in racecheck) echo "========= ERROR SUMMARY: 3 errors"; exit 77;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_sanitizers_are_asked_one_by_one(tmp_path, monkeypatch):
    """With a program in the place of NVIDIA's: what it is told, and what becomes of its findings."""

    def rows():
        tasks = [task for lane in sanitizer.LANES for task in sanitizer.sanitizers(DRY, lane)]
        return [task.name | timing.attempt(task.run) for task in tasks]

    monkeypatch.setenv("PATH", "")
    assert all("not on the PATH" in row["skipped"] for row in rows())
    program, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    program.write_text(TOOL.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    results = rows()
    assert [(row["backend"], row["tool"]) for row in results] == list(itertools.product(GPU_BACKENDS, sanitizer.TOOLS))
    assert [row["ok"] for row in results] == [True, False, True] * 3
    assert results[1]["summary"] == "ERROR SUMMARY: 3 errors"
    calls = log.read_text().splitlines()
    assert all(call.endswith("-m benchmarks.gpu_suite.sanitizer torch") for call in calls)
    filters = {"cuda": "--kernel-name kns=dadpo", "triton": "--kernel-name kne=logit_gradient"}
    for row, call in zip(results, calls, strict=True):
        assert (filters[row["backend"].removesuffix("_rows")] in call) == (row["tool"] != "initcheck")


def test_what_the_sanitizers_watch(monkeypatch):
    """Two cases of every plan: rows for several blocks each and for one."""
    seen = []
    monkeypatch.setattr(sanitizer, "evaluate", lambda p, dtype, *_: seen.append((p["case"], len(p["labels"]), dtype)))
    sanitizer.run_kernels(torch.device("cpu"), "torch")
    assert seen == [("softcap", 203, torch.bfloat16)] * 2 + [("ragged", 5, torch.float32)] * 2
    monkeypatch.setattr(sanitizer, "compare_topk", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    chosen = []
    hidden = torch.zeros(1, 128, dtype=torch.bfloat16)
    monkeypatch.setattr(
        sanitizer, "evaluate", lambda *_: chosen.append(triton_.choose("retain", hidden, False, True, None))
    )
    sanitizer.run_kernels(torch.device("cpu"), "triton")
    usual, others = chosen[:4], chosen[4:]
    assert len(set(usual)) == 1
    assert set(others) == {*build.tuning.CONFIGS["retain"][9][1:]}


def test_rivals_of_both_calls_are_known():
    for call, listed in RIVALS.items():
        named = {task.name["name"] for task in steps.rivals(DRY, call)}
        assert named == {"PyTorch eager", *listed}
    assert dataclasses.replace(DRY, dry=False).repeats > 1

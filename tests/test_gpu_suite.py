"""The suite that waits for a GPU: its stages on tiny problems, its limits and its tables, on the CPU."""

import json
import re
import sys
import time
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("triton")

from benchmarks import compare, style
from benchmarks.gpu_suite import checks, contenders, runner, sanitizer, tables
from benchmarks.gpu_suite.stages import STAGES, TINY, profile

GPU_ONLY = ("row_passes", "sweep", "sanitizers")  # the kernels that they run; here on the host in other tests


@pytest.mark.parametrize("name", ["ceilings", "table", "products", *GPU_ONLY, "end_to_end"])
def test_stages_on_tiny_problems(name):
    rows = list(STAGES[name].run(TINY))
    assert all("error" not in row for row in rows), rows
    assert bool(rows) == (name not in GPU_ONLY)
    json.dumps(rows)


def test_correctness_passes_and_fails(monkeypatch):
    rows = list(STAGES["correctness"].run(TINY))
    assert {row["backend"] for row in rows} >= {"torch"}
    assert {row["dtype"] for row in rows if row["backend"] == "torch"} == {"bfloat16", "float16", "float32"}
    assert {row["case"] for row in rows} >= {"ragged", "dlse = 0", "beyond 2^31 logits", "ties in the top 150"}
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]

    true = checks.evaluate

    def wrong(p, dtype, backend, budget):
        got = true(p, dtype, backend, budget)
        return got if backend == "reference" else {name: value * 0 for name, value in got.items()}

    monkeypatch.setattr(checks, "evaluate", wrong)
    monkeypatch.setattr(checks, "CASES", ("ragged",))
    assert not any(row["ok"] for row in STAGES["correctness"].run(TINY) if row["case"] == "ragged")


@pytest.mark.parametrize("name", ["label", "grad_hidden"])
def test_a_nan_anywhere_is_an_error(monkeypatch, name):
    true = checks.evaluate

    def spoilt(p, dtype, backend, budget):
        got = true(p, dtype, backend, budget)
        if backend == "torch":
            got[name].data.view(-1)[0] = torch.nan
        return got

    monkeypatch.setattr(checks, "evaluate", spoilt)
    device = torch.device("cpu")
    found = checks.compare(checks.problem("ragged", device), torch.float32, "torch", 0)
    assert found["worst"] == name
    assert not found["ok"]


def test_what_cancels_reaches_the_selected_entries_alone():
    p = checks.problem("dlse = 0", torch.device("cpu"))
    grad = checks.evaluate(p, torch.float64, "reference", None)["grad_bias"]
    valid = p["labels"] != -100
    selected = torch.cat([p["topk_ids"][valid].flatten(), p["labels"][valid]])
    assert grad[selected].abs().max() > 0.1
    grad[selected] = 0
    assert grad.abs().max() < 1e-12


def test_a_backend_that_raises_costs_its_own_rows(monkeypatch):
    """Also where all the others are still to come."""
    true = checks.evaluate

    def broken(p, dtype, backend, budget):
        if backend == "cpu":
            raise RuntimeError("no kernel image")
        return true(p, dtype, backend, budget)

    monkeypatch.setattr(checks, "evaluate", broken)
    monkeypatch.setattr(checks, "CASES", ("ragged",))
    rows = [row for row in STAGES["correctness"].run(TINY) if row["case"] == "ragged"]
    assert {"error" in row for row in rows if row["backend"] == "cpu"} == {True}
    assert all(row["ok"] for row in rows if row["backend"] == "torch")
    stage = {"status": "complete", "rows": rows}
    assert all("no kernel image" in line for line in runner.complaints({"stages": {"correctness": stage}}))


def test_every_shape_is_compiled(monkeypatch):
    """More shapes than PyTorch compiles one function for."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    for rows in range(2, 14):
        hidden, labels = torch.randn(rows, 8), torch.randint(20, (rows,))
        contenders.compiled_eager()(hidden, torch.randn(20, 8), labels, None)
    assert counter.frame_count == 12


def test_profile_shows_three_kernels_of_each_backend():
    text = profile(TINY)
    for name in ("cpu, recompute", "cpu, retain", "torch, recompute", "torch, retain"):
        (table,) = (part for part in text.split("dadpo-kernels ")[1:] if part.startswith(name))
        assert len(re.findall(r"^.*\d%", table, re.MULTILINE)) == 3, table


TOOL = """#!/bin/sh
echo "$@" >> {log}
echo "========= COMPUTE-SANITIZER"
case "$2" in racecheck) echo "========= ERROR SUMMARY: 3 errors"; exit 77;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_sanitizers_are_asked_one_by_one(tmp_path, monkeypatch):
    """With a program in the place of NVIDIA's: what it is told, and what becomes of its findings."""
    monkeypatch.setenv("PATH", "")
    (row,) = sanitizer.sanitizers()
    assert "not on the PATH" in row["skipped"]
    program, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    program.write_text(TOOL.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = list(sanitizer.sanitizers())
    assert [(row["tool"], row["ok"]) for row in rows] == [
        ("memcheck", True),
        ("racecheck", False),
        ("initcheck", True),
    ]
    assert [row["summary"] for row in rows][1] == "ERROR SUMMARY: 3 errors"
    assert len(runner.complaints({"stages": {"sanitizers": {"status": "complete", "rows": rows}}})) == 1
    calls = log.read_text().splitlines()
    assert all(call.endswith("-m benchmarks.gpu_suite.sanitizer") for call in calls)
    assert ["kns=dadpo" in call for call in calls] == [True, True, False]


def test_what_the_sanitizers_watch(monkeypatch):
    """Every dtype and plan, rows for several blocks each and for one."""
    seen = []
    monkeypatch.setattr(sanitizer, "evaluate", lambda p, dtype, *_: seen.append((len(p["labels"]), dtype)))
    sanitizer.run_kernels(torch.device("cpu"), "torch")
    assert len(seen) == 12
    assert {rows for rows, _ in seen} == {5, 203}


CHILDREN = {
    "complete": "print('{\"a\": 1}')",
    "exit status 3": "print('noise'); print('{\"a\": 1}', flush=True); import sys; sys.exit(3)",
    "out of time": "print('{\"a\": 1}', flush=True); import time; time.sleep(60)",
}


@pytest.mark.parametrize(("status", "code"), CHILDREN.items())
def test_children(status, code):
    rows = []
    assert runner.run_child([sys.executable, "-c", code], 3 if status == "out of time" else 60, rows.append) == status
    assert rows == [{"a": 1}]


def test_a_stage_is_killed_with_what_it_started():
    """A compiler process that outlives its parent would keep the pipe open and the suite waiting."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    assert runner.run_child([sys.executable, "-c", code], 2, print) == "out of time"
    assert time.monotonic() - begin < 30


def test_complaints():
    stages = {
        "correctness": {"status": "complete", "rows": [{"case": "a", "ok": True}, {"case": "b", "ok": False}]},
        "table": {
            "status": "out of time",
            "rows": [{"name": "Liger", "error": "no"}, {"name": "dadpo-kernels cuda, retain", "error": "no"}],
        },
        "sweep": {"status": "complete", "rows": [{"kernel": "gradient", "error": "no"}]},
    }
    found = runner.complaints({"stages": stages})
    words = ("'b'", "after 2 rows", "cuda", "gradient")
    assert [word for word, line in zip(words, found, strict=True) if word in line] == list(words)


def test_file_is_whole_after_every_row(tmp_path, monkeypatch):
    path, seen = tmp_path / "gpu.json", []

    def child(command, seconds, add):
        add({"what": "copy", "bytes_per_second": 2e12})
        seen.append(json.loads(path.read_text()))
        return "complete"

    monkeypatch.setattr(runner, "run_child", child)
    runner.run_all({"ceilings": 5, "table": 0}, [], path, 10)
    assert seen[0]["stages"]["ceilings"]["status"] == "running"
    stored = json.loads(path.read_text())
    assert stored["stages"]["ceilings"]["status"] == "complete"
    assert stored["stages"]["table"] == {"status": "not started", "rows": []}
    text = tables.report(stored)
    assert "| copy | 2000 |" in text
    assert "table (not started)" in text


def test_times_over_the_products_alone():
    timed = {"shape": "a", "top_k": 0, "masked": False, "both_seconds": 3.0}
    rows = [{"shape": "a", "name": "the three products", "both_seconds": 2.0}, timed, timed | {"shape": "b"}]
    floor = tables.floors({"stages": {"table": {"rows": rows}}})
    assert [tables.over_floor(row, floor) for row in rows] == [{}, {"times the products": 1.5}, {}]


def test_goals():
    products = {"shape": "a", "name": "the three products", "tokens": 1024, "width": 4096, "vocab": 2048}
    step = {"shape": "a", "top_k": 0, "masked": False, "peak_bytes_above_gradients": 302 * 2**20}
    stages = {
        "table": [
            products | {"both_seconds": 2.0},
            step | {"name": "dadpo-kernels cuda, retain", "both_seconds": 2.2},
            step | {"name": "dadpo-kernels cuda, recompute", "both_seconds": 3.2},
            step | {"name": "Liger", "both_seconds": 9.0},
            {"shape": "a", "name": "dadpo-kernels triton, retain", "top_k": 0, "masked": False, "error": "no"},
        ],
        "row_passes": [{"backend": "cuda", "pass": "topk", "of_copy": 0.8}],
    }
    results = {"stages": {name: {"status": "complete", "rows": rows} for name, rows in stages.items()}}
    found = [(row["measured"], row["limit"], row["reached"]) for row in tables.goals(results)]
    assert found == [(1.1, 1.15, True), (302, 304, True), (1.6, 1.55, False), (302, 300, False), (0.8, 0.85, False)]


def test_two_files_are_compared():
    def file(seconds: float, peak: int | None) -> dict:
        row = {"shape": "a", "top_k": 16, "masked": True, "name": "ours", "both_seconds": seconds}
        failed = {"shape": "a", "top_k": 16, "masked": False, "name": "ours", "error": "out of memory"}
        rows = [row | {"peak_bytes_above_gradients": peak}, failed, {"shape": "a", "name": "products"}]
        return {"stages": {"table": {"status": "complete", "rows": rows}}}

    assert compare.gpu_lines(file(0.002, 2**21), file(0.003, 2**22)) == [
        "a K=16 half masked ours: 2.00 -> 3.00 ms (1.50x), peak 2 -> 4 MiB"
    ]
    assert compare.gpu_lines(file(0.002, None), file(0.001, None))[0].endswith("1.00 ms (0.50x)")


def test_units_and_plot(tmp_path):
    row = {"both_seconds": 0.5, "both_flops": 3e12, "peak_bytes_above_gradients": 2**21, "error": None}
    assert tables.readable(row) == {"both ms": 500.0, "both TFLOP/s": 3.0, "peak MiB above gradients": 2.0}
    rows = list(STAGES["table"].run(TINY))
    style.save(tables.draw({"stages": {"table": {"rows": rows}}}), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000

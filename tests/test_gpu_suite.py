"""The suite that waits for a GPU: its stages on tiny problems, its limits and its tables, on the CPU."""

import json
import sys
import time

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import style
from benchmarks.gpu_suite import runner, stages, tables
from benchmarks.gpu_suite.stages import STAGES, TINY


@pytest.mark.parametrize("name", ["ceilings", "table", "products", "sweep", "end_to_end"])
def test_stages_on_tiny_problems(name, monkeypatch):
    monkeypatch.setattr(stages, "WHOLE_LOSSES", ("recompute", "default", "retain", "dense"))  # not what compiles
    rows = list(STAGES[name].run(TINY))
    assert all("error" not in row for row in rows), rows
    assert bool(rows) == (name != "sweep")  # the kernels it sweeps need a GPU
    json.dumps(rows)


def test_correctness_passes_and_fails(monkeypatch):
    rows = list(STAGES["correctness"].run(TINY))
    assert {row["backend"] for row in rows} >= {"torch"}
    assert {row["case"] for row in rows} >= {"ragged", "no gradient", "beyond 2^31 logits", "ties in the top 150"}
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]

    from benchmarks.gpu_suite import checks

    true = checks.evaluate

    def wrong(p, dtype, backend, budget):
        got = true(p, dtype, backend, budget)
        return got if backend == "reference" else {name: value * 0 for name, value in got.items()}

    monkeypatch.setattr(checks, "evaluate", wrong)
    monkeypatch.setattr(checks, "CASES", ("ragged",))
    assert not any(row["ok"] for row in STAGES["correctness"].run(TINY) if row["case"] == "ragged")


@pytest.mark.parametrize("name", ["label", "grad_hidden"])
def test_a_nan_anywhere_is_an_error(monkeypatch, name):
    from benchmarks.gpu_suite import checks

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


def test_units_and_plot(tmp_path):
    row = {"both_seconds": 0.5, "both_flops": 3e12, "peak_bytes_above_gradients": 2**21, "error": None}
    assert tables.readable(row) == {"both ms": 500.0, "TFLOP/s": 3.0, "peak MiB above gradients": 2.0}
    rows = list(STAGES["table"].run(TINY))
    style.save(tables.draw({"stages": {"table": {"rows": rows}}}), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000

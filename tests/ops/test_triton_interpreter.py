"""Every Triton kernel executed without a GPU, under Triton's interpreter, through the public functions.

Triton decides when it is imported whether it interprets, and other tests compile the same kernels: so the tests of
this file run in a process of their own, started by the only test that the ordinary run sees.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from benchmarks.gpu_suite import row_passes
from benchmarks.gpu_suite.kernels import row_passes_and_sweep
from benchmarks.gpu_suite.settings import Settings
from benchmarks.gpu_suite.timing import attempt
from dadpo_kernels.ops import autograd
from dadpo_kernels.ops.backends import gpu_base, triton_
from dadpo_kernels.ops.backends.base import Best, Coefficients, Entries, Grads, Retained, State
from dadpo_kernels.ops.backends.registry import BACKENDS, resolve
from dadpo_kernels.ops.backends.tuning import CONFIGS
from dadpo_kernels.ops.head import Head
from tests.ops import contract
from tests.ops.contract import OPTIONS, PROBLEMS, Subject, budgets, operator_arguments
from tests.support.far import far, linux
from tests.support.waiting import assert_no_waiting

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_interpreter starts")

TILE = 128
SLOW = {
    "vocab": 300,
    "tile": TILE,
    "options": ("plain", "all"),
    "problems": tuple(name for name in PROBLEMS if name not in ("every logit -60", "every logit +300", "many ids")),
    "plans": ("recompute", "retain"),
    "examples": 4,
    "largest": (9, 300, 40),
}
# Row kernels run a program per row, which the interpreter is slow at; fused ones need rows for two blocks.
ROWS = Subject("triton_rows", rows=9, **SLOW)
FUSED = Subject("triton", rows=27, **SLOW)
NAMES = [ROWS.backend, FUSED.backend]


def test_interpreter():
    if INTERPRETING:
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Small tiles and blocks, so that small problems cross their boundaries."""
    for name in NAMES:
        monkeypatch.setattr(BACKENDS[name].tiles, "tile_columns", staticmethod(lambda *_: TILE))
    monkeypatch.setattr(triton_, "choose", lambda *_: triton_.Config(16, 64, 16, 1, 4, 2))
    for module, name, columns in ((triton_, "SPAN", TILE), (triton_, "PROBE", 64), (gpu_base, "STEP", 64)):
        monkeypatch.setattr(module, name, columns)


@interpreted
class TestValues(contract.Values):
    subjects = (ROWS, FUSED)


@interpreted
class TestConduct(contract.Conduct):
    subjects = (ROWS, FUSED)


@interpreted
class TestTopk(contract.Topk):
    """The fused kernels have the row kernels' pass."""

    subjects = (replace(ROWS, rows=4, options=("all",), largest=(4, 200, 30), ks=(0, 5, 200, 300), tied_rows=7),)


@interpreted
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("retain", [False, True])
def test_opcheck(backend, retain):
    """Also that the backward leaves the retained buffer as it was: it writes to it and puts back what was there."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(autograd.selected_logps, operator_arguments(backend, 6, 200, retain), test_utils=tests)


@interpreted
@pytest.mark.parametrize("option", FUSED.options)
@pytest.mark.parametrize("dtype", FUSED.dtypes)
def test_descriptors(monkeypatch, dtype, option):
    """Blocks copied by TMA, whose borders lie beyond the operands' in every direction."""
    config = triton_.Config(16, 64, 16, 1, 4, 2, TMA=True)
    monkeypatch.setattr(triton_, "choose", lambda *_: config)
    FUSED.check(FUSED.problem(**OPTIONS[option]), dtype)


@interpreted
def test_sweep_of_configurations():
    """The GPU suite's: all of Hopper's, each held against the first."""
    dry = Settings(dry=True)
    tasks = [task for task in row_passes_and_sweep(dry, "all") if "config" in task.name]
    of_one_shape = [task for task in tasks if task.name["shape"] == tasks[0].name["shape"]]
    rows = [task.name | attempt(task.run) for task in of_one_shape]
    assert {row["kernel"] for row in rows} == set(CONFIGS)
    persistent = {row["kernel"] for row in rows if "not run Gluon" in row.get("skipped", "")}
    assert persistent == {"forward", "retain", "gradient"}
    rows = [row for row in rows if not row["config"].endswith("persistent")]
    assert all(row["ok"] for row in rows), rows
    assert any(row["config"].endswith("TMA") for row in rows)


@interpreted
@pytest.mark.parametrize("name", row_passes.PASSES)
def test_row_passes_alone(monkeypatch, name):
    """The GPU suite's: on a GPU as CUDA graphs, here as the calls that these repeat."""
    monkeypatch.setattr(row_passes, "CALLS", 2)
    p = ROWS.problem().to(torch.bfloat16)
    row = row_passes.row_pass("triton_rows", name, p.hidden, p.weight, p.labels.clamp(min=0), p.topk_ids, 1e9, 1)
    assert row["ok"]
    assert row["of_copy"] > 0


@linux
@interpreted
@pytest.mark.parametrize("backend", NAMES)
def test_offsets_beyond_32_bits(monkeypatch, backend):
    """Products, their gradient and retained exponentials in rows far apart: all that is as large as N times V."""
    p = ROWS.problem(rows=3, bias=True).to(torch.bfloat16)
    entries, head = Entries.merge(p.labels.clamp(min=0), p.topk_ids), Head(p.weight, p.bias, 1.0, 30.0, 1.0)
    product = p.hidden.float() @ p.weight[:TILE].float().T

    def run(place):
        kind = BACKENDS[backend].tiles
        monkeypatch.setattr(kind, "padded", lambda self, columns, dtype: place(3, columns, dtype))
        monkeypatch.setattr(kind, "products", lambda *_: place(3, TILE, torch.float32).copy_(product))
        tiles, state = kind(p.hidden, head, entries), State.new(3, entries.ids.shape[1], p.hidden)
        retained = Retained(place(3, TILE, torch.bfloat16), torch.zeros(3))
        tiles.forward(0, TILE, state, retained)
        results = [state.max, state.sum, state.selected, retained.exps.clone()]
        coefficients = Coefficients(torch.ones(3), state.max, torch.ones_like(state.selected))
        for stored in (None, retained):
            grads = Grads(torch.zeros(p.hidden.shape), torch.zeros_like(p.weight), torch.zeros(300))
            tiles.backward(0, TILE, coefficients, grads, stored)
            results += [grads.hidden, grads.weight, grads.bias]
        best = Best(torch.full((3, 11), -torch.inf), torch.zeros(3, 11, dtype=torch.int32), torch.zeros(3), 5)
        tiles.topk(0, TILE, state, best)
        return [*results, best.values, best.ids]

    # Less than 2^31, or the stride itself would make 64-bit products.
    def far_apart(rows, columns, dtype):
        return far(rows, columns, dtype, stride=2**30 + 8)

    near = run(lambda rows, columns, dtype: torch.zeros(rows, columns, dtype=dtype))
    for got, want in zip(run(far_apart), near, strict=True):
        assert torch.equal(got, want)
        assert got.isfinite().any()
        assert got.abs().sum() > 0


@interpreted
@pytest.mark.parametrize("subject", [ROWS, FUSED], ids=str)
def test_nothing_waits_for_the_device(subject):
    p = subject.problem(bias=True)
    for budget in budgets(p, torch.float32).values():
        assert_no_waiting(BACKENDS[subject.backend].tiles, p, budget, subject.backend)


def test_reasons():
    with pytest.raises(ValueError, match=r"takes torch.float32 and torch.bfloat16, not torch.float64"):
        resolve("triton_rows", torch.device("cpu"), torch.float64)
    if not INTERPRETING:
        with pytest.raises(ValueError, match="tensors are on cpu"):
            resolve("triton_rows", torch.device("cpu"), torch.float32)


def test_package_does_not_import_triton():
    code = "import sys, dadpo_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

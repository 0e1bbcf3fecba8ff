"""The CUDA backend executed without a GPU: its kernels' source compiled by g++, its Python class on CPU tensors."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from benchmarks.gpu_suite import row_passes
from dadpo_kernels.ops import autograd
from dadpo_kernels.ops.backends.registry import BACKENDS, Backend
from dadpo_kernels.ops.run import Run
from tests.ops import contract
from tests.ops.contract import Subject, budgets, operator_arguments
from tests.support import cuda_host
from tests.support.dense import IGNORE
from tests.support.extension import load
from tests.support.waiting import METHODS, WAITING, Operations, assert_no_waiting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUBJECT = Subject(
    "host", DTYPES, rows=21, vocab=700, options=("plain", "bias", "softcap", "all"), examples=20, largest=(20, 700, 40)
)


@pytest.fixture(scope="session")
def host():
    return load(cuda_host.plain())


@pytest.fixture(autouse=True)
def backend(host, monkeypatch):
    """The backend as "host"."""
    monkeypatch.setattr(cuda_host.HostTiles, "module", host)
    monkeypatch.setattr(cuda_host.HostTiles, "tile_columns", staticmethod(lambda *_: host.COLUMNS))
    monkeypatch.setitem(BACKENDS, "host", Backend(cuda_host.HostTiles, lambda *_: None, ()))


class TestValues(contract.Values):
    subjects = (SUBJECT,)


class TestConduct(contract.Conduct):
    subjects = (SUBJECT,)


class TestRealHiddenStates(contract.RealHiddenStates):
    subjects, rows = (SUBJECT,), 12


class TestTopk(contract.Topk):
    """256 is the most that the kernel holds in blocks of 64 threads; beyond, PyTorch does the work."""

    ks = (0, 1, 5, 64, 200, 256, 257, 700)
    subjects = (replace(SUBJECT, rows=7, options=("all",), largest=(7, 700, 30), ks=ks),)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_device(monkeypatch, dtype):
    """So that a CUDA graph can capture the passes. The kernels' source asks CUDA for launches alone."""
    monkeypatch.setattr(cuda_host.HostTiles, "tile_columns", staticmethod(lambda *_: SUBJECT.tile))
    p = SUBJECT.problem(bias=True).to(dtype)
    for budget in budgets(p, dtype).values():
        assert_no_waiting(cuda_host.HostTiles, p, budget, "host")
    source = "".join(path.read_text() for path in cuda_host.CUDA.iterdir())
    called = set(re.findall(r"\bcuda[A-Z]\w+(?=\()", source))
    assert called == {"cudaSetDevice", "cudaLaunchKernelEx", "cudaGetLastError", "cudaGetErrorString"}


def test_float16_keeps_nothing_for_the_backward():
    """It cannot be retained, so no buffer is allocated for it."""
    run = Run(memory_budget=2**31)
    assert run.buffer_bytes(64, 2000, torch.float16, "host") == 0
    assert run.buffer_bytes(64, 2000, torch.bfloat16, "host") >= 2 * 64 * 2000


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_how_many_operations_a_step_takes(retain, masked):
    """Two products in the backward, and one more where nothing is retained; two passes over `[N, H]` for the factors
    of what is; beside these, operations on a few numbers a token, however large k is.
    """
    rows, width = 16, 8
    arguments = list(operator_arguments("host", rows, 600, retain))
    hidden, weight, _, labels, _, scale, softcap, temperature, _, backend, tolerance, _ = arguments
    arguments[2], arguments[6], softcap = None, None, None
    arguments[4] = torch.stack([torch.randperm(600)[:64] for _ in range(rows)])
    if masked:
        labels[3] = IGNORE
    with torch.no_grad():
        with Operations() as forward:
            out = autograd._selected_logps(*arguments)
        grads = [torch.randn_like(o) for o in out[:3]]
        options = (scale, softcap, temperature, backend, tolerance, [True, True, False])
        with Operations() as backward:
            autograd._selected_logps_backward(*grads, hidden, weight, None, *out, *options)
    products = ("mm", "addmm")
    assert [name for name, _ in forward.calls if name in products] == ["mm"]
    assert len([name for name, _ in backward.calls if name in products]) == (2 if retain else 3)
    passes = [name for name, size in backward.calls if size == (rows - masked) * width and name not in products]
    assert Counter(passes)["mul_"] + Counter(passes)["mul"] == (2 if retain else 0)
    small = [name for name, _ in backward.calls if name not in {*products, *METHODS}]
    assert 20 < len(small) <= (51 if retain else 40)
    waits = {"forward": forward, "backward": backward}
    waits = {k: [name for name, _ in calls.calls if name in {*WAITING, *METHODS}] for k, calls in waits.items()}
    # On the CPU, a range is checked at once; the counts are there once they have come.
    assert waits == {"forward": ["_local_scalar_dense"] * 2 + ["cpu", "tolist"], "backward": ["tolist"]}


def test_row_passes_alone(monkeypatch):
    """The GPU suite's: on a GPU as CUDA graphs, here as the calls that these repeat."""
    monkeypatch.setattr(row_passes, "CALLS", 2)
    p = SUBJECT.problem(rows=5).to(torch.bfloat16)
    arguments = (p.hidden, p.weight, p.labels.clamp(min=0), p.topk_ids, 1e9, 1)
    for name in row_passes.PASSES:
        row = row_passes.row_pass("host", name, *arguments)
        assert row["ok"], name
        assert row["of_copy"] > 0

    monkeypatch.setattr(row_passes, "as_graph", lambda _, run: lambda: tuple(t * 0 for t in run()))
    assert not any(row_passes.row_pass("host", name, *arguments)["ok"] for name in row_passes.PASSES)


@pytest.mark.parametrize("retain", [False, True])
def test_opcheck(retain):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(autograd.selected_logps, operator_arguments("host", 16, 600, retain), test_utils=tests)

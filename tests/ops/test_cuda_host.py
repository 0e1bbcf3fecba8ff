"""The CUDA backend executed without a GPU: its kernels' source compiled by g++, its Python class on CPU tensors."""

import re
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from benchmarks.gpu_suite import row_passes
from dadpo_kernels.ops import autograd
from dadpo_kernels.ops.backends.registry import BACKENDS, Backend
from tests.ops import contract
from tests.ops.contract import Subject, budgets, operator_arguments
from tests.support import cuda_host
from tests.support.waiting import assert_no_waiting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUBJECT = Subject(
    "host", DTYPES, rows=21, vocab=700, options=("plain", "bias", "softcap", "all"), examples=20, largest=(20, 700, 40)
)


@pytest.fixture(scope="session")
def host():
    return cuda_host.load(cuda_host.plain())


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

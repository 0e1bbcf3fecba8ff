"""AMX's path of the CPU backend, its registers in software (`tests/support/cpu_tiles`): bfloat16 on any processor."""

import pytest
import torch

from dadpo_kernels.ops.backends import cpu
from dadpo_kernels.ops.live import cpu_pass
from tests.ops import contract
from tests.ops.contract import Subject
from tests.support import cpu_tiles
from tests.support.dense import Standard, assert_as_good_as_dense, random_problem, values_and_grads
from tests.support.threads import assert_close, on_threads

SUBJECT = Subject("cpu", (torch.bfloat16,), rows=37, tile=384, options=("plain", "all"), examples=15)


@pytest.fixture(scope="module")
def tiles():
    return cpu_tiles.load()


@pytest.fixture(autouse=True)
def extension(tiles, monkeypatch):
    monkeypatch.setattr(cpu, "_cpu", tiles)
    monkeypatch.setattr(cpu_pass, "_cpu", tiles)


class TestValues(contract.Values):
    subjects = (SUBJECT,)


class TestConduct(contract.Conduct):
    subjects = (SUBJECT,)


class TestRealHiddenStates(contract.RealHiddenStates):
    subjects, rows = (SUBJECT,), 20


class TestTopk(contract.Topk):
    subjects = (SUBJECT,)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 96, 511, 513, 1090])
def test_widths(width):
    """Slices of the depth that are whole, cut or alone, sweeps of them; rows for a register, two, and three blocks."""
    for rows in (1, 15, 17, 33, 70, 101):
        p = random_problem(rows=rows, vocab=230, width=width)
        assert_as_good_as_dense(p, torch.bfloat16, "cpu", 0, 2**31)
        p.options["grad_tolerance"] = 1e-12
        assert_as_good_as_dense(p, torch.bfloat16, "cpu", 2**31)


def test_uneven_sweeps():
    p = random_problem(rows=1700, vocab=210, width=600)
    standard = Standard.of(p, torch.bfloat16)
    standard.check(values_and_grads(p.to(torch.bfloat16), "cpu", 0))


def test_results_do_not_depend_on_the_number_of_threads():
    p = random_problem(rows=103, vocab=900, width=70).to(torch.bfloat16)
    assert_close(on_threads((1, 2, 5), lambda: values_and_grads(p, "cpu", 100_000)))

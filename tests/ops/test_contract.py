"""The contract itself: each of its tests fails for a backend that gives zeros."""

from functools import partial

import hypothesis
import pytest
import torch

import dadpo_kernels
from dadpo_kernels.ops.backends.registry import BACKENDS
from tests.ops import contract
from tests.ops.contract import Subject
from tests.support import dense

ZEROS = Subject("zeros", (torch.float32,), rows=9, vocab=300, tile=128, options=("plain",), examples=5)


@pytest.fixture(autouse=True)
def zeros(monkeypatch):
    """Tells the plans of "torch", and gives zeros where its results should be, -inf included."""
    monkeypatch.setitem(BACKENDS, "zeros", BACKENDS["torch"])

    def of(function):
        def run(*tensors, backend, **keywords):
            out = function(*tensors, backend="torch" if backend == "zeros" else backend, **keywords)
            if backend != "zeros":
                return out
            return type(out)(*(None if o is None else o.nan_to_num(0, 0, 0) * 0 for o in out))

        return run

    for module in (contract, dense):
        monkeypatch.setattr(module, "linear_selected_logps", of(dadpo_kernels.linear_selected_logps))
    monkeypatch.setattr(contract, "linear_topk_logps", of(dadpo_kernels.linear_topk_logps))
    first_failure = {"phases": [hypothesis.Phase.generate], "report_multiple_bugs": False, "database": None}
    monkeypatch.setattr(contract, "settings", partial(hypothesis.settings, **first_failure))


@pytest.mark.xfail(strict=True, raises=AssertionError)
class TestValues(contract.Values):
    subjects = (ZEROS,)


@pytest.mark.xfail(strict=True, raises=AssertionError)
class TestConduct(contract.Conduct):
    subjects = (ZEROS,)


@pytest.mark.xfail(strict=True, raises=AssertionError)
class TestTopk(contract.Topk):
    subjects = (ZEROS,)

"""Top-k log-probabilities on every backend against a float64 sort."""

import pytest
import torch
from torch.library import opcheck

import dadpo_kernels.ops.topk_logps as module
from dadpo_kernels import linear_selected_logps, linear_topk_logps
from dadpo_kernels.ops.backends import cpu
from dadpo_kernels.ops.backends.registry import BACKENDS, resolve
from tests.ops import contract
from tests.ops.contract import Subject, check_topk
from tests.support.dense import IGNORE, Problem, random_problem

OPTIONS = ("bias", "softcap", "temperature", "all")


class TestTopk(contract.Topk):
    subjects = (
        Subject("torch", (torch.float32, torch.bfloat16, torch.float64), rows=51, options=OPTIONS),
        Subject("cpu", (torch.float32, torch.bfloat16), rows=51, tile=384, options=OPTIONS),
    )


def test_ties_of_the_reference_go_to_the_lowest_id():
    """Every other backend is held to the reference's order."""
    hidden, weight = torch.ones(2, 8), torch.zeros(1200, 8)
    weight[700:720] = 1
    weight[1100] = 2
    got = linear_topk_logps(hidden, weight, 40, backend="reference")
    assert got.ids.tolist() == [[1100, *range(700, 720), *range(19)]] * 2


@pytest.mark.parametrize("isa", cpu._cpu.available() if cpu._cpu else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa, dtype):
    best = cpu._cpu.active()
    cpu._cpu.use(isa)
    try:
        check_topk(random_problem(rows=97, vocab=1100, width=77).to(dtype), 33, "cpu")
    finally:
        cpu._cpu.use(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_hidden_states(smollm2, dtype):
    check_topk(Problem(*smollm2).to(dtype), 64, "cpu")


def test_agrees_with_the_primitive(smollm2):
    hidden, weight, labels = smollm2
    top = linear_topk_logps(hidden, weight, 16, labels=labels)
    selected = linear_selected_logps(hidden, weight, labels, top.ids)
    torch.testing.assert_close(top.logps, selected.topk, rtol=0, atol=1e-5)
    torch.testing.assert_close(top.tail, selected.tail, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.label, selected.label, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_opcheck(backend):
    labels = torch.randint(600, (9,))
    labels[3] = IGNORE
    opcheck(
        module._topk_logps, (torch.randn(9, 8), torch.randn(600, 8), None, labels, 5, 1.0, None, 1.0, IGNORE, backend)
    )


def test_bad_arguments():
    hidden, weight = torch.randn(4, 8), torch.randn(50, 8)
    for k in (-1, 51):
        with pytest.raises(ValueError, match=rf"k={k} must lie in \[0, V=50\]"):
            linear_topk_logps(hidden, weight, k)
    with pytest.raises(ValueError, match=r"labels\[1\] is 50"):
        linear_topk_logps(hidden, weight, 3, labels=torch.tensor([0, 50, 1, 2]))
    with pytest.raises(ValueError, match="above the cpu backend's"):
        linear_topk_logps(hidden, torch.randn(5000, 8), 3000, backend="cpu")
    assert linear_topk_logps(hidden, torch.randn(5000, 8), 3000).ids.shape == (4, 3000)


def test_auto_prefers_the_faster_select(monkeypatch):
    """Where it is there; the order of everything else is the registry's."""
    obstacles = {"cuda": None, "triton": None, "triton_rows": None}
    for name in obstacles:
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(obstacle=lambda *_, name=name: obstacles[name]))
    gpu = torch.device("cuda", 0)
    assert resolve("auto", gpu, torch.bfloat16, module.FASTEST) == "cuda"
    assert resolve("auto", gpu, torch.bfloat16) == "triton"
    assert resolve("triton", gpu, torch.bfloat16, module.FASTEST) == "triton"
    assert resolve("auto", torch.device("cpu"), torch.float32, module.FASTEST) == "cpu"
    obstacles["cuda"] = "it is not built"
    assert resolve("auto", gpu, torch.bfloat16, module.FASTEST) == "triton"

"""The primitive on every backend, plan, dtype and option against float64, value and gradient."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from dadpo_kernels import linear_selected_logps
from dadpo_kernels.ops import autograd, checks
from dadpo_kernels.ops.backends import cpu, registry
from dadpo_kernels.ops.run import Run, plan_for
from tests.ops import contract
from tests.ops.contract import Subject, operator_arguments
from tests.support.dense import Standard, random_problem, values_and_grads
from tests.support.threads import assert_close, on_threads

BACKENDS = [
    Subject("torch", (torch.float32, torch.bfloat16, torch.float64)),
    Subject("cpu", (torch.float32, torch.bfloat16), tile=384),
]


class TestValues(contract.Values):
    subjects = BACKENDS


class TestConduct(contract.Conduct):
    subjects = BACKENDS


class TestRealHiddenStates(contract.RealHiddenStates):
    subjects = BACKENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype):
    p = random_problem(rows=300, vocab=3000).to(dtype)
    assert_close(on_threads((1, 2, 3), lambda: values_and_grads(p, "cpu", 2_000_000)))


@pytest.mark.skipif(cpu._cpu is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(dtype):
    problems = [
        random_problem(rows=97, vocab=1100, width=77, bias=True, softcap=5.0),
        # Several uneven sweeps of both inner dimensions; two operands a unit in bfloat16.
        random_problem(rows=1700, vocab=210, width=2179),
    ]
    best = cpu._cpu.active()
    try:
        for p in problems:
            standard = Standard.of(p, dtype)
            for isa in cpu._cpu.available():
                cpu._cpu.use(isa)
                assert cpu._cpu.active() == isa
                for budget in (0, 2**31):
                    standard.check(values_and_grads(p.to(dtype), "cpu", budget), f"{isa}, budget {budget}, ")
    finally:
        cpu._cpu.use(best)


def test_pytorchs_products_in_between():
    """On the same threads, whose AMX registers both use where there are some."""
    p = random_problem(rows=97, vocab=1100, width=77).to(torch.bfloat16)
    a = torch.randn(200, 300, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    wanted, product = values_and_grads(p, "cpu", 0), a @ a.T
    for _ in range(5):
        assert torch.equal(a @ a.T, product)
        for name, value in values_and_grads(p, "cpu", 0).items():
            assert torch.equal(value, wanted[name]), name


def test_the_first_call_does_not_import_the_compiler():
    """Which takes seconds, in a process that may never compile."""
    program = """
import sys, torch
from dadpo_kernels import linear_dadpo_loss, linear_selected_logps, linear_topk_logps
hidden, weight, labels = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16), torch.randint(100, (8,))
linear_selected_logps(hidden, weight, labels).label.sum().backward()
linear_topk_logps(hidden, weight, 3)
assert hidden.grad is not None
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_device_takes_the_whole_message(monkeypatch):
    """PyTorch's assertion on CUDA raises for more than 254 characters: on a first GPU every call failed by that."""
    messages = []
    monkeypatch.setattr(torch, "_assert_async", lambda _, message: messages.append(message))
    checks.check_range("topk_ids", torch.empty(3, 5, dtype=torch.int64, device="meta"), 10**7)
    checks.require(torch.ones(1, dtype=torch.bool, device="meta"), torch.ones(1), "name", "x" * 999)
    uncut, cut = messages
    assert uncut.endswith("student's family")
    assert len(uncut) <= len(cut) == 254


def test_extension_is_built():
    assert cpu.obstacle(torch.device("cpu"), torch.float32) is None


def test_leading_dimensions_and_strides():
    p = random_problem(rows=60, k=5)
    want = linear_selected_logps(p.hidden, p.weight, p.labels, p.topk_ids)
    hidden = p.hidden.view(3, 20, -1).transpose(0, 1).contiguous().transpose(0, 1)  # non-contiguous, same values
    weight = p.weight.T.contiguous().T
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    got = linear_selected_logps(hidden, weight, p.labels.view(3, 20), p.topk_ids.view(3, 20, 5).int(), memory_budget=0)
    assert got.topk.shape == (3, 20, 5)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.flatten(), b.flatten())


def test_tied_weight_collects_both_gradients():
    p = random_problem(k=None)
    table = p.weight.clone().requires_grad_()
    tokens = torch.arange(len(p.labels))

    def run(backend):
        table.grad = None
        hidden = torch.nn.functional.embedding(tokens, table)
        linear_selected_logps(hidden, table, p.labels, backend=backend).label.sum().backward()
        return table.grad

    torch.testing.assert_close(run("cpu"), run("reference"), rtol=1e-5, atol=1e-5)


def test_autocast_casts_as_a_linear_does():
    p = random_problem()
    hidden = p.hidden.clone().requires_grad_()
    weight = p.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_selected_logps(hidden, weight, p.labels, p.topk_ids)
    out.label.sum().backward()
    want = linear_selected_logps(p.hidden.bfloat16(), p.weight.bfloat16(), p.labels, p.topk_ids)
    assert torch.equal(out.label, want.label)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert weight.grad.abs().max() > 0


def test_checkpointing_and_retained_graph():
    p = random_problem()
    hidden = p.hidden.clone().requires_grad_()

    def run(h):
        return linear_selected_logps(h, p.weight, p.labels, p.topk_ids).tail.sum()

    direct = torch.autograd.grad(run(hidden), hidden)[0]
    loss = run(hidden)
    twice = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2)]
    checkpointed = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False), hidden)[0]
    for other in (*twice, checkpointed):
        assert torch.equal(direct, other)


def test_no_grad_retains_nothing():
    p = random_problem()
    weight = p.weight.clone().requires_grad_()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
        torch.no_grad(),
    ):
        out = linear_selected_logps(p.hidden, weight, p.labels)
    assert not saved
    assert not out.label.requires_grad
    assert out.label.abs().sum() > 0


def test_compiled_as_one_node():
    p = random_problem()

    def loss(hidden, weight):
        out = linear_selected_logps(hidden, weight, p.labels, p.topk_ids)
        return out.label.sum() + (out.topk.exp() * 0.1).sum() + out.tail.mean()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(*leaves), leaves))
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize(("backend", "vocab", "tile"), [("torch", 600, 300), ("cpu", 1024, 384)])
@pytest.mark.parametrize("retain", [False, True])
def test_opcheck(monkeypatch, backend, vocab, tile, retain):
    monkeypatch.setattr(registry.BACKENDS[backend].tiles, "tile_columns", staticmethod(lambda *_: tile))
    opcheck(autograd.selected_logps, operator_arguments(backend, 64, vocab, retain))


def test_second_derivative_raises():
    p = random_problem()
    hidden = p.hidden.clone().requires_grad_()
    loss = linear_selected_logps(hidden, p.weight, p.labels, p.topk_ids).label.sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": 1000}, ValueError, r"labels\[0\] is 1000.*\[0, 1000\)"),
        ({"labels": -1}, ValueError, r"labels\[0\] is -1"),
        ({"topk_ids": 1000}, ValueError, r"topk_ids\[0, 0\] is 1000"),
        ({"topk_ids": -7}, ValueError, r"topk_ids\[0, 0\] is -7"),
    ],
)
def test_ids_out_of_range(backend, change, error, message):
    p = random_problem(k=2)
    for name, value in change.items():
        getattr(p, name).flatten()[0] = value
    with pytest.raises(error, match=message):
        linear_selected_logps(p.hidden, p.weight, p.labels, p.topk_ids, backend=backend)


def test_bad_arguments():
    p = random_problem(k=2)

    def call(**kw):
        args = {"hidden": p.hidden, "weight": p.weight, "labels": p.labels, "topk_ids": p.topk_ids} | kw
        return linear_selected_logps(**args)

    for kw, error, message in [
        ({"hidden": p.hidden[:, :-1]}, ValueError, "last dimension H"),
        ({"weight": p.weight[0]}, ValueError, r"weight \[V, H\]"),
        ({"weight": p.weight[:0]}, ValueError, "gather a sharded weight"),
        ({"weight": p.weight.bfloat16()}, TypeError, "cast one of them"),
        ({"hidden": p.hidden.int()}, TypeError, "hidden has dtype torch.int32"),
        ({"labels": p.labels.float()}, TypeError, "labels has dtype torch.float32"),
        ({"labels": p.labels[:-1]}, ValueError, "labels has shape"),
        ({"topk_ids": p.topk_ids[0]}, ValueError, "topk_ids has shape"),
        ({"bias": torch.zeros(3)}, ValueError, "expected \\[V\\]"),
        ({"bias": torch.zeros(1000).double()}, TypeError, "bias is torch.float64"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale=nan"),
        ({"memory_budget": -1}, ValueError, "memory_budget=-1"),
        ({"backend": "cuda9"}, ValueError, "backend='cuda9' is unknown"),
        ({"hidden": p.hidden.double(), "weight": p.weight.double(), "backend": "cpu"}, ValueError, "cannot run"),
    ]:
        with pytest.raises(error, match=message):
            call(**kw)


def test_plan_is_inspectable():
    plan = plan_for(1024, 49152, 576, torch.bfloat16, backend="cpu", memory_budget=0)
    assert (plan.name, plan.units) == ("recompute", 4)
    plan = plan_for(1024, 49152, 576, torch.bfloat16, backend="cpu", memory_budget=2**31, grad_weight=False)
    assert (plan.name, plan.units) == ("retain", 2)
    assert "frozen head" in str(plan)
    buffer = Run(memory_budget=2**40).buffer_bytes(1024, 49152, torch.bfloat16, "cpu")
    assert plan.retained_bytes <= buffer < 1.05 * plan.retained_bytes
    half = plan_for(1024, 49152, 576, torch.bfloat16, backend="cpu", memory_budget=plan.retained_bytes // 2)
    assert half.name == "partial"
    assert 3 < half.units < 4
    assert half.retained_bytes <= plan.retained_bytes // 2

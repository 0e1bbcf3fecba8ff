"""The primitive on every backend, plan, dtype and option against float64, value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dadpo_kernels import linear_selected_logps
from dadpo_kernels.ops import autograd
from dadpo_kernels.ops.backends import cpu
from dadpo_kernels.ops.run import Run, plan_for
from tests.support.dense import IGNORE, Problem, assert_as_good_as_dense, random_problem, values_and_grads

BACKENDS = [("torch", d) for d in (torch.float32, torch.bfloat16, torch.float64)] + [
    ("cpu", d) for d in (torch.float32, torch.bfloat16)
]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 1.7},
    "all": {"bias": True, "logit_scale": -0.5, "softcap": 6.0, "temperature": 0.7},
}
# 0: recompute; a third of the exponentials: partial retention; plenty: retain.
BUDGETS = {"recompute": 0, "partial": 300_000, "retain": 2**31}


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Small tiles, so that small problems cross tile boundaries."""
    monkeypatch.setattr("dadpo_kernels.ops.backends.torch_.TorchTiles.tile_columns", staticmethod(lambda *_: 300))
    monkeypatch.setattr("dadpo_kernels.ops.backends.cpu.CpuTiles.tile_columns", staticmethod(lambda *_: 384))


@pytest.mark.parametrize("plan", BUDGETS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_random_inputs(backend, dtype, option, plan):
    assert_as_good_as_dense(random_problem(vocab=1300, **OPTIONS[option]), dtype, backend, BUDGETS[plan])


@pytest.mark.parametrize("k", [None, 0, 1, 64])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_number_of_ids(backend, dtype, k):
    assert_as_good_as_dense(random_problem(vocab=777, width=33, k=k), dtype, backend, 100_000)


@pytest.mark.parametrize("budget", [0, 2**31])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[:2] + BACKENDS[3:])
def test_real_hidden_states(smollm2, backend, dtype, budget, monkeypatch):
    monkeypatch.undo()  # the tiles a user gets
    hidden, weight, labels = smollm2
    labels = labels.clone()
    labels[:30] = IGNORE
    ids = (hidden + 0.3 * torch.randn_like(hidden)) @ weight.T
    assert_as_good_as_dense(Problem(hidden, weight, labels, ids.topk(16).indices), dtype, backend, budget)


@given(
    rows=st.integers(1, 30),
    vocab=st.integers(1, 700),
    width=st.integers(1, 70),
    k=st.none() | st.integers(0, 9),
    masked=st.floats(0, 1),
    backend=st.sampled_from(BACKENDS),
    budget=st.sampled_from([0, 20_000, 2**31]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, vocab, width, k, masked, backend, budget, seed):
    p = random_problem(rows, vocab, width, k, seed=seed)
    g = torch.Generator().manual_seed(seed)
    p.labels[torch.rand(rows, generator=g) < masked] = IGNORE
    assert_as_good_as_dense(p, backend[1], backend[0], budget)


@pytest.mark.parametrize("budget", [0, 2**31])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
class TestExtremes:
    def test_minus_infinity(self, backend, budget):
        """Forbidden tokens: -inf in the bias, among the ids, as a label, and a whole first tile of them."""
        p = random_problem(vocab=1300, bias=True)
        p.bias[:600] = -torch.inf
        p.bias[900:950] = -torch.inf
        p.topk_ids[:, 1] = 920
        p.labels[0] = 10
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    def test_confident_student(self, backend, budget):
        """A tail of e^-60: its logarithm keeps its digits, and so does the gradient that it alone carries."""
        p = random_problem(vocab=1300, k=3)
        p.topk_ids[:, 0] = 5
        p.weight[5] = 0
        p.bias = torch.zeros(1300)
        p.bias[5] = 80.0
        assert_as_good_as_dense(p, torch.float32, backend, budget)
        assert values_and_grads(p, backend, budget)["tail"].min() < -50

    @pytest.mark.parametrize("offset", [-60.0, 60.0, 300.0])
    def test_offset_logits(self, backend, budget, offset):
        p = random_problem(vocab=1300)
        p.bias = torch.full((1300,), offset)
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    def test_far_apart_tiles(self, backend, budget):
        """Logits of one tile 200 above those of the others: nothing overflows, underflow is exact zero."""
        p = random_problem(vocab=1300)
        p.bias = torch.zeros(1300)
        p.bias[600:900] = 200.0
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    def test_gradients_that_cancel(self, backend, budget):
        """No gradient reaches the lse: what multiplies the softmax is 0, and the selected entries stand."""
        p = random_problem(vocab=1300, bias=True)
        grads = []
        for name in (backend, "reference"):
            hidden = p.hidden.clone().requires_grad_()
            out = linear_selected_logps(hidden, p.weight, p.labels, p.topk_ids, backend=name, memory_budget=budget)
            (p.topk_ids.shape[1] * out.label.sum() - out.topk.sum()).backward()
            grads.append(hidden.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-4)
        assert grads[0].abs().max() > 1

    def test_topk_covers_vocabulary(self, backend, budget):
        p = random_problem(rows=9, vocab=6, k=6)
        p.topk_ids[:] = torch.arange(6)
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    def test_masked_rows_hold_anything(self, backend, budget):
        p = random_problem()
        clean = values_and_grads(p, backend, budget)
        masked = p.labels == IGNORE
        p.hidden[masked] = torch.nan
        p.topk_ids[masked] = -(2**31)
        got = values_and_grads(p, backend, budget)
        for name in clean:
            assert torch.equal(got[name], clean[name]), name
        assert got["label"][masked].abs().max() == 0
        assert got["grad_hidden"][masked].abs().max() == 0
        assert got["grad_hidden"][~masked].abs().min() > 0

    def test_no_valid_token(self, backend, budget):
        p = random_problem()
        p.labels[:] = IGNORE
        got = values_and_grads(p, backend, budget)
        assert all(v.abs().sum() == 0 for v in got.values())

    def test_no_token(self, backend, budget):
        p = random_problem(rows=0)
        got = values_and_grads(p, backend, budget)
        assert got["label"].shape == (0,)
        assert got["grad_weight"].abs().sum() == 0

    def test_nan_is_not_hidden(self, backend, budget):
        p = random_problem(k=2)
        p.hidden[0, 3] = torch.nan
        out = linear_selected_logps(p.hidden, p.weight, p.labels, p.topk_ids, backend=backend, memory_budget=budget)
        assert out.label[0].isnan()
        assert out.label[2:].isfinite().all()

    def test_bitwise_repeatable(self, backend, budget):
        p = random_problem(vocab=1300)
        a, b = values_and_grads(p, backend, budget), values_and_grads(p, backend, budget)
        for name in a:
            assert torch.equal(a[name], b[name]), name

    def test_frozen_head_and_frozen_body(self, backend, budget):
        p = random_problem(bias=True)
        full = values_and_grads(p, backend, budget)
        for trained in (["hidden"], ["weight"], ["bias"], ["hidden", "bias"]):
            leaves = {k: getattr(p, k).clone().requires_grad_(k in trained) for k in ("hidden", "weight", "bias")}
            out = linear_selected_logps(
                leaves["hidden"], leaves["weight"], p.labels, p.topk_ids, bias=leaves["bias"], backend=backend,
                memory_budget=budget,
            )  # fmt: skip
            g = torch.Generator().manual_seed(1)
            sum((torch.randn(o.shape, generator=g, dtype=torch.float64) * o.double()).sum() for o in out).backward()
            for name, leaf in leaves.items():
                if name in trained:
                    torch.testing.assert_close(leaf.grad, full[f"grad_{name}"], rtol=1e-5, atol=1e-5)
                else:
                    assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype):
    p = random_problem(rows=300, vocab=3000).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values_and_grads(p, "cpu", 2_000_000))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("isa", cpu._cpu.available() if cpu._cpu else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa, dtype):
    best = cpu._cpu.active()
    cpu._cpu.use(isa)
    try:
        assert cpu._cpu.active() == isa
        for budget in (0, 2**31):
            p = random_problem(rows=97, vocab=1100, width=77, bias=True, softcap=5.0)
            assert_as_good_as_dense(p, dtype, "cpu", budget)
            # Several uneven sweeps of both inner dimensions; two operands a unit in bfloat16.
            assert_as_good_as_dense(random_problem(rows=1700, vocab=210, width=2179), dtype, "cpu", budget)
    finally:
        cpu._cpu.use(best)


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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("retain", [False, True])
def test_opcheck(backend, retain):
    # Shapes for which the retained buffer is filled to the last byte: opcheck compares outputs, and spare bytes are
    # whatever memory held.
    rows, vocab = 64, {"torch": 600, "cpu": 1024}[backend]
    plan = plan_for(rows, vocab, 8, torch.float32, backend=backend, memory_budget=2**31)
    args = (
        torch.randn(rows, 8, requires_grad=True),
        torch.randn(vocab, 8, requires_grad=True),
        torch.randn(vocab, requires_grad=True),
        torch.randint(vocab, (rows,)),
        torch.randint(vocab, (rows, 3)),
        1.0, 30.0, 1.0, IGNORE, backend, None, plan.retained_bytes if retain else 0,
    )  # fmt: skip
    opcheck(autograd.selected_logps, args)


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
    buffer = Run(memory_budget=2**40).buffer_bytes(1024, 49152, torch.bfloat16)
    assert plan.retained_bytes <= buffer < 1.05 * plan.retained_bytes
    half = plan_for(1024, 49152, 576, torch.bfloat16, backend="cpu", memory_budget=plan.retained_bytes // 2)
    assert half.name == "partial"
    assert 3 < half.units < 4
    assert half.retained_bytes <= plan.retained_bytes // 2

"""The live plan: its error is the one it reports and stays under the tolerance, whatever the head and the loss."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dadpo_kernels import linear_selected_logps, live_diagnostics
from dadpo_kernels.ops import autograd
from dadpo_kernels.ops.backends.cpu import _cpu
from dadpo_kernels.ops.live.plan import LIVE_TILE, live_buffer_bytes, make_live_plan
from tests.ops import contract
from tests.ops.contract import Subject, operator_arguments
from tests.support.dense import IGNORE, Problem, Standard, finite, random_problem, values_and_grads
from tests.support.threads import assert_close, on_threads

BACKENDS = ["torch", "cpu"]
OPTIONS = ("plain", "bias", "softcap", "all")
EXACT = {"tile": 256, "options": OPTIONS, "examples": 15, "grad_tolerance": 1e-12}
BUDGETS = {"recompute": 0, "partial": 8_000, "retain": 2**31}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Small chunks and tiles, so that small problems have many of both."""
    monkeypatch.setattr("dadpo_kernels.ops.live.plan.live_chunk", lambda vocab: 16)
    monkeypatch.setattr("dadpo_kernels.ops.live.plan.LIVE_TILE", 256)


def live(p: Problem, backend: str, tolerance: float, budget: int | None = None):
    """Outputs and gradients by name, and what the backward reports."""
    tolerant = replace(p, options={**p.options, "grad_tolerance": tolerance})
    with live_diagnostics() as done:
        got = values_and_grads(tolerant, backend, budget)
    assert len(done) == 1
    return got, done[0]


def exact_dz(p: Problem) -> torch.Tensor:
    """The gradient of the logits `[N, V]` in float64 under the loss of `values_and_grads`."""
    wide = p.to(torch.float64)
    logits = wide.hidden @ wide.weight.T
    identity = Problem(
        logits, torch.eye(len(p.weight), dtype=torch.float64), p.labels, p.topk_ids, wide.bias, p.options
    )
    return values_and_grads(identity, "reference")["grad_hidden"]


def zipf_problem(
    rows: int = 90, vocab: int = 1000, width: int = 24, k: int | None = 7, seed: int = 0, bias: bool = True
) -> Problem:
    """A head with frequent and rare words, as trained ones have, and labels drawn from it; a third masked.

    Frequencies are in the bias, so it always has one.
    """
    assert bias
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * 0.4
    frequency = -2.0 * torch.arange(1, vocab + 1).log()[torch.randperm(vocab, generator=g)]
    p = (hidden @ weight.T + frequency).softmax(-1)
    labels = torch.multinomial(p, 1, generator=g)[:, 0]
    labels[1::3] = IGNORE
    ids = (
        None
        if k is None
        else (hidden @ weight.T + frequency + torch.randn(rows, vocab, generator=g)).topk(max(k, 1))[1]
    )
    return Problem(hidden, weight, labels, None if ids is None else ids[:, :k], frequency)


def heads() -> dict[str, Problem]:
    """Softmax shapes that could break a rank-one tail."""
    zipf = zipf_problem()
    uniform = random_problem(rows=90)
    uniform.weight *= 0.01
    one_hot = random_problem(rows=90)
    one_hot.weight *= 20
    # A cross: one token spreads its mass over all columns, one column takes mass from all tokens. The rank-one form
    # of that is far from it, and worse than dropping.
    cross = Problem(torch.full((60, 60), -8.0), torch.eye(1000, 60), torch.full((60,), 999), None, torch.zeros(1000))
    cross.hidden[0] = -2.0
    cross.hidden[:, 0] = -2.0
    cross.bias[999] = 12.0
    # Two languages in a chunk: every other token knows only half of the vocabulary.
    languages = zipf_problem()
    languages.hidden = torch.cat([languages.hidden, torch.eye(2).repeat(45, 1) * 6], 1)
    languages.weight = torch.cat([languages.weight, torch.eye(2).repeat(500, 1)], 1)
    return {"zipf": zipf, "uniform": uniform, "one_hot": one_hot, "cross": cross, "languages": languages}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("k", [None, 7])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("cpu", torch.float32)]
)
def test_the_certificate_is_the_error(backend, dtype, k, budget):
    """With the identity as the head, hidden's gradient is the gradient of the logits itself."""
    p = zipf_problem(k=k)
    logits = p.hidden @ p.weight.T
    p = Problem(logits, torch.eye(1000), p.labels, p.topk_ids, p.bias).to(dtype)
    for tolerance in (1e-3, 1e-2):
        got, report = live(p, backend, tolerance, BUDGETS[budget])
        exact = values_and_grads(p.to(torch.float64), "reference")["grad_hidden"]
        error = (got["grad_hidden"].double() - exact).norm() / exact.norm()
        assert 0.1 * tolerance < report.certificate <= tolerance
        assert error == pytest.approx(report.certificate, rel=0.02)
        assert report.live_share < 0.7
        # Random coefficients on the tail's logarithm, far from what a log-likelihood has, are caught by the backward.
        assert report.exact_share == 0 if k is None else report.exact_share < 0.7


@pytest.mark.parametrize("head", heads())
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_stay_under_the_bound(backend, head):
    """`|dz' - dz| <= t |dz|` bounds the parameters' gradients through the largest singular values."""
    p = heads()[head]
    exact, dz = values_and_grads(p.to(torch.float64), "reference"), exact_dz(p)
    for tolerance in (1e-4, 1e-3, 1e-2):
        got, report = live(p, backend, tolerance)
        assert report.certificate <= tolerance
        for name, other in (("grad_hidden", p.weight), ("grad_weight", p.hidden[p.labels != IGNORE])):
            error = (got[name].double() - exact[name]).norm()
            rounding = 1e-5 * dz.norm() * torch.linalg.matrix_norm(other, 2)
            assert error <= tolerance * dz.norm() * torch.linalg.matrix_norm(other, 2) + rounding
            assert got[name].norm() > 0
        for name in ("label", "topk", "tail"):
            torch.testing.assert_close(finite(got[name]).double(), finite(exact[name]), rtol=1e-5, atol=2e-5)


class TestValues(contract.Values):
    """A tolerance of nothing: every column turns live, and the tolerance of the exact plans holds."""

    subjects = (
        Subject("torch", (torch.float32, torch.bfloat16, torch.float64), **EXACT),
        Subject("cpu", (torch.float32, torch.bfloat16), **EXACT),
    )


class TestConduct(contract.Conduct):
    """With live and dead columns."""

    subjects = tuple(
        Subject(backend, rows=90, vocab=1000, tile=256, make=zipf_problem, grad_tolerance=1e-2) for backend in BACKENDS
    )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend, dtype, option):
    options = contract.OPTIONS[option]
    p = zipf_problem()
    p.options = {name: value for name, value in options.items() if name != "bias"}
    p = p.to(dtype)
    exact = values_and_grads(p.to(torch.float64), "reference")
    plain = values_and_grads(p, "reference")
    for budget in BUDGETS.values():
        got, report = live(p, backend, 5e-3, budget)
        assert 0 < report.live_share < 1
        for name in ("grad_hidden", "grad_weight", "grad_bias"):
            error = (got[name].double() - exact[name]).norm() / exact[name].norm()
            rounding = (plain[name].double() - exact[name]).norm() / exact[name].norm()
            assert error < 10 * 5e-3 + 3 * rounding + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 3.0])
def test_real_hidden_states(smollm2, sharpness, monkeypatch):
    """From nearly uniform, as after initialisation, to overconfident; the tiles a user gets, two chunks and a bit."""
    monkeypatch.setattr("dadpo_kernels.ops.live.plan.LIVE_TILE", LIVE_TILE)
    monkeypatch.setattr("dadpo_kernels.ops.live.plan.live_chunk", lambda vocab: 40)
    hidden, weight, labels = smollm2
    hidden = hidden * sharpness
    g = torch.randn(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = hidden.double() @ weight.double().T
    dz = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0).sub_(logits.softmax(1)) * g[:, None]
    singular = [torch.linalg.eigvalsh(m.double().T @ m.double())[-1].sqrt() for m in (weight, hidden)]
    exact = dz @ weight.double(), dz.T @ hidden.double()
    for backend, tolerance in product(BACKENDS, (1e-3, 1e-2)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_selected_logps(*leaves, labels, backend=backend, grad_tolerance=tolerance)
        with live_diagnostics() as done:
            got = torch.autograd.grad((out.label * g).sum(), leaves)
        assert done[0].certificate <= tolerance
        assert sharpness < 1 or done[0].live_share < 0.3
        for value, want, norm in zip(got, exact, singular, strict=True):
            error = (value.double() - want).norm()
            assert error <= (tolerance + 1e-5) * dz.norm() * norm
            assert error < 8 * tolerance * want.norm()  # what is measured; the line above is what is proved


def test_mass_of_every_token_and_column_is_kept():
    p = zipf_problem(k=None)
    p.labels = p.labels.where(p.labels != IGNORE, 3)
    logits = (p.hidden @ p.weight.T).double()

    def gradient(**options):
        h = logits.clone().requires_grad_()
        eye = torch.eye(1000, dtype=torch.float64)
        linear_selected_logps(h, eye, p.labels, bias=p.bias.double(), **options).label.sum().backward()
        return h.grad

    exact, got = gradient(backend="reference"), gradient(backend="torch", grad_tolerance=0.02)
    assert (got - exact).norm() > 1e-3 * exact.norm()
    torch.testing.assert_close(got.sum(1), exact.sum(1), rtol=0, atol=1e-12)
    for chunk in range(0, len(logits), 16):
        part = slice(chunk, chunk + 16)
        torch.testing.assert_close(got[part].sum(0), exact[part].sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_the_forward_did_not_expect_is_recomputed_exactly(backend):
    """Only confident tokens, of which a log-likelihood would want next to nothing, carry gradient: of their tail."""
    p = zipf_problem(k=7)
    p.hidden *= torch.where(torch.arange(len(p.labels)) % 16 < 2, 6.0, 1.0)[:, None]

    def gradients(**options):
        h, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        out = linear_selected_logps(h, w, p.labels, p.topk_ids, bias=p.bias, **options)
        chosen = torch.arange(len(p.labels)) % 16 < 2
        (out.tail * chosen).sum().backward()
        return h.grad, w.grad

    with live_diagnostics() as done:
        got = gradients(backend=backend, grad_tolerance=1e-2)
    assert done[0].exact_share > 0
    assert done[0].certificate <= 1e-2
    for a, b in zip(got, gradients(backend="reference"), strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("budget", [0, 2**31])
@pytest.mark.parametrize("backend", BACKENDS)
class TestReports:
    """What the backward tells of problems whose results the contract checks."""

    def test_a_forbidden_column_is_dead(self, backend, budget):
        p = contract.minus_infinity(Subject(backend, vocab=1300, tile=400))
        assert live(p, backend, 1e-4, budget)[1].live_share < 0.55

    def test_nan_is_exact_or_live(self, backend, budget):
        p = zipf_problem(k=2)
        p.hidden[0, 3] = torch.nan
        _, report = live(p, backend, 1e-2, budget)
        assert 0 < report.exact_share < 1 or report.live_share > 0.2

    @pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
    def test_frozen_parts_cost_less(self, backend, budget, trained):
        p = zipf_problem()
        p.options["grad_tolerance"] = 1e-2
        with live_diagnostics() as done:
            values_and_grads(p, backend, budget, trained)
        assert done[0].units < 1 + done[0].live_share * (1 + (budget == 0)) + 1e-6


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 700),
    width=st.integers(1, 40),
    k=st.none() | st.integers(0, 9),
    masked=st.floats(0, 1),
    backend=st.sampled_from(BACKENDS),
    tolerance=st.sampled_from([1e-12, 1e-3, 0.05]),
    budget=st.sampled_from([0, 20_000, 2**31]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(rows, vocab, width, k, masked, backend, tolerance, budget, seed):
    p = random_problem(rows, vocab, width, k, seed=seed)
    p.labels[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < masked] = IGNORE
    if (p.labels == IGNORE).all():
        return
    got, report = live(p, backend, tolerance, budget)
    assert report.certificate <= tolerance
    exact, dz = values_and_grads(p.to(torch.float64), "reference"), exact_dz(p)
    for name, other in (("grad_hidden", p.weight), ("grad_weight", p.hidden)):
        scale = dz.norm() * torch.linalg.matrix_norm(other, 2)
        assert (got[name].double() - exact[name]).norm() <= (tolerance + 2e-5) * scale + 1e-5


def test_budget_changes_the_cost_only():
    p = zipf_problem()
    results = [live(p, "torch", 1e-2, budget) for budget in BUDGETS.values()]
    assert results[0][1].units > results[1][1].units > results[2][1].units
    share = results[0][1].live_share
    assert results[0][1].units == pytest.approx(1 + 3 * share)
    assert results[2][1].units == pytest.approx(1 + 2 * share)
    for got, report in results[1:]:
        assert report.certificate == results[0][1].certificate
        for name, value in got.items():
            torch.testing.assert_close(value, results[0][0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tolerance", [1e-12, 1e-2])
def test_threads_do_not_change_the_result(tolerance):
    """Not a bit where all columns are live; the ghosts' products are PyTorch's."""
    results = on_threads((1, 2, 3, 7), lambda: live(zipf_problem(rows=120), "cpu", tolerance)[0])
    exact = tolerance < 1e-3
    assert_close(results, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.skipif(_cpu is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(dtype, monkeypatch):
    """Several uneven sweeps of both inner dimensions, an odd number of tokens, and live columns with gaps."""
    monkeypatch.setattr("dadpo_kernels.ops.live.plan.LIVE_TILE", 2000)
    monkeypatch.setattr("dadpo_kernels.ops.live.plan.live_chunk", lambda vocab: 701)
    p = random_problem(rows=1101, vocab=3001, width=77, k=3, bias=True)
    p.bias[torch.rand(3001, generator=torch.Generator().manual_seed(0)) < 0.4] = -torch.inf
    standard, best = Standard.of(p, dtype), _cpu.active()
    try:
        for isa in _cpu.available():
            _cpu.use(isa)
            assert _cpu.active() == isa
            for budget in (0, 2**31):
                got, report = live(p.to(dtype), "cpu", 1e-12, budget)
                standard.check(got, f"{isa}, budget {budget}, ")
                assert report.live_share < 0.8
    finally:
        _cpu.use(best)


def test_without_gradients_there_is_no_live_plan():
    p = zipf_problem()
    with live_diagnostics() as done, torch.no_grad():
        out = linear_selected_logps(p.hidden, p.weight, p.labels, p.topk_ids, bias=p.bias, grad_tolerance=0.1)
    want = linear_selected_logps(p.hidden, p.weight, p.labels, p.topk_ids, bias=p.bias)
    assert not done
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("retain", [False, True])
def test_opcheck(backend, retain):
    # Every column live, so that the buffer is filled to the last byte.
    opcheck(autograd.selected_logps, operator_arguments(backend, 64, 600, retain, 1e-12))


def test_compiled_as_one_node():
    p = zipf_problem()

    def loss(hidden, weight):
        out = linear_selected_logps(hidden, weight, p.labels, p.topk_ids, grad_tolerance=1e-2)
        return out.label.sum() + (out.topk.exp() * 0.1).sum() + out.tail.mean()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(*leaves), leaves))
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, 1.0, float("nan")])
def test_bad_tolerance(tolerance):
    p = random_problem()
    with pytest.raises(ValueError, match=r"grad_tolerance=.*pass None for exact"):
        linear_selected_logps(p.hidden, p.weight, p.labels, grad_tolerance=tolerance)


def test_plan_is_inspectable():
    plan = make_live_plan(100, 40, 1000, 64, 4, live_buffer_bytes(100, 1000, 4, 5000), 1e-3)
    assert [(c.start, c.stop) for c in plan.chunks] == [(0, 16), (16, 32), (32, 40)]
    assert plan.tiles == [(0, 256), (256, 256), (512, 256), (768, 232)]
    assert plan.profile_bytes == 7 * 1000 * 4
    assert plan.retained_bytes == plan.profile_bytes + 5000
    assert (plan.name, plan.units) == ("live", 1.0)
    assert str(plan).startswith("live: at least 1.00 products of 40 tokens x 1000 columns, chunks of 16 tokens")

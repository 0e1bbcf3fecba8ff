"""What every backend owes, whatever runs it: on the CPU, as CUDA's source on the host, in Triton's interpreter, live.

The test module of a place derives from the classes below, names its `subjects`, and so runs each property on each of
them. Results are held against float64 by the policy of `tests/support/dense.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dadpo_kernels import Head, linear_selected_logps, linear_topk_logps
from dadpo_kernels.ops.backends import reference
from dadpo_kernels.ops.backends.registry import BACKENDS
from dadpo_kernels.ops.live.plan import live_buffer_bytes
from dadpo_kernels.ops.run import plan_for
from tests.support.dense import (
    IGNORE,
    Problem,
    Standard,
    assert_as_good_as_dense,
    finite,
    random_problem,
    values_and_grads,
)

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 1.7},
    "all": {"bias": True, "logit_scale": -0.5, "softcap": 6.0, "temperature": 0.7},
}
PLANS = ("recompute", "partial", "retain")


@dataclass(frozen=True)
class Subject:
    """A backend, what it takes, and how large its problems may be: slow ones get small problems and fewer options."""

    backend: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    rows: int = 61
    vocab: int = 1300
    tile: int = 300  # columns, so few that small problems cross the borders of tiles
    options: tuple[str, ...] = tuple(OPTIONS)
    problems: tuple[str, ...] = ()  # of `PROBLEMS`; none named: all
    plans: tuple[str, ...] = PLANS  # of the problems; options run with all three
    examples: int = 30  # of random shapes
    largest: tuple[int, int, int] = (30, 700, 70)  # the largest of them
    ks: tuple[int, ...] = (0, 1, 20, 256)  # of `linear_topk_logps`
    tied_rows: int = 27
    grad_tolerance: float | None = None  # of the live plan
    make: Callable[..., Problem] = random_problem

    def __str__(self) -> str:
        return self.backend

    def problem(self, **changes) -> Problem:
        return self.live(self.make(**{"rows": self.rows, "vocab": self.vocab, "width": 40, **changes}))

    def live(self, p: Problem) -> Problem:
        if self.grad_tolerance is not None:
            p.options["grad_tolerance"] = self.grad_tolerance
        return p

    def check(self, p: Problem, dtype: torch.dtype, plans: Sequence[str] = PLANS) -> None:
        """The values and gradients of each plan against float64."""
        known = budgets(p, dtype)
        assert_as_good_as_dense(self.live(p), dtype, self.backend, *(known[plan] for plan in plans))

    def logps(self, p: Problem, hidden: Tensor, budget: int):
        return linear_selected_logps(
            hidden,
            p.weight,
            p.labels,
            p.topk_ids,
            bias=p.bias,
            backend=self.backend,
            memory_budget=budget,
            **p.options,
        )


def budgets(p: Problem, dtype: torch.dtype) -> dict[str, int]:
    """Bytes with which a plan recomputes all exponentials, keeps less than half of them, or keeps all."""
    half = int((p.labels != IGNORE).sum()) * len(p.weight) * dtype.itemsize // 2
    return {"recompute": 0, "partial": half, "retain": 2**31}


def with_bias(subject: Subject, part: slice, height: float) -> Problem:
    p = subject.problem()
    p.bias = torch.zeros(subject.vocab)
    p.bias[part] = height
    return p


def minus_infinity(subject: Subject) -> Problem:
    """Forbidden tokens: -inf in the bias, among the ids, as a label, and a whole first tile of them."""
    p, second = subject.problem(bias=True), 2 * subject.tile
    p.bias[: subject.tile * 3 // 2] = -torch.inf
    p.bias[second : second + 40] = -torch.inf
    p.topk_ids[:, 1] = second + 20
    p.labels[0] = 10
    return p


def nothing_then_little(subject: Subject) -> Problem:
    """Columns that may be retained hold -inf alone, all others are far below 0: a base of 0 would be far too high."""
    p = with_bias(subject, slice(None), -130.0)
    half = subject.vocab // 2
    p.bias[:half] = -torch.inf
    p.labels = torch.where(p.labels == IGNORE, IGNORE, half + p.labels % half)
    p.topk_ids = half + p.topk_ids % half
    return p


def confident(subject: Subject, label_inside: bool = False) -> Problem:
    """A tail of e^-60: its logarithm keeps its digits, and so does the gradient that it alone carries."""
    p = subject.problem(k=3)
    if label_inside:
        p.topk_ids[:, 0] = p.labels.clamp(min=0)
    p.topk_ids[:, int(label_inside)] = 5
    p.weight[5] = 0
    p.bias = torch.zeros(subject.vocab)
    p.bias[5] = 80.0
    return p


def topk_covers_vocabulary(subject: Subject) -> Problem:
    p = subject.problem(rows=9, vocab=6, k=6)
    p.topk_ids[:] = torch.arange(6)
    return p


def rows_apart(subject: Subject) -> Problem:
    """Rows of operands with NaN between them, as those of a slice have."""
    p = subject.problem()
    p.hidden, p.weight = (
        torch.full((len(t), t.shape[1] + 9), torch.nan)[:, : t.shape[1]].copy_(t) for t in (p.hidden, p.weight)
    )
    return p


def transposed(subject: Subject) -> Problem:
    p = subject.problem()
    p.hidden, p.weight = (t.T.contiguous().T for t in (p.hidden, p.weight))
    return p


# Logits of one tile 200 away from the others': nothing overflows, underflow is exact zero.
PROBLEMS: dict[str, Callable[[Subject], Problem]] = {
    "-inf": minus_infinity,
    "-inf, then -130": nothing_then_little,
    "every logit -300": lambda s: with_bias(s, slice(None), -300.0),
    "every logit -60": lambda s: with_bias(s, slice(None), -60.0),
    "every logit +60": lambda s: with_bias(s, slice(None), 60.0),
    "every logit +300": lambda s: with_bias(s, slice(None), 300.0),
    "first tile -200": lambda s: with_bias(s, slice(s.tile), -200.0),
    "first tile +200": lambda s: with_bias(s, slice(s.tile), 200.0),
    "second tile -200": lambda s: with_bias(s, slice(s.tile, 2 * s.tile), -200.0),
    "second tile +200": lambda s: with_bias(s, slice(s.tile, 2 * s.tile), 200.0),
    "top k covers vocabulary": topk_covers_vocabulary,
    "rows apart": rows_apart,
    "transposed": transposed,
    "many ids": lambda s: s.problem(k=64),
    "no ids": lambda s: s.problem(k=0),
    "no top k": lambda s: s.problem(k=None),
}


class Contract:
    """Parametrises the tests of its subclasses by the `subject`, `dtype`, `option` and `problem` that they ask for."""

    subjects: Sequence[Subject] = ()

    def pytest_generate_tests(self, metafunc) -> None:
        asked = [name for name in ("subject", "dtype", "option", "problem") if name in metafunc.fixturenames]
        if asked:
            cells = (
                dict(zip(("subject", "dtype", "option", "problem"), (s, *cell), strict=True))
                for s in self.subjects
                for cell in product(s.dtypes, s.options, s.problems or PROBLEMS)
            )
            values = dict.fromkeys(tuple(cell[name] for name in asked) for cell in cells)
            metafunc.parametrize(asked, list(values), ids=lambda value: str(value).removeprefix("torch."))

    @pytest.fixture(autouse=True)
    def small_tiles(self, request, monkeypatch):
        """But for real hidden states, which get the tiles that a user gets."""
        if "smollm2" not in request.fixturenames:
            for s in self.subjects:
                tiles = BACKENDS[s.backend].tiles
                monkeypatch.setattr(tiles, "tile_columns", staticmethod(lambda *_, tile=s.tile: tile))


class Values(Contract):
    """`linear_selected_logps` and its gradients against float64."""

    def test_options(self, subject, dtype, option):
        """Masked rows, duplicate ids, the label inside the top k and outside."""
        p = subject.problem(**OPTIONS[option])
        if subject.grad_tolerance is None:
            valid, (vocab, width) = int((p.labels != IGNORE).sum()), p.weight.shape
            for name, budget in budgets(p, dtype).items():
                plan = plan_for(valid, vocab, width, dtype, backend=subject.backend, memory_budget=budget)
                retains = BACKENDS[subject.backend].tiles.retained_step(plan.tile, dtype) > 0
                assert plan.name == (name if retains else "recompute")
        subject.check(p, dtype)

    def test_ragged_shapes(self, subject, dtype):
        for rows, vocab, width, k in [(1, 1, 1, None), (2, 7, 3, 0), (5, 333, 17, 40)]:
            subject.check(random_problem(rows, vocab, width, k), dtype, subject.plans)

    def test_any_shape(self, subject):
        rows, vocab, width = subject.largest

        @given(
            rows=st.integers(1, rows),
            vocab=st.integers(2, vocab),  # of one column, gradients are 0 and rounding is all that there is
            width=st.integers(1, width),
            k=st.none() | st.integers(0, 9),
            masked=st.floats(0, 1),
            dtype=st.sampled_from(subject.dtypes),
            budget=st.sampled_from([0, 20_000, 2**31]),
            seed=st.integers(0, 2**16),
        )
        @settings(max_examples=subject.examples, deadline=None)
        def run(rows, vocab, width, k, masked, dtype, budget, seed):
            p = random_problem(rows, vocab, width, k, seed=seed)
            p.labels[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < masked] = IGNORE
            assert_as_good_as_dense(subject.live(p), dtype, subject.backend, budget)

        run()

    def test_extremes(self, subject, problem):
        subject.check(PROBLEMS[problem](subject), torch.float32, subject.plans)

    @pytest.mark.parametrize("label_inside", [False, True])
    def test_confident_student(self, subject, label_inside):
        """In float64, the standard itself is as far off."""
        p = confident(subject, label_inside)
        for dtype in set(subject.dtypes) - {torch.float64}:
            subject.check(p, dtype, subject.plans)
        assert values_and_grads(p, subject.backend)["tail"].min() < -50

    def test_gradient_of_one_output_alone(self, subject):
        """Incoming gradients that are zero but for one output, zero altogether, or tiny beside large values."""
        p = subject.problem(bias=True)
        k = float(p.topk_ids.shape[1])
        # Balanced: nothing reaches the lse, and the selected entries alone get any.
        balanced, small = (k, -1.0, 0.0), (k * 2.0**-33, -(2.0**-33), 0.0)
        for weights in ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), balanced, small, (1e-18, 1e-18, 1e-30)):

            def gradients(loss_of, weights=weights):
                hidden, p.weight = (t.detach().clone().requires_grad_() for t in (p.hidden, p.weight))
                loss = sum(w * o.sum() for w, o in zip(weights, loss_of(hidden), strict=True))
                return [g / max(*weights, 1e-38) for g in torch.autograd.grad(loss, (hidden, p.weight))]

            wanted = gradients(lambda hidden: Subject("reference").logps(p, hidden, 0))
            assert (wanted[0].abs().max() > 0) == (sum(weights) > 0)
            for plan in subject.plans:
                budget = budgets(p, torch.float32)[plan]
                got = gradients(lambda hidden, budget=budget: subject.logps(p, hidden, budget))
                for gradient, want in zip(got, wanted, strict=True):
                    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


class Conduct(Contract):
    """`linear_selected_logps` of a backend against itself: what may not change, and what may not spread."""

    @pytest.fixture(params=[0, 2**31], ids=["recompute", "retain"])
    def budget(self, request):
        return request.param

    def test_masked_rows_hold_anything(self, subject, budget):
        p = subject.problem()
        clean = values_and_grads(p, subject.backend, budget)
        masked = p.labels == IGNORE
        p.hidden[masked] = torch.nan
        p.topk_ids[masked] = -(2**31)
        got = values_and_grads(p, subject.backend, budget)
        for name in clean:
            assert torch.equal(got[name], clean[name]), name
        assert got["label"][masked].abs().max() == 0
        assert got["grad_hidden"][masked].abs().max() == 0
        assert got["grad_hidden"][~masked].abs().amax(1).min() > 0

    def test_no_valid_token(self, subject, budget):
        p = subject.problem()
        assert all(v.abs().sum() > 0 for v in values_and_grads(p, subject.backend, budget).values())
        p.labels[:] = IGNORE
        assert all(v.abs().sum() == 0 for v in values_and_grads(p, subject.backend, budget).values())
        p.hidden, p.labels, p.topk_ids = p.hidden[:0], p.labels[:0], p.topk_ids[:0]
        got = values_and_grads(p, subject.backend, budget)
        assert got["label"].shape == (0,)
        assert got["grad_weight"].abs().sum() == 0

    def test_nan_is_not_hidden(self, subject, budget):
        p = subject.problem(k=2)
        p.hidden[0, 3] = torch.nan
        got = values_and_grads(p, subject.backend, budget)
        assert got["label"][0].isnan()
        assert got["label"][2:].isfinite().all()
        assert got["grad_hidden"][0].isnan().all()
        assert got["grad_hidden"][2:].isfinite().all()

    def test_bitwise_repeatable(self, subject, dtype, budget):
        p = subject.problem(bias=True).to(dtype)
        a, b = (values_and_grads(p, subject.backend, budget) for _ in range(2))
        for name in a:
            assert torch.equal(a[name], b[name]), name
            assert a[name].abs().sum() > 0

    def test_second_backward_is_the_first_again(self, subject, budget):
        """A backward that writes to the retained exponentials puts back what was there."""
        p = subject.problem()
        hidden = p.hidden.clone().requires_grad_()
        loss = subject.logps(p, hidden, budget).topk.sum()
        a, b = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(a, b)
        assert a.abs().max() > 0

    def test_frozen_head_and_frozen_body(self, subject, budget):
        p = subject.problem(bias=True)
        full = values_and_grads(p, subject.backend, budget)
        for trained in (["hidden"], ["weight"], ["bias"], ["hidden", "bias"]):
            part = values_and_grads(p, subject.backend, budget, trained)
            for name in ("hidden", "weight", "bias"):
                got, want = part[f"grad_{name}"], full[f"grad_{name}"]
                assert want.abs().max() > 0.1
                if name in trained:
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                else:
                    assert got is None

    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_is_a_cast_and_no_more(self, subject, low):
        """Bit by bit, forward and backward, whichever of them autocast sees: inside, it would round each product."""
        if BACKENDS[subject.backend].obstacle(torch.device("cpu"), low) is not None:
            pytest.skip(f"{subject} does not take {low}")
        p = subject.problem(rows=4, bias=True)
        for plan in subject.plans:
            budget = budgets(p, low)[plan]
            for trained in ([], ["hidden"], ["hidden", "weight", "bias"]):
                want = autocast_results(subject, p.to(low), budget, trained, None)
                assert want["label"].abs().max() > 0
                for where in ("forward", "forward and backward"):
                    got = autocast_results(subject, p, budget, trained, low, where)
                    for name, value in want.items():
                        assert torch.equal(got[name], value.float()), f"{plan}, trained: {trained}, {where}: {name}"
                # Only where tensors are low already does autocast in the backward alone change nothing else.
                got = autocast_results(subject, p.to(low), budget, trained, low, "backward")
                assert all(torch.equal(got[name], value) for name, value in want.items()), (plan, trained)


def autocast_results(
    subject: Subject, p: Problem, budget: int, trained: Sequence[str], dtype: torch.dtype | None, where: str = ""
) -> dict[str, Tensor]:
    """Outputs, and gradients of a function of them; `where` names the passes that run under autocast to `dtype`."""
    leaves = {n: getattr(p, n).clone().requires_grad_(n in trained) for n in ("hidden", "weight", "bias")}
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled="forward" in where):
        out = linear_selected_logps(
            leaves["hidden"], leaves["weight"], p.labels, p.topk_ids, bias=leaves["bias"], backend=subject.backend,
            memory_budget=budget, **p.options,
        )  # fmt: skip
    loss = out.label.sum() + out.topk.exp().sum() + out.tail.square().sum()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled="backward" in where):
        grads = torch.autograd.grad(loss, [leaves[name] for name in trained]) if trained else ()
    return {**out._asdict(), **dict(zip(trained, grads, strict=True))}


class RealHiddenStates(Contract):
    """Of a real model, with the tiles that a user gets. The dense results, of a large vocabulary, are made once."""

    rows = 96

    @pytest.mark.parametrize("real_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_real_hidden_states(self, smollm2, real_dtype):
        hidden, weight, labels = smollm2
        hidden, labels = hidden[: self.rows], labels[: self.rows].clone()
        labels[: self.rows // 3] = IGNORE
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        ids = ((hidden + 0.3 * noise) @ weight.T).topk(16).indices
        p = Problem(hidden, weight, labels, ids).to(real_dtype)
        standard = Standard.of(p, real_dtype)
        for subject in self.subjects:
            for budget in (0, 2**31):
                got = values_and_grads(p, subject.backend, budget)
                standard.check(got, f"{subject}, budget {budget}, ")


class Topk(Contract):
    """`linear_topk_logps` against a float64 sort."""

    def test_topk(self, subject, dtype, option):
        for k in subject.ks:
            p = subject.problem(seed=k, **OPTIONS[option])
            p.hidden, p.labels = p.hidden[None], p.labels[None]
            check_topk(p.to(dtype), k, subject.backend)

    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
    def test_topk_under_autocast(self, subject, low):
        if BACKENDS[subject.backend].obstacle(torch.device("cpu"), low) is not None:
            pytest.skip(f"{subject} does not take {low}")
        p = subject.problem(rows=4, bias=True)

        def results(p):
            return linear_topk_logps(p.hidden, p.weight, 9, labels=p.labels, bias=p.bias, backend=subject.backend)

        with torch.autocast("cpu", low):
            got = results(p)
        assert got.logps.abs().max() > 0
        assert all(torch.equal(a, b) for a, b in zip(got, results(p.to(low)), strict=True))

    def test_topk_of_any_shape(self, subject):
        rows, vocab, width = subject.largest

        @given(
            rows=st.integers(1, rows),
            vocab=st.integers(1, vocab),
            width=st.integers(1, width),
            share=st.floats(0, 1),
            dtype=st.sampled_from(subject.dtypes),
        )
        @settings(max_examples=subject.examples, deadline=None)
        def run(rows, vocab, width, share, dtype):
            p = random_problem(rows, vocab, width, seed=vocab).to(dtype)
            p.labels = None
            check_topk(p, round(share * vocab), subject.backend)

        run()

    def test_ties_go_to_the_lowest_id(self, subject):
        """Integer logits, so that equals are exact and everywhere, -0 among them, across tile borders."""
        hidden = torch.cartesian_prod(*[torch.arange(-1.0, 2.0)] * 3)[: subject.tied_rows]
        weight = torch.randint(-1, 2, (subject.vocab, 3), generator=torch.Generator().manual_seed(0)).float()
        for k in (1, 33, 150):
            got = linear_topk_logps(hidden, weight, k, backend=subject.backend)
            want = linear_topk_logps(hidden.double(), weight.double(), k, backend="reference")
            assert torch.equal(got.ids, want.ids)

    def test_topk_of_minus_infinity(self, subject):
        """Forbidden tokens come last, with probability 0, and only when k asks for more than there are others."""
        p = subject.problem(rows=4)
        allowed = subject.vocab - 50
        p.bias = torch.zeros(subject.vocab)
        p.bias[:allowed] = -torch.inf
        got = linear_topk_logps(p.hidden, p.weight, 60, bias=p.bias, backend=subject.backend)
        assert (got.ids[:, :50] >= allowed).all()
        assert (got.logps[:, 50:] == -torch.inf).all()
        assert got.ids[0, 50:].tolist() == list(range(10))
        assert (got.tail == -torch.inf).all()

    def test_nan_stays_in_its_row(self, subject):
        """In every column, and in some of the first that fill the list of candidates."""
        p = subject.problem(rows=5)
        want = linear_topk_logps(p.hidden, p.weight, 20, backend=subject.backend)
        spoilt, others = p.hidden.clone(), torch.tensor([0, 1, 3, 4])
        spoilt[2] = torch.nan
        got = linear_topk_logps(spoilt, p.weight, 20, labels=torch.arange(5), backend=subject.backend)
        assert torch.equal(got.ids[others], want.ids[others])
        assert torch.equal(got.logps[others], want.logps[others])
        assert got.logps[2].isnan().all()
        assert got.label[2].isnan()
        bias = torch.zeros(subject.vocab)
        bias[::7] = torch.nan
        assert linear_topk_logps(p.hidden, p.weight, 20, bias=bias, backend=subject.backend).tail.isnan().all()


def check_topk(p: Problem, k: int, backend: str) -> None:
    """Ids may differ from the exact ones within the tolerance: 3 times the error of dense logits in float32."""
    got = linear_topk_logps(p.hidden, p.weight, k, labels=p.labels, bias=p.bias, backend=backend, **p.options)
    wide = p.to(torch.float64)
    exact = linear_topk_logps(
        wide.hidden, wide.weight, len(p.weight), labels=p.labels, bias=wide.bias, backend="reference", **p.options
    )
    full = torch.zeros_like(exact.logps).scatter(-1, exact.ids, exact.logps)  # [.., V] log-probabilities by id
    valid = torch.ones(got.tail.shape, dtype=torch.bool) if p.labels is None else p.labels != IGNORE
    dense = reference.dense_logits(p.hidden, Head(p.weight, p.bias, **p.options)).log_softmax(-1)
    error = finite(dense.double() - full)[valid].abs()
    tolerance = float(3 * error.max() if error.numel() else 0) + 16 * torch.finfo(dense.dtype).eps
    assert_close = torch.testing.assert_close
    at_ids = full.gather(-1, got.ids)
    assert_close(got.logps[valid].double(), at_ids[valid], rtol=0, atol=tolerance)
    assert_close(got.logps[valid].double(), exact.logps[..., :k][valid], rtol=0, atol=tolerance)
    assert (got.logps[..., 1:] <= got.logps[..., :-1]).all()
    assert (got.ids[valid].sort(-1).values.diff(dim=-1) > 0).all()  # no id twice
    tail = full.scatter(-1, got.ids, -torch.inf).logsumexp(-1)
    assert_close(got.tail[valid].double(), tail[valid], rtol=tolerance, atol=tolerance)
    if p.labels is None:
        assert got.label is None
    else:
        assert_close(got.label[valid].double(), exact.label[valid], rtol=0, atol=tolerance)
        for out in got:
            assert out[~valid].abs().sum() == 0
    assert got.ids.dtype == torch.int64


def operator_arguments(
    backend: str, rows: int, vocab: int, retain: bool, grad_tolerance: float | None = None
) -> tuple[object, ...]:
    """For `opcheck` of the operator behind `linear_selected_logps`.

    It compares outputs, and spare bytes of the retained buffer are whatever memory held: so choose shapes that fill it
    to the last byte, or leave that check out.
    """
    budget = 2**31 if retain else 0
    if grad_tolerance is None:
        retained_bytes = plan_for(rows, vocab, 8, torch.float32, backend=backend, memory_budget=budget).retained_bytes
    else:
        retained_bytes = live_buffer_bytes(rows, vocab, 4, budget)
    return (
        torch.randn(rows, 8, requires_grad=True),
        torch.randn(vocab, 8, requires_grad=True),
        torch.randn(vocab, requires_grad=True),
        torch.randint(vocab, (rows,)),
        torch.randint(vocab, (rows, 3)),
        1.0, 30.0, 1.0, IGNORE, backend, grad_tolerance, retained_bytes,
    )  # fmt: skip

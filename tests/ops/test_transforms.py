"""What is done to the primitive from outside: transforms of `torch.func`, dual numbers, compilers, meta tensors."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.library import opcheck

from dadpo_kernels import (
    TeacherTargets,
    linear_dadpo_loss,
    linear_selected_logps,
    linear_token_statistics,
    linear_topk_logps,
)
from dadpo_kernels.ops import autograd, token_statistics
from tests.ops.contract import operator_arguments
from tests.support.dense import IGNORE, Problem, random_problem

PLANS = {"recompute": {"memory_budget": 0}, "retain": {}, "live": {"grad_tolerance": 1e-6}}
BACKENDS = ["torch", "cpu"]


def problem() -> Problem:
    return random_problem(rows=7, vocab=50, width=6, k=3)


def loss_of(p: Problem, hidden, weight, **options):
    """A number that depends on every output."""
    out = linear_selected_logps(hidden, weight, p.labels, p.topk_ids, **options)
    return out.label.sum() + out.topk.exp().sum() + out.tail.square().sum()


def samples() -> tuple[torch.Tensor, Problem]:
    """`(hidden [3, 7, H], problem)` with labels `[3, 7]`, ids `[3, 7, K]`; the samples differ in their masks."""
    parts = [random_problem(rows=7, vocab=50, width=6, k=3, seed=seed) for seed in range(3)]
    parts[1].labels[:] = IGNORE
    hidden, labels, ids = (torch.stack([getattr(p, n) for p in parts]) for n in ("hidden", "labels", "topk_ids"))
    return hidden, Problem(hidden, parts[0].weight, labels, ids)


def of_sample(p: Problem, labels, ids) -> Problem:
    return Problem(p.hidden, p.weight, labels, ids)


def pair_targets() -> tuple[torch.Tensor, TeacherTargets]:
    """Labels `[4, 7]` of two pairs, and a teacher's log-probabilities."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(50, (4, 7), generator=g)
    labels[0, 3:] = IGNORE
    known = linear_topk_logps(torch.randn(4, 7, 6, generator=g), torch.randn(50, 6, generator=g), 3, labels=labels)
    return labels, TeacherTargets(known.label, known.ids, known.logps, known.tail)


LABELS, TEACHER = pair_targets()


def pair_loss(hidden, weight, backend="auto"):
    """`linear_dadpo_loss` of two pairs, every term of it."""
    device = hidden.device
    return linear_dadpo_loss(
        hidden, weight, LABELS.to(device), ref_logps=torch.full((4,), -30.0, device=device),
        teacher=TeacherTargets(*(t.to(device) for t in TEACHER)), beta_ref=0.1, beta_teacher=0.2, kl_weight=1.0,
        sft_weight=0.3, backend=backend,
    )  # fmt: skip


class TestReverseMode:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_grad_and_vjp(self, backend, plan):
        p = problem()
        leaves = [t.clone().requires_grad_() for t in (p.hidden, p.weight)]
        want_value = loss_of(p, *leaves, backend=backend, **PLANS[plan])
        want = torch.autograd.grad(want_value, leaves)

        def function(hidden, weight):
            return loss_of(p, hidden, weight, backend=backend, **PLANS[plan])

        got, value = grad_and_value(function, argnums=(0, 1))(p.hidden, p.weight)
        torch.testing.assert_close((value, *got), (want_value.detach(), *want), rtol=0, atol=0)
        value, pullback = vjp(function, p.hidden, p.weight)
        torch.testing.assert_close((value, *pullback(torch.ones(()))), (want_value.detach(), *want), rtol=0, atol=0)
        # A frozen head: its gradient is not asked for.
        torch.testing.assert_close(grad(function)(p.hidden, p.weight), want[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradients_of_samples(self, backend, plan):
        hidden, p = samples()

        def function(h, weight, y, ids):
            return loss_of(of_sample(p, y, ids), h, weight, backend=backend, **PLANS[plan])

        for_each = vmap(grad_and_value(function, argnums=(0, 1)), in_dims=(0, None, 0, 0))
        got, values = for_each(hidden, p.weight, p.labels, p.topk_ids)
        for i, sample in enumerate(zip(hidden, p.labels, p.topk_ids, strict=True)):
            leaves = sample[0].clone().requires_grad_(), p.weight.clone().requires_grad_()
            value = function(*leaves, *sample[1:])
            want = torch.autograd.grad(value, leaves)
            torch.testing.assert_close((values[i], *(g[i] for g in got)), (value.detach(), *want), rtol=0, atol=0)
        assert got[1][0].abs().max() > 0
        assert got[1][1].abs().max() == 0

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_vmap_alone_and_inside_of_a_gradient(self, backend):
        hidden, p = samples()

        def values(hidden, weight, call=vmap):
            def function(h, y, ids):
                return linear_selected_logps(h, weight, y, ids, backend=backend, memory_budget=0)

            return call(function, in_dims=(1, 0, 0))(hidden.movedim(0, 1), p.labels, p.topk_ids)

        want = linear_selected_logps(hidden, p.weight, p.labels, p.topk_ids, backend=backend)
        torch.testing.assert_close(values(hidden, p.weight), want, rtol=1e-5, atol=1e-5)

        def total(hidden, weight):
            return sum(out.exp().sum() for out in values(hidden, weight))

        leaves = [t.clone().requires_grad_() for t in (hidden, p.weight)]
        out = linear_selected_logps(*leaves, p.labels, p.topk_ids, backend=backend)
        want_grads = torch.autograd.grad(sum(o.exp().sum() for o in out), leaves)
        for got in (
            torch.autograd.grad(total(*leaves), leaves),
            grad(total, argnums=(0, 1))(*(leaf.detach() for leaf in leaves)),
        ):
            torch.testing.assert_close(got, want_grads, rtol=1e-5, atol=1e-5)

    def test_jacobian(self):
        p = problem()
        got, want = (
            jacrev(lambda h, b=b: linear_selected_logps(h, p.weight, p.labels, p.topk_ids, backend=b).topk)(p.hidden)
            for b in ("auto", "reference")
        )
        assert got.shape == (7, 3, 7, 6)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_of_the_loss_of_a_module(self):
        head, hidden = torch.nn.Linear(6, 50, bias=False), torch.randn(4, 7, 6)
        want = torch.autograd.grad(pair_loss(hidden, head.weight).loss, head.weight)[0]

        class Loss(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = head

            def forward(self, hidden):
                return pair_loss(hidden, self.head.weight).loss

        module = Loss()
        parameters = {name: value.detach() for name, value in module.named_parameters()}
        got = grad(lambda parameters: functional_call(module, parameters, hidden))(parameters)["head.weight"]
        torch.testing.assert_close(got, want, rtol=0, atol=0)

    def test_what_has_no_gradient(self):
        p, (hidden, q) = problem(), samples()
        calls = {
            "topk": lambda h, y: linear_topk_logps(h, p.weight, 3, labels=y).logps,
            "statistics": lambda h, y: linear_token_statistics(h, p.weight, y).entropy,
        }
        for name, call in calls.items():
            _, tangent = jvp(lambda h, call=call: call(h, p.labels), (p.hidden,), (p.hidden,))
            assert tangent.abs().max() == 0, name
            assert not call(p.hidden.clone().requires_grad_(), p.labels).requires_grad, name
            each = torch.stack([call(h, y) for h, y in zip(hidden, q.labels, strict=True)])
            torch.testing.assert_close(vmap(call)(hidden, q.labels), each, rtol=0, atol=0)


def dual_numbers(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


def dual_gradients(function, x):
    """Forward mode in the backward alone."""
    out = function(x.clone().requires_grad_())
    with forward_ad.dual_level():
        out.backward(forward_ad.make_dual(torch.ones(()), torch.ones(())))


REFUSED = {
    "jvp": lambda f, x: jvp(f, (x,), (x,))[1],
    "jacfwd": lambda f, x: (jacfwd(f)(x) * x).sum(),
    "dual numbers": dual_numbers,
    "dual gradients": dual_gradients,
    "jvp of grad": lambda f, x: jvp(grad(f), (x,), (x,)),
    "grad of jvp": lambda f, x: grad(lambda y: jvp(f, (y,), (y,))[1])(x),
    "grad of grad": lambda f, x: grad(lambda y: grad(f)(y).sum())(x),
    "hessian": lambda f, x: hessian(f)(x),
}
P = problem()
LOSSES = {
    "torch": lambda h: loss_of(P, h[0], P.weight, backend="torch"),
    "cpu": lambda h: loss_of(P, h[0], P.weight, backend="cpu"),
    "live": lambda h: loss_of(P, h[0], P.weight, grad_tolerance=1e-3),
    "bias alone": lambda h: loss_of(P, P.hidden, P.weight, bias=h.flatten()[:50]),
    "dadpo": lambda h: pair_loss(h, P.weight).loss,
}


class TestForwardMode:
    """A tangent that is dropped would be a derivative of 0."""

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("way", REFUSED)
    def test_is_refused(self, name, way):
        hidden = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))
        with pytest.raises(RuntimeError, match=r'differentiable once, in reverse mode.*backend="reference"'):
            REFUSED[way](LOSSES[name], hidden)

    def test_no_grad_does_not_hide_it(self):
        hidden = torch.randn(4, 7, 6)
        with torch.no_grad(), pytest.raises(RuntimeError, match="in reverse mode"):
            dual_numbers(LOSSES["cpu"], hidden)

    @pytest.mark.parametrize("way", ["jvp", "jacfwd", "dual numbers"])
    def test_of_the_reference(self, way):
        """The remedy that the message names."""
        hidden = torch.randn(4, 7, 6)
        for function in (
            lambda h: loss_of(P, h[0], P.weight, backend="reference"),
            lambda h: pair_loss(h, P.weight, "reference").loss,
        ):
            want = (grad(function)(hidden) * hidden).sum()
            # PyTorch widens some tangents of scalars.
            torch.testing.assert_close(REFUSED[way](function, hidden).float(), want, rtol=1e-4, atol=1e-4)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def forget(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_dynamic_shapes_as_one_graph(self):
        compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (7, 11):
            p = random_problem(rows=rows, vocab=50, width=6, k=3)
            leaves = [t.clone().requires_grad_() for t in (p.hidden, p.weight)]
            got, want = (torch.autograd.grad(function(p, *leaves), leaves) for function in (compiled, loss_of))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_exported(self):
        p = problem()

        class Module(torch.nn.Module):
            def forward(self, hidden):
                return linear_selected_logps(hidden, p.weight, p.labels, p.topk_ids).label

        graph = torch.export.export(Module(), (p.hidden,)).graph
        assert torch.ops.dadpo.selected_logps.default in [node.target for node in graph.nodes]

    def test_transforms_run_eagerly(self):
        (hidden, p), q = samples(), problem()

        def function(h, y, ids):
            return loss_of(of_sample(p, y, ids), h, p.weight)

        for transform in (grad, lambda f: vmap(grad(f)), vmap):
            arguments = (hidden, p.labels, p.topk_ids) if transform is not grad else (q.hidden, q.labels, q.topk_ids)
            got = torch.compile(transform(function), backend="aot_eager")(*arguments)
            torch.testing.assert_close(got, transform(function)(*arguments), rtol=1e-5, atol=1e-5)

    def test_transforms_are_no_part_of_a_whole_graph(self):
        compiled = torch.compile(grad(lambda h: loss_of(P, h, P.weight)), backend="aot_eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(P.hidden)

    @pytest.mark.parametrize("way", ["jvp", "dual numbers"])
    def test_forward_mode_is_refused(self, way):
        p = problem()
        compiled = torch.compile(lambda h: loss_of(p, h, p.weight), backend="aot_eager")
        with pytest.raises(RuntimeError, match="in reverse mode"):
            REFUSED[way](compiled, p.hidden)
        with pytest.raises(RuntimeError, match="in reverse mode"):
            torch.compile(lambda h: REFUSED[way](lambda x: loss_of(p, x, p.weight), h), backend="aot_eager")(p.hidden)

    def test_compiled_backward(self):
        p = problem()
        leaves = [t.clone().requires_grad_() for t in (p.hidden, p.weight)]
        want = torch.autograd.grad(loss_of(p, *leaves), leaves)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            got = torch.autograd.grad(loss_of(p, *leaves), leaves)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_opcheck_of_the_backward(self, backend):
        arguments = [
            t.detach() if isinstance(t, torch.Tensor) else t for t in operator_arguments(backend, 9, 50, False)
        ]
        hidden, weight, bias, _, _, *scalars, _, _, tolerance, _ = arguments
        out = autograd.selected_logps(*arguments)
        grads = [torch.randn_like(o) for o in out[:3]]
        for needs in ([True, True, True], [True, False, False]):
            opcheck(
                autograd.selected_logps_backward,
                (*grads, hidden, weight, bias, *out, *scalars, backend, tolerance, needs),
            )

    def test_opcheck_of_the_statistics(self):
        p = problem()
        opcheck(token_statistics._token_statistics, (p.hidden, p.weight, None, p.labels, 1.0, None, 1.0, IGNORE))


def meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


class TestMeta:
    """Shapes and dtypes without values."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
    def test_outputs_and_gradients(self, backend, dtype):
        p = random_problem(rows=12, vocab=50, width=6, k=3, bias=True).to(dtype)
        hidden, labels, ids = p.hidden.view(4, 3, 6), p.labels.view(4, 3), p.topk_ids.view(4, 3, 3)
        options = {"backend": backend} if dtype == torch.bfloat16 else {}
        for autocast in (False, True):

            def results(place, autocast=autocast):
                leaves = [place(t).requires_grad_() for t in (hidden, p.weight, p.bias)]
                h, weight, bias = leaves
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    out = linear_selected_logps(h, weight, place(labels), place(ids), bias=bias, **options)
                    topk = linear_topk_logps(h, weight, 5, labels=place(labels), bias=bias, **options)
                    statistics = linear_token_statistics(h, weight, place(labels), bias=bias)
                grads = torch.autograd.grad(out.label.sum() + out.topk.sum(), leaves)
                return [*out, *topk, *statistics, *grads]

            for got, want in zip(results(meta), results(lambda t: t), strict=True):
                assert got.is_meta
                assert (got.shape, got.dtype, got.requires_grad) == (want.shape, want.dtype, want.requires_grad)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_loss(self, backend):
        hidden, weight = torch.randn(4, 7, 6), torch.randn(50, 6)
        want = pair_loss(hidden, weight, backend)
        leaves = [meta(t).requires_grad_() for t in (hidden, weight)]
        got = pair_loss(*leaves, backend)
        assert got.metrics.keys() == want.metrics.keys()
        for value in (got.loss, *got.metrics.values()):
            assert value.is_meta
            assert (value.shape, value.dtype) == ((), torch.float32)
        for gradient, leaf in zip(torch.autograd.grad(got.loss, leaves), leaves, strict=True):
            assert (gradient.shape, gradient.is_meta) == (leaf.shape, True)

    def test_live_plan(self):
        p = problem()
        hidden = meta(p.hidden).requires_grad_()
        out = linear_selected_logps(hidden, meta(p.weight), meta(p.labels), meta(p.topk_ids), grad_tolerance=1e-3)
        assert torch.autograd.grad(out.tail.sum(), hidden)[0].shape == hidden.shape

    def test_beside_other_devices(self):
        p = problem()
        for arguments, message in [
            ((p.hidden, meta(p.weight), p.labels), "hidden is on cpu and weight on meta; move them together"),
            ((meta(p.hidden), p.weight, meta(p.labels)), "hidden is on meta and weight on cpu"),
            ((meta(p.hidden), meta(p.weight), p.labels), "labels is on cpu and hidden on meta"),
        ]:
            for call in (linear_selected_logps, linear_token_statistics):
                with pytest.raises(ValueError, match=message):
                    call(*arguments)

"""`topk_divergence` against the definitions on whole distributions, in float64, limits at zero mass included."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dadpo_kernels import topk_divergence

KINDS = ["forward_kl", "reverse_kl", "js"]
SUPPORTS = ["tail", "renormalized", "truncated"]
INF = torch.inf


def xlogy_kl(p, q):
    """`Σ p log(p/q)` from probabilities, with `0 log 0 = 0`, by torch's own `xlogy`."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def expected(student, teacher, tails, kind, support, js_mix=0.5, kd_temperature=1.0):
    """The definition, on probabilities `student`, `teacher [..., K]` and `tails = (student's, teacher's)`."""
    q, p = student, teacher
    if support == "tail":
        q, p = (torch.cat([x, t[..., None]], dim=-1) for x, t in zip((q, p), tails, strict=True))
    elif support == "renormalized":
        q, p = (x ** (1 / kd_temperature) for x in (q, p))
        q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    if kind == "js":
        m = js_mix * p + (1 - js_mix) * q
        return js_mix * xlogy_kl(p, m) + (1 - js_mix) * xlogy_kl(q, m)
    return xlogy_kl(p, q) if kind == "forward_kl" else xlogy_kl(q, p)


def logits_to_outcomes(logits, ids):
    """Dense float64 log-probabilities `[N, V]` -> those of the ids and of all the others together."""
    logps = logits.log_softmax(-1)
    outside = torch.ones_like(logps, dtype=torch.bool).scatter(-1, ids, False)
    return logps.gather(-1, ids), logps.where(outside, -INF).logsumexp(-1)


def random_case(seed, n=6, vocabulary=11, k=4, sharpness=3.0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = sharpness * torch.randn(2, n, vocabulary, generator=g, dtype=torch.float64)
    return student, teacher, teacher.topk(k).indices


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31), k=st.integers(1, 10), sharpness=st.sampled_from([0.1, 3.0, 12.0]),
    js_mix=st.sampled_from([0.1, 0.5, 0.9]), kd_temperature=st.sampled_from([0.5, 1.0, 4.0]),
)  # fmt: skip
def test_value_and_gradient_of_the_student_logits(kind, support, seed, k, sharpness, js_mix, kd_temperature):
    student, teacher, ids = random_case(seed, k=k, sharpness=sharpness)
    options = {"js_mix": js_mix, "kd_temperature": kd_temperature if support == "renormalized" else 1.0}
    teacher_topk, teacher_tail = logits_to_outcomes(teacher, ids)

    x = student.clone().requires_grad_()
    topk, tail = logits_to_outcomes(x, ids)
    value = topk_divergence(topk, tail, teacher_topk, teacher_tail, kind=kind, support=support, **options)
    (grad,) = torch.autograd.grad(value.sum(), x)

    y = student.clone().requires_grad_()
    q, p = y.softmax(-1), teacher.softmax(-1)
    outside = torch.ones_like(q).scatter(-1, ids, 0)  # the sum of what is outside, not 1 - the sum of what is inside
    truth = expected(
        q.gather(-1, ids), p.gather(-1, ids), ((q * outside).sum(-1), (p * outside).sum(-1)), kind, support, **options
    )
    (true_grad,) = torch.autograd.grad(truth.sum(), y)

    assert value.dtype == torch.float64
    torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(grad, true_grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_vocabulary_in_the_topk_is_the_full_divergence(kind):
    student, teacher, _ = random_case(0, k=1)
    ids = teacher.argsort(descending=True)
    x = student.requires_grad_()
    topk, tail = logits_to_outcomes(x, ids)
    assert (tail == -INF).all()
    for support in SUPPORTS:
        value = topk_divergence(topk, tail.detach(), *logits_to_outcomes(teacher, ids), kind=kind, support=support)
        none = torch.zeros(len(x), dtype=torch.float64)
        truth = expected(x.softmax(-1), teacher.softmax(-1), (none, none), kind, "truncated")
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)
        (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        (true_grad,) = torch.autograd.grad(truth.sum(), x, retain_graph=True)
        torch.testing.assert_close(grad, true_grad, rtol=1e-10, atol=1e-14)


def test_tail_is_a_lower_bound_that_more_ids_tighten():
    student, teacher, _ = random_case(1)
    order = teacher.argsort(descending=True)
    values = torch.stack(
        [
            topk_divergence(*logits_to_outcomes(student, order[:, :k]), *logits_to_outcomes(teacher, order[:, :k]))
            for k in range(12)
        ]
    )
    assert (values[0].abs() < 1e-15).all()
    assert (values.diff(dim=0) > -1e-14).all()
    assert (values[-1] > 0.1).all()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_ids_at_all(kind, support):
    topk, tail = torch.zeros(3, 0, requires_grad=True), torch.zeros(3, requires_grad=True)
    value = topk_divergence(topk, tail, torch.zeros(3, 0), torch.zeros(3), kind=kind, support=support)
    assert value.tolist() == [0, 0, 0]
    # A student without any id has all its mass in the tail: log 1, whose gradient vanishes only through the softmax.
    value.sum().backward()
    assert tail.grad is None or tail.grad.isfinite().all()


def log(*p):
    return torch.tensor([math.log(x) if x else -INF for x in p], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_impossible_outcomes_count_as_their_limit(kind, support):
    """Value and gradient at -inf are what they tend to as the log-probabilities go to -inf together."""

    def run(low):
        student = torch.tensor([-1.0, low, -0.7], dtype=torch.float64, requires_grad=True)
        tail = torch.tensor(low, dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor([-0.5, 1.1 * low, -1.2], dtype=torch.float64)
        value = topk_divergence(
            student, tail, teacher, torch.tensor(1.1 * low, dtype=torch.float64), kind=kind, support=support
        )
        value.backward()
        tail_grad = torch.zeros_like(tail) if tail.grad is None else tail.grad
        return torch.stack([value.detach(), tail_grad, *student.grad])

    limit = run(-INF)
    assert limit.isfinite().all()
    assert limit.abs().max() > 0.01
    torch.testing.assert_close(run(-60.0), limit, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_impossible_for_the_teacher_only(kind):
    student = log(0.5, 0.3, 0.1).requires_grad_()
    value = topk_divergence(student, log(0.1)[0], log(0.6, 0.0, 0.3), log(0.1)[0], kind=kind)
    value.backward()
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.6, 0.0, 0.3, 0.1], [0.5, 0.3, 0.1, 0.1]))
    q.requires_grad_()
    truth = expected(q[:3], p[:3], (q[3], p[3]), kind, "tail")
    truth.backward()
    torch.testing.assert_close(value, truth, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(student.grad, (q.grad * q.detach())[:3], rtol=1e-13, atol=1e-14)


def test_a_student_that_excludes_what_the_teacher_says_is_infinitely_far():
    student, teacher = log(0.9, 0.0), log(0.5, 0.4)
    tails = log(0.1)[0], log(0.1)[0]
    assert topk_divergence(student, tails[0], teacher, tails[1], kind="forward_kl") == INF
    assert topk_divergence(teacher, tails[0], student, tails[1], kind="reverse_kl") == INF
    assert topk_divergence(student, tails[0], teacher, tails[1], kind="js") < math.log(2)


@pytest.mark.parametrize("kind", KINDS)
def test_confident_distributions_keep_their_tails(kind):
    """A student's tail of 1e-30 against a teacher's of 1e-28, in float32: 1 - sum of the top-k would be 0."""
    tail = torch.tensor(math.log(1e-30), requires_grad=True)
    student, teacher = torch.tensor([0.0]), torch.tensor([0.0])
    value = topk_divergence(student, tail, teacher, torch.tensor(math.log(1e-28)), kind=kind)
    value.backward()
    q, p = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1e-30, 1e-28))
    one = torch.ones(1, dtype=torch.float64)
    truth = expected(one, one, (q, p), kind, "tail")
    truth.backward()
    assert value.item() != 0
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=0)
    torch.testing.assert_close(tail.grad.double(), q.grad * q.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_on_both_sides(kind, support):
    student, teacher, ids = random_case(2, n=2, k=3)
    inputs = *logits_to_outcomes(student, ids), *logits_to_outcomes(teacher, ids)
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(lambda *x: topk_divergence(*x, kind=kind, support=support, js_mix=0.3), inputs)


def test_truncated_can_be_negative_and_is_not_clamped():
    student = log(0.6, 0.3).requires_grad_()
    value = topk_divergence(student, log(0.1)[0], log(0.5, 0.2), log(0.3)[0], support="truncated")
    value.backward()
    assert value < -0.1
    torch.testing.assert_close(student.grad, -torch.tensor([0.5, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    student, teacher = torch.tensor([-1.0, -2.0], dtype=dtype), torch.tensor([-2.0, -1.0], dtype=dtype)
    tail = torch.tensor(-1.0, dtype=dtype)
    value = topk_divergence(student, tail, teacher, tail)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.tensor(math.exp(-1) - math.exp(-2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "unknown divergence 'kl': choose one of forward_kl, reverse_kl, js"),
        ({"support": "full"}, "unknown support 'full': choose one of tail, renormalized, truncated"),
        ({"js_mix": 1.0}, "js_mix must be between 0 and 1"),
        ({"kd_temperature": 0}, "kd_temperature must be positive"),
        ({"kd_temperature": 2.0}, "kd_temperature=2.0 needs support='renormalized', got 'tail'"),
        ({"teacher_topk": torch.zeros(2, 4)}, r"teacher_topk has shape \[2, 4\], \[2, 3\] is needed"),
        ({"student_tail": torch.zeros(2, 1)}, r"student_tail has shape \[2, 1\], \[2\] is needed"),
        ({"teacher_tail": torch.zeros(3)}, r"teacher_tail has shape \[3\], \[2\] is needed"),
    ],
)
def test_bad_arguments(options, message):
    good = {
        "student_topk": torch.zeros(2, 3),
        "student_tail": torch.zeros(2),
        "teacher_topk": torch.zeros(2, 3),
        "teacher_tail": torch.zeros(2),
    }
    topk_divergence(**good)
    with pytest.raises(ValueError, match=message):
        topk_divergence(**(good | options))

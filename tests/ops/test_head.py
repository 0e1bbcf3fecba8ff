"""A `Head` in place of `weight`, and the options of a run, in every public function that takes them."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dadpo_kernels import (
    Head,
    Run,
    linear_selected_logps,
    linear_token_statistics,
    linear_topk_logps,
)
from tests.support.dense import random_problem

OPTIONS = {"logit_scale": 0.7, "softcap": 6.0, "temperature": 1.3}


def problem():
    p = random_problem(rows=7, vocab=90, width=6, k=4, bias=True)
    return p, Head(p.weight, p.bias, **OPTIONS)


CALLS = {
    "selected": lambda p, weight, **options: linear_selected_logps(p.hidden, weight, p.labels, p.topk_ids, **options),
    "topk": lambda p, weight, **options: linear_topk_logps(p.hidden, weight, 3, labels=p.labels, **options),
    "statistics": lambda p, weight, **options: linear_token_statistics(p.hidden, weight, p.labels, **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_head_is_its_weight_with_its_options(call):
    p, head = problem()
    expected = call(p, p.weight, bias=p.bias, **OPTIONS)
    plain = call(p, p.weight)
    for got, want, without in zip(call(p, head), expected, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert got.dtype in (torch.bool, torch.int64) or not torch.equal(got, without)  # the options arrive


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_options_in_addition_to_a_head_and_unknown_ones_are_refused(call):
    p, head = problem()
    with pytest.raises(ValueError, match="softcap given in addition to a Head"):
        call(p, head, softcap=3.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'soft_cap'; the head's options are bias, "):
        call(p, p.weight, soft_cap=3.0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("backend", "low"),
    [
        ("cpu", torch.bfloat16),
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        ("reference", torch.bfloat16),
        ("reference", torch.float16),
    ],
)
def test_autocast_is_a_cast_of_hidden_weight_and_bias_and_no_more(call, backend, low):
    """Bit by bit, also in the backward: autocast inside the passes would round each product.

    `contract.Conduct` has the plans, and the backward under autocast: the reference's is as autograd has it.
    """
    p, head = problem()
    options = {} if call is CALLS["statistics"] else {"backend": backend}

    def run(hidden, head, autocast):
        hidden, head = hidden.clone().requires_grad_(), head.map(lambda t: t.clone().requires_grad_())
        with torch.autocast("cpu", low, enabled=autocast):
            outputs = call(replace(p, hidden=hidden), head, **options)
        if call is CALLS["selected"]:
            sum(values.sum() for values in outputs).backward()
        return outputs, hidden.grad, head.weight.grad

    low_outputs, *low_grads = run(p.hidden.to(low), head.map(lambda t: t.to(low)), False)
    outputs, *grads = run(p.hidden, head, True)
    torch.testing.assert_close(outputs, low_outputs, rtol=0, atol=0)
    for grad, low in zip(grads, low_grads, strict=True):
        assert (grad is None) == (low is None)
        if grad is not None:
            torch.testing.assert_close(grad, low.float(), rtol=0, atol=0)


def test_gradients_reach_the_heads_tensors():
    p, head = problem()
    head = head.map(lambda tensor: tensor.requires_grad_())
    linear_selected_logps(p.hidden, head, p.labels, p.topk_ids).label.sum().backward()
    assert p.weight.grad.abs().sum() > 0
    assert p.bias.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cudnn"}, "backend='cudnn' is unknown; choose one of auto, reference, cpu"),
        ({"memory_budget": -1}, "memory_budget=-1 is negative"),
        ({"grad_tolerance": 1.0}, r"grad_tolerance=1.0 must lie in \(0, 1\)"),
        ({"grad_tolerance": 0.0}, r"grad_tolerance=0.0 must lie in \(0, 1\)"),
    ],
)
def test_a_run_checks_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        Run(**options)
    p, head = problem()
    with pytest.raises(ValueError, match=message):
        linear_selected_logps(p.hidden, head, p.labels, **options)


def test_choices_are_logged(caplog):
    p, head = problem()
    with caplog.at_level(logging.DEBUG, logger="dadpo_kernels"):
        hidden = p.hidden.double().requires_grad_()
        linear_selected_logps(hidden, head.map(Tensor.double), p.labels).label.sum().backward()
        linear_topk_logps(torch.randn(2, 4), torch.randn(3000, 4), 2500)
    text = caplog.text
    assert "backend cpu is passed over: it takes torch.float32 and torch.bfloat16, not torch.float64" in text
    assert "backend torch, " in text
    assert "backward, retain, frozen head: 2.00 products of" in text
    assert "k=2500 is above the cpu backend's 2048: torch runs it" in text


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("autocast", [False, True])
def test_quantised_and_integer_tensors_are_refused(call, autocast):
    """Also where autocast would cast them: fp8 without its scale is another weight."""
    p, head = problem()
    remedy = "quantised values .* need their scale: dequantise them first"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8):
            with pytest.raises(TypeError, match=f"weight has dtype {dtype}; expected one of .*; {remedy}"):
                call(p, replace(head, weight=p.weight.to(dtype)))
        with pytest.raises(TypeError, match=f"hidden has dtype torch.float8_e4m3fn.*{remedy}"):
            call(replace(p, hidden=p.hidden.to(torch.float8_e4m3fn)), head)
        with pytest.raises(TypeError, match=r"bias has dtype torch.int64; expected one of torch.float32.*float64$"):
            call(p, replace(head, bias=p.bias.long()))


def test_float64_stays_what_it_is_under_autocast():
    p, head = problem()
    hidden, head = p.hidden.double(), head.map(Tensor.double)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_selected_logps(hidden, head, p.labels, p.topk_ids)
    assert out.label.dtype == torch.float64
    torch.testing.assert_close(out, linear_selected_logps(hidden, head, p.labels, p.topk_ids), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ids_that_change_behind_autograds_back_do_not_reach_a_kernel(backend):
    """NumPy shares their memory, and autograd's version counter sees nothing: the backward has the forward's ids."""
    p, head = problem()
    labels, ids = p.labels.clone(), p.topk_ids.clone()

    def gradient(change: bool) -> torch.Tensor:
        hidden = p.hidden.clone().requires_grad_()
        out = linear_selected_logps(hidden, head, labels, ids, backend=backend)
        if change:
            labels.numpy()[-1] = ids.numpy()[:] = 2**31 + 7
        return torch.autograd.grad(out.label.sum() + out.topk.sum(), hidden)[0]

    want = gradient(False)
    assert torch.equal(gradient(True), want)
    assert want.abs().sum() > 0
    with pytest.raises(ValueError, match=r"labels\[6\] is 2147483655: outside the head's vocabulary"):
        gradient(False)


def test_an_empty_weight_is_named_as_sharded():
    p, _ = problem()
    with pytest.raises(ValueError, match="gather a sharded weight"):
        linear_selected_logps(p.hidden, torch.empty(0), p.labels)

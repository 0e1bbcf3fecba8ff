"""The primitive as two `torch.library` operators, forward and backward, and the two autograd Functions around them.

`torch.compile` sees an operator as one node; eager autograd and `torch.func` see the Functions, see `_Function.call`.
Operators take flat arguments: what travels as a `Head` and a `Run` elsewhere is taken apart here and nowhere else.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import without_autocast
from .backends.base import accumulator_dtype, run_forward
from .head import Head
from .operator import operator
from .valid_tokens import ValidTokens, spread, spread_gradient


@without_autocast
def _selected_logps(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H], of hidden's dtype
    bias: Tensor | None,  # [V], of hidden's dtype
    labels: Tensor,  # [N] int64 or int32
    topk_ids: Tensor | None,  # [N, K] int64 or int32
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str,  # a name in BACKENDS
    grad_tolerance: float | None,
    buffer_bytes: int,  # of what the forward may retain for the backward
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(label [N], topk [N, K], tail [N])`; for the backward `state [N, 3]`, `buffer [bytes]`, and those of `select`.

    The state is the summary of `ValidTokens.logps`; the live plan adds three columns, see `LivePass.forward`.
    """
    head = Head(weight, bias, logit_scale, softcap, temperature)
    selection = ValidTokens.select(labels, topk_ids, ignore_index, len(weight))
    valid = ValidTokens(hidden, head, selection, backend, buffer_bytes)
    buffer = valid.tiles.empty(buffer_bytes, dtype=torch.uint8, device=hidden.device)
    if grad_tolerance is None:
        label, topk, tail, summary = valid.logps(run_forward(valid.tiles, valid.plan, buffer))
    else:
        state, dead = valid.live_pass(grad_tolerance, buffer, len(labels)).forward()
        label, topk, tail, summary = valid.logps(state)
        summary = torch.cat([summary, dead], 1)
    label, topk, tail, summary = (spread(values, valid.index, labels) for values in (label, topk, tail, summary))
    return label, topk, tail, summary, buffer, *selection


selected_logps = operator(_selected_logps)


@torch.library.register_fake("dadpo::selected_logps")
def _(
    hidden, weight, bias, labels, topk_ids, logit_scale, softcap, temperature, ignore_index, backend, grad_tolerance,
    buffer_bytes,
):  # fmt: skip
    dtype = accumulator_dtype(hidden.dtype)
    k = 0 if topk_ids is None else topk_ids.shape[1]
    return (
        hidden.new_empty(len(labels), dtype=dtype),
        hidden.new_empty(len(labels), k, dtype=dtype),
        hidden.new_empty(len(labels), dtype=dtype),
        hidden.new_empty(len(labels), 3 if grad_tolerance is None else 6, dtype=dtype),
        hidden.new_empty(buffer_bytes, dtype=torch.uint8),
        labels.new_empty(len(labels), dtype=torch.int64),
        labels.new_empty(len(labels), k + 1, dtype=torch.int32),
        labels.new_empty(len(labels), k + 1, dtype=torch.int64),
        torch.empty(2, dtype=torch.int64, device="cpu"),
    )


@without_autocast
def _selected_logps_backward(
    grad_label: Tensor,  # [N] float32, or float64 as the outputs
    grad_topk: Tensor,  # [N, K]
    grad_tail: Tensor,  # [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,  # the forward's outputs
    topk: Tensor,
    tail: Tensor,
    state: Tensor,
    buffer: Tensor,
    padded_index: Tensor,
    ids: Tensor,
    order: Tensor,
    counts: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    grad_tolerance: float | None,
    needs: list[bool],  # of hidden, weight, bias: whether a gradient is wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden `[N, H]`, weight `[V, H]` and bias `[V]`; empty where `needs` says that none is wanted."""
    head = Head(weight, bias, logit_scale, softcap, temperature)
    valid = ValidTokens(hidden, head, (padded_index, ids, order, counts), backend, len(buffer))
    outputs, grads = (label, topk, tail), (grad_label, grad_topk, grad_tail)
    g = valid.gradients(outputs, grads, state, buffer, needs, grad_tolerance)
    index = valid.index
    del valid  # its copies of hidden and its workspace make room for the gradient of all tokens
    return (
        hidden.new_empty(0) if g.hidden is None else spread_gradient(g.hidden, index, hidden),
        hidden.new_empty(0) if g.weight is None else g.weight,
        hidden.new_empty(0) if g.bias is None else g.bias.to(hidden.dtype),
    )


selected_logps_backward = operator(_selected_logps_backward)


@torch.library.register_fake("dadpo::selected_logps_backward")
def _(grad_label, grad_topk, grad_tail, hidden, weight, bias, label, topk, tail, state, buffer, padded_index, ids,
      order, counts, logit_scale, softcap, temperature, backend, grad_tolerance, needs):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, _, _, *scalars, _, backend, grad_tolerance, _ = inputs
    ctx.options = (*scalars, backend, grad_tolerance)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, *output)


def _backward(ctx, grad_label, grad_topk, grad_tail, *_):
    hidden, weight, bias, *saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = [
        torch.zeros_like(o) if g is None else g
        for g, o in zip((grad_label, grad_topk, grad_tail), saved[:3], strict=True)
    ]
    out = BackwardFunction.call(*grads, hidden, weight, bias, *saved, *ctx.options, needs)
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *[None] * 9


torch.library.register_autograd("dadpo::selected_logps", _backward, setup_context=_setup_context)


def _no_derivative(ctx, *_):
    raise RuntimeError(
        "linear_selected_logps is differentiable once, in reverse mode; for second derivatives (gradient penalties, "
        'Hessian products) and forward mode (jvp, jacfwd, dual numbers) use backend="reference"'
    )


class _Function(torch.autograd.Function):
    """An operator, its `forward`, with what autograd and `torch.func` ask for in addition to `backward`."""

    jvp = staticmethod(_no_derivative)  # an operator alone would drop the tangents and say nothing

    @classmethod
    def call(cls, *args):
        """The outputs, from a node of the graph that is being compiled, or by `apply`.

        Dynamo traces no Function with a `jvp`, and `torch.func` takes no operator with a registered derivative
        (pytorch#170834): each gets the one that it can take. Transforms in a compiled program run eagerly.
        """
        if not torch.compiler.is_compiling():
            return cls.apply(*args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return torch.compiler.disable(cls.apply)(*args)
        return cls.forward(*args)

    @classmethod
    def vmap(cls, info, in_dims, *args):
        """One sample after the other, copied: a buffer among others may begin where no float can."""
        samples = (
            [a.select(dim, i).clone() if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        outputs = [torch.stack(values) for values in zip(*(cls.call(*sample) for sample in samples), strict=True)]
        return tuple(outputs), (0,) * len(outputs)


class SelectedLogpsFunction(_Function):
    """`selected_logps`, differentiable once."""

    @staticmethod
    def forward(*args):
        return selected_logps(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class BackwardFunction(_Function):
    """`selected_logps_backward`, which is not differentiable."""

    @staticmethod
    def forward(*args):
        return selected_logps_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    backward = staticmethod(_no_derivative)

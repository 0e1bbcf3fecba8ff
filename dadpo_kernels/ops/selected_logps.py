"""The primitive: log-probabilities of the label, of the teacher's top-k ids and of the tail, from hidden states.

Every loss of this package, and any other that reads a few log-probabilities per token, is plain PyTorch on its
outputs. With `q = softmax(z)`, `T` the token's top-k ids, incoming gradients `g`, `G = g_label + sum g_topk + g_tail`:

    dz_j = (g_tail / q_tail - G) q_j          j outside T and not the label
    dz_j = -G q_j + g_topk[k] (+ g_label)     j = topk_ids[k] (and the label)
    dz_y = (g_tail / q_tail - G) q_y + g_label    a label y outside T

one scalar per token times the softmax, with the selected entries overwritten. `q_j / q_tail` is `exp(z_j - lse_tail)`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import head_checks as checks
from .backends import reference
from .backends.base import (
    Coefficients,
    Entries,
    Grads,
    Head,
    State,
    inside_topk,
    merge_tail,
    run_gradient,
    run_statistics,
    statistic_dtype,
    tile_bytes,
)
from .backends.logit_gradient import logit_coefficients
from .backends.registry import BACKENDS, resolve
from .live.live_pass import LivePass
from .plan import DEFAULT_BUDGET, Plan, live_bytes, make_live_plan, make_plan


class SelectedLogps(NamedTuple):
    """Log-probabilities in nats: `label [...]`, `topk [..., K]`, `tail [...]`: the log of the mass outside the top k.

    float32 (float64 for float64 inputs); 0 where the label is `ignore_index`.
    """

    label: Tensor
    topk: Tensor
    tail: Tensor


def linear_selected_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    grad_tolerance: float | None = None,
) -> SelectedLogps:
    """Selected log-probabilities of `softmax(z)` without `[tokens, V]` logits, differentiable once.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
        label[n] = log q[n, labels[n]]
        topk[n, k] = log q[n, topk_ids[n, k]]
        tail[n] = log sum_j q[n, j] over the j that are not in topk_ids[n]

    Args:
        hidden: `[..., H]` float32, bfloat16, float16 or float64, any strides.
        weight: `[V, H]`, the LM head's weight, of hidden's dtype (`torch.autocast` casts both, as for a linear).
        labels: `[...]` int64 or int32, aligned: position t of `hidden` predicts `labels[t]`.
        topk_ids: `[..., K]` int64 or int32; duplicates and the label may be among them. None: no top k, `tail` is 0.
        bias: `[V]`.
        logit_scale, softcap, temperature: applied in this order, as transformers' models do. `softcap` None: none.
        ignore_index: label of masked tokens. They are dropped before the first product; outputs and gradients are 0
            there whatever `hidden` and `topk_ids` hold.
        backend: "cpu", "cuda", "triton_rows", "triton", "torch", "reference" (dense, differentiable twice), or "auto":
            the first that can take the tensors; `dadpo doctor` tells which.
        memory_budget: bytes the forward may keep for the backward to save one of four matrix products; 0 keeps
            nothing, None means 256 MiB. The workspace beside it is constant in the number of tokens.
        grad_tolerance: None for exact gradients. Otherwise the live plan may replace the gradient of the logits dz by
            a cheaper dz' with `|dz' - dz| <= grad_tolerance |dz|` (Frobenius norm over all tokens, checked in every
            backward), about half the work; 1e-3 is what rounding dz to bfloat16 costs. The outputs stay exact.
            `live_diagnostics` tells the error and the cost; docs/live.md derives both.

    Returns:
        `SelectedLogps(label [...], topk [..., K], tail [...])`. Where the top k covers the vocabulary, `tail` is -inf
        and takes no gradient.

    Raises:
        TypeError: a dtype that is not supported, or hidden and weight of different dtypes.
        ValueError: shapes, devices or options that do not fit; labels or ids outside `[0, V)` (on CUDA a device-side
            assertion, since a check would wait for the device).
        RuntimeError: in the backward, if the weight's memory was freed since the forward (FSDP2 does, of a weight that
            is used outside its module's forward).

    Source: the online softmax of arXiv 1805.02867; recomputation in the backward as in Cut Cross Entropy
    (arXiv 2411.09009) and Liger (arXiv 2410.10989); the shared gradient form is this package's.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    checks.check_head(hidden, weight, bias, logit_scale, softcap, temperature)
    shape = hidden.shape[:-1]
    checks.check_ids("labels", labels, shape, hidden.device)
    if topk_ids is not None:
        checks.check_ids("topk_ids", topk_ids, shape, hidden.device, extra=1)
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget={memory_budget} is negative; pass bytes, 0 to keep nothing, or None")
    checks.check_tolerance(grad_tolerance)
    name = resolve(backend, hidden.device, hidden.dtype)

    flat = hidden.reshape(-1, hidden.shape[-1])
    y = labels.reshape(-1)
    ids = None if topk_ids is None else topk_ids.reshape(len(y), topk_ids.shape[-1])
    if name == "reference":
        checks.check_range("labels", y[y != ignore_index], weight.shape[0])
        if ids is not None:
            checks.check_range("topk_ids", ids[y != ignore_index], weight.shape[0])
        out = reference.selected_logps(flat, weight, bias, y, ids, logit_scale, softcap, temperature, ignore_index)
    else:
        tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
        budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
        tolerance = grad_tolerance if tracked else None  # without a backward there is nothing to save
        kept = buffer_bytes(flat, weight, budget, tolerance) if tracked else 0
        label, topk, tail, _, _ = _selected_logps(
            flat, weight, bias, y, ids, logit_scale, softcap, temperature, ignore_index, name, tolerance, kept
        )
        out = label, topk, tail
    label, topk, tail = out
    return SelectedLogps(label.view(shape), topk.view(*shape, topk.shape[-1]), tail.view(shape))


def plan_for(
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    *,
    backend: str,
    memory_budget: int | None = None,
    grad_hidden: bool = True,
    grad_weight: bool = True,
) -> Plan:
    """The plan a call of `linear_selected_logps` takes: `print` it, or read its `units` and `retained_bytes`.

    Args:
        rows: tokens that are not masked.
        vocab, width: V and H of the head.
        dtype: of hidden and weight.
        backend: the name of one, such as "cpu".
        memory_budget: bytes, None for the default.
        grad_hidden, grad_weight: which gradients are wanted; a frozen head has `grad_weight=False`.
    """
    tiles = BACKENDS[backend].tiles
    tile = min(tiles.tile_columns(rows, width, dtype), vocab)
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    return make_plan(
        rows, vocab, tile, lambda columns: tile_bytes(tiles, rows, columns, dtype), budget, grad_hidden, grad_weight
    )


def buffer_bytes(hidden: Tensor, weight: Tensor, budget: int, tolerance: float | None = None) -> int:
    """Size of the buffer that the forward may fill: the budget, or a little more than everything there is to retain.

    Known from shapes alone, before masked tokens are counted, so that a compiler can trace it.
    """
    if tolerance is not None:
        return live_bytes(len(hidden), len(weight), hidden.dtype.itemsize, budget)
    rows, columns = len(hidden), len(weight) + 512
    return min(budget, rows * (columns * hidden.dtype.itemsize + columns // 16) + columns // 4)


def local_ids(ids: Tensor, first: int, columns: int) -> Tensor:
    """Ids counted from `first`, in the same order; those outside `[first, first + columns)` where no tile meets them.

    That is below 0, or 2^16 and more behind the last column, which the padding of no tile reaches.
    """
    ids = ids - first
    return ids + 2**16 * (ids >= columns)


class Compacted:
    """The tokens that count, the tiles over them, and their plan. Forward and backward make the same one.

    The head may be the rows `first`, `first + 1`, ... of one with `vocab` rows.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        topk_ids: Tensor | None,
        transform: tuple[float, float | None, float],
        ignore_index: int,
        backend: str,
        budget: int,
        first: int = 0,
        vocab: int | None = None,
    ) -> None:
        self.index = (labels != ignore_index).nonzero()[:, 0]
        rows = len(self.index)
        columns, width = weight.shape
        checks.check_memory(weight)
        vocab = columns if vocab is None else vocab
        labels = labels[self.index]
        checks.check_range("labels", labels, vocab)
        if topk_ids is not None:
            topk_ids = topk_ids[self.index]
            checks.check_range("topk_ids", topk_ids, vocab)
        if vocab != columns:
            labels = local_ids(labels, first, columns)
            topk_ids = None if topk_ids is None else local_ids(topk_ids, first, columns)
        self.entries = Entries.merge(labels, topk_ids)
        hidden = hidden.contiguous() if rows == len(hidden) else hidden[self.index]
        self.head = Head(weight, bias, *transform)
        self.tiles = BACKENDS[backend].tiles(hidden, self.head, self.entries)
        self.live_pass = BACKENDS[backend].live
        self.plan = plan_for(rows, columns, width, hidden.dtype, backend=backend, memory_budget=budget)

    def logps(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(label [n], topk [n, K], tail [n], [n, 3])` from the state of all columns; the last is for `gradients`."""
        base, lse, tail = merge_tail(state, inside_topk(self.entries, state.selected))
        selected = (state.selected - base[:, None]) - lse[:, None]
        logps = torch.empty_like(selected).scatter_(1, self.entries.order, selected)
        k = logps.shape[1] - 1
        return logps[:, k], logps[:, :k], tail, torch.stack([base + lse, state.max, state.sum.to(lse.dtype)], 1)

    def gradients(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Tensor,
        retained: Tensor,
        needs: Sequence[bool],
        grad_tolerance: float | None = None,
    ) -> Grads:
        """Gradients of hidden `[n, H]`, weight and bias, as `needs` says; all but the weight's in the state's dtype.

        `outputs` and `grads` are label, topk and tail of all tokens, `state` is what `logps` gave, of all tokens too,
        and for the live plan what its forward found about each token's dead columns.
        """
        weight, wide = self.head.weight, state.dtype
        rows, width = len(self.index), weight.shape[1]
        grad_hidden = weight.new_zeros(rows, self.tiles.grad_hidden_columns(), dtype=wide) if needs[0] else None
        grad_weight = self.tiles.empty(*weight.shape, dtype=weight.dtype, device=weight.device) if needs[1] else None
        grad_bias = weight.new_empty(len(weight), dtype=wide) if needs[2] else None
        if rows:
            coefficients, dead = self.coefficients(outputs, grads, state)
            out = Grads(grad_hidden, grad_weight, grad_bias)
            if grad_tolerance is None:
                plan = replace(self.plan, grad_hidden=bool(needs[0]), grad_weight=bool(needs[1]))
                run_gradient(self.tiles, plan, retained, coefficients, out)
            else:
                self.live(grad_tolerance, retained, len(state)).gradient(coefficients, dead, out)
        else:
            for grad in (grad_weight, grad_bias):
                if grad is not None:
                    grad.zero_()
        return Grads(None if grad_hidden is None else grad_hidden[:, :width], grad_weight, grad_bias)

    def coefficients(
        self, outputs: Sequence[Tensor], grads: Sequence[Tensor], state: Tensor
    ) -> tuple[Coefficients, Tensor]:
        """The gradient of the logits, and what the live plan's forward found, of the tokens that count."""
        label, topk, tail = outputs
        logps = torch.cat([topk, label[:, None], tail[:, None]], 1)[self.index]
        label, topk, tail = grads
        incoming = torch.cat([topk, label[:, None], tail[:, None]], 1)[self.index].to(state.dtype)
        summary, dead = state[self.index].split([3, state.shape[1] - 3], 1)
        return logit_coefficients(self.entries, self.head, logps, summary, incoming), dead

    def live(self, tolerance: float, buffer: Tensor, tokens: int) -> LivePass:
        """The live pass over the tokens that count, of `tokens` in all, with the buffer that both its halves share."""
        hidden, head = self.tiles.hidden, self.head
        vocab, width = head.weight.shape
        size = hidden.dtype.itemsize
        plan = make_live_plan(tokens, self.plan.rows, vocab, width, size, len(buffer), tolerance)
        return self.live_pass(hidden, head, self.entries, plan, buffer)


def spread(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Values of the tokens at `index` at their places, 0 elsewhere."""
    return values.new_zeros(len(like), *values.shape[1:]).index_copy_(0, index, values)


@torch.library.custom_op("dadpo::selected_logps", mutates_args=())
def _selected_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    topk_ids: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str,
    grad_tolerance: float | None,
    retained_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(label [N], topk [N, K], tail [N], state [N, 3], retained [bytes])`; the state: lse, the tail's max and sum.

    The live plan adds three columns to the state: see `LivePass.statistics`.
    """
    transform = (logit_scale, softcap, temperature)
    c = Compacted(hidden, weight, bias, labels, topk_ids, transform, ignore_index, backend, retained_bytes)
    retained = c.tiles.empty(retained_bytes, dtype=torch.uint8, device=hidden.device)
    if grad_tolerance is None:
        state = run_statistics(c.tiles, c.plan, retained)
        dead = state.max.new_empty(c.plan.rows, 0)
    else:
        state, dead = c.live(grad_tolerance, retained, len(labels)).statistics()
    *logps, summary = c.logps(state)
    label, topk, tail, summary = (
        spread(values, c.index, labels) for values in (*logps, torch.cat([summary, dead], 1))
    )
    return label, topk, tail, summary, retained


@_selected_logps.register_fake
def _(
    hidden, weight, bias, labels, topk_ids, logit_scale, softcap, temperature, ignore_index, backend, grad_tolerance,
    retained_bytes,
):  # fmt: skip
    dtype = statistic_dtype(hidden.dtype)
    k = 0 if topk_ids is None else topk_ids.shape[1]
    return (
        hidden.new_empty(len(labels), dtype=dtype),
        hidden.new_empty(len(labels), k, dtype=dtype),
        hidden.new_empty(len(labels), dtype=dtype),
        hidden.new_empty(len(labels), 3 if grad_tolerance is None else 6, dtype=dtype),
        hidden.new_empty(retained_bytes, dtype=torch.uint8),
    )


@torch.library.custom_op("dadpo::selected_logps_backward", mutates_args=())
def _selected_logps_backward(
    grad_label: Tensor,
    grad_topk: Tensor,
    grad_tail: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    topk_ids: Tensor | None,
    label: Tensor,
    topk: Tensor,
    tail: Tensor,
    state: Tensor,
    retained: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str,
    grad_tolerance: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden `[N, H]`, weight `[V, H]` and bias `[V]`; empty where `needs` says that none is wanted."""
    transform = (logit_scale, softcap, temperature)
    c = Compacted(hidden, weight, bias, labels, topk_ids, transform, ignore_index, backend, len(retained))
    g = c.gradients((label, topk, tail), (grad_label, grad_topk, grad_tail), state, retained, needs, grad_tolerance)
    index = c.index
    del c  # its copies of hidden and its workspace make room for the gradient of all tokens
    none = hidden.new_empty(0)
    return (
        none if g.hidden is None else spread(g.hidden.to(hidden.dtype), index, hidden),
        none.clone() if g.weight is None else g.weight,
        none.clone() if g.bias is None else g.bias.to(hidden.dtype),
    )


@_selected_logps_backward.register_fake
def _(grad_label, grad_topk, grad_tail, hidden, weight, bias, labels, topk_ids, label, topk, tail, state, retained,
      logit_scale, softcap, temperature, ignore_index, backend, grad_tolerance, needs):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, topk_ids, *ctx.options, _ = inputs
    label, topk, tail, state, retained = output
    ctx.mark_non_differentiable(state, retained)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, topk_ids, label, topk, tail, state, retained)


def _backward(ctx, grad_label, grad_topk, grad_tail, _state, _retained):
    hidden, weight, bias, labels, topk_ids, label, topk, tail, state, retained = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = [
        torch.zeros_like(o) if g is None else g
        for g, o in zip((grad_label, grad_topk, grad_tail), (label, topk, tail), strict=True)
    ]
    out = _selected_logps_backward(
        *grads, hidden, weight, bias, labels, topk_ids, label, topk, tail, state, retained, *ctx.options, needs
    )
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *[None] * 9


def _second_derivative(ctx, *grads):
    raise RuntimeError(
        "linear_selected_logps is differentiable once; for second derivatives (gradient penalties, Hessian products) "
        'use backend="reference"'
    )


_selected_logps.register_autograd(_backward, setup_context=_setup_context)
_selected_logps_backward.register_autograd(_second_derivative)

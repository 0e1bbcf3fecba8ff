"""The primitive on a head whose vocabulary is spread over the ranks of a process group (tensor parallelism).

Rank r holds some rows of the weight, `[V_r, H]`, and nothing else of it. All ranks hold the same hidden states and
ids. Each makes the pass of `selected_logps.py` over its own columns; what is left to do is to merge numbers per token:

    forward    max over the ranks of the tail's largest logit and of the selected logits     N (K + 2) float32
               sum over the ranks of the tail's sum, brought to the common maximum           N float64
    backward   sum over the ranks of the gradient of hidden                                  N H float32

N counts the tokens that are not masked. The tail is merged by its maximum and sum, never by subtraction. A selected
logit has one owner and is -inf elsewhere, so its maximum is its value. The weight's gradient stays where it arises.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from . import checks
from .autocast import without_autocast
from .backends.base import State, run_forward
from .head import Head, HeadOptions
from .run import Run
from .selected_logps import SelectedLogps
from .valid_tokens import ValidTokens, spread, spread_gradient


def vocab_parallel_selected_logps(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    topk_ids: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    **head_options: Unpack[HeadOptions],
) -> SelectedLogps:
    """`linear_selected_logps` of the whole vocabulary, from a shard of the head on each rank of `group`.

    Every rank returns the same values and gets the same gradient of `hidden`, the whole one; the gradients of `weight`
    and `bias` are those of the rank's rows. So every rank computes the same loss and calls backward on it, and the
    result is that of one process (no factor for the number of ranks). Forward and backward are collective.

    Communication per rank and call, N tokens that are not masked: an all-reduce of `N (K + 2)` float32 and one of `N`
    float64 in the forward, one of `N H` float32 in the backward, and a few integers. Nothing grows with V.

    Args:
        hidden: `[..., H]`, the same on every rank.
        weight: the rank's rows of the head, in rank order, `[V_r, H]`: a plain tensor, or a DTensor `[V, H]` that is
            `Shard(0)` on a one-dimensional mesh over `group`; or a `Head` of these. Shards need not be equal.
        labels, topk_ids: `[...]` and `[..., K]`, ids of the whole vocabulary, the same on every rank.
        group: the ranks that share the vocabulary.
        memory_budget: bytes per rank.
        ignore_index, backend: as in `linear_selected_logps`; not "reference".
        head_options: as in `linear_selected_logps`; `bias` is `[V_r]`, or a DTensor `[V]` like weight.

    Raises:
        TypeError, ValueError: as `linear_selected_logps`; a shard without rows; labels that differ between the ranks;
            a DTensor with another layout.

    Source: the vocabulary-parallel cross entropy of Megatron-LM (arXiv 1909.08053), extended by top k and tail.
    """
    head = Head.of(weight, head_options)
    return vocab_parallel_of(hidden, head, labels, topk_ids, ignore_index, Run(backend, memory_budget), group)


def vocab_parallel_of(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    topk_ids: Tensor | None,
    ignore_index: int,
    run: Run,
    group: dist.ProcessGroup,
) -> SelectedLogps:
    """`vocab_parallel_selected_logps` with the head and the ways to run it as one value each."""
    if run.backend == "reference":
        raise ValueError('backend="reference" is dense, it would need the whole head; use "auto" or "torch"')
    if run.grad_tolerance is not None:
        raise ValueError(
            f"grad_tolerance={run.grad_tolerance} and a vocab_group: a sharded vocabulary has exact gradients only; "
            "pass grad_tolerance=None"
        )
    bias = None if head.bias is None else _local("bias", head.bias, group)
    head = replace(head, weight=_local("weight", head.weight, group), bias=bias)
    # Collective, so before any check that one rank alone may fail.
    first, vocab = _place(head.weight, labels, topk_ids, ignore_index, group)
    hidden, head = head.prepare(hidden)
    shape = hidden.shape[:-1]
    checks.check_ids("labels", labels, shape, hidden.device)
    if topk_ids is not None:
        checks.check_ids("topk_ids", topk_ids, shape, hidden.device, extra=1)
        topk_ids = topk_ids.reshape(labels.numel(), topk_ids.shape[-1])
    # The pass over this rank's columns.
    flat = hidden.reshape(-1, hidden.shape[-1])
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *head.tensors))
    backend = run.resolve(hidden.device, hidden.dtype)
    options = _Options(
        head.logit_scale,
        head.softcap,
        head.temperature,
        ignore_index,
        backend,
        run.buffer_bytes(len(flat), len(head.weight), hidden.dtype, backend) if tracked else 0,
        first,
        vocab,
    )
    label, topk, tail = _VocabParallel.apply(
        flat, head.weight, head.bias, labels.reshape(-1), topk_ids, options, group
    )
    return SelectedLogps(label.view(shape), topk.view(*shape, topk.shape[-1]), tail.view(shape))


class _Options(NamedTuple):
    """What forward and backward need in addition to tensors and group."""

    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    backend: str
    buffer_bytes: int
    first: int  # id of this rank's first row
    vocab: int  # rows of the whole head

    def valid_tokens(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, selection: Sequence[Tensor]
    ) -> ValidTokens:
        head = Head(weight, bias, self.logit_scale, self.softcap, self.temperature)
        return ValidTokens(hidden, head, selection, self.backend, self.buffer_bytes)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        topk_ids: Tensor | None,
        options: _Options,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:
        shard = options.first, len(weight)
        selection = ValidTokens.select(labels, topk_ids, options.ignore_index, options.vocab, shard)
        valid = options.valid_tokens(hidden, weight, bias, selection)
        buffer = valid.tiles.empty(options.buffer_bytes, dtype=torch.uint8, device=hidden.device)
        outputs = valid.logps(_merged(run_forward(valid.tiles, valid.plan, buffer), group))
        label, topk, tail, state = (spread(values, valid.index, labels) for values in outputs)
        ctx.options, ctx.group = options, group
        ctx.save_for_backward(hidden, weight, bias, *selection, label, topk, tail, state, buffer)
        return label, topk, tail

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved, state, buffer = ctx.saved_tensors
        selection, outputs = saved[:4], saved[4:]
        valid = ctx.options.valid_tokens(hidden, weight, bias, selection)
        g = valid.gradients(outputs, grads, state, buffer, ctx.needs_input_grad[:3])
        index = valid.index
        del valid  # its copies of hidden and its workspace make room for the gradient of all tokens
        grad_hidden = None
        if g.hidden is not None:
            # Each rank adds its columns' share in float32; rounded once, after the sum.
            total = g.hidden.contiguous()
            if len(total):
                dist.all_reduce(total, group=ctx.group)
            grad_hidden = spread_gradient(total, index, hidden)
        grad_bias = None if g.bias is None else g.bias.to(hidden.dtype)
        return grad_hidden, g.weight, grad_bias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "vocab_parallel_selected_logps is differentiable in reverse mode only; for forward mode (dual numbers) "
            'gather the head and call linear_selected_logps with backend="reference"'
        )


def _merged(state: State, group: dist.ProcessGroup) -> State:
    """The state of all ranks' columns from that of this rank's."""
    if not len(state.max):
        return state
    highest = torch.cat([state.max[:, None], state.selected], 1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    common = highest[:, 0].contiguous()
    total = state.sum * (state.max - common.masked_fill(common == -torch.inf, 0)).double().exp()
    dist.all_reduce(total, group=group)
    return State(common, total, highest[:, 1:].contiguous())


def _local(name: str, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of a plain tensor or DTensor; gradients find their way back."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    if mesh.ndim != 1 or tensor.placements != (Shard(0),) or mesh.get_group() != group:
        raise ValueError(
            f"{name} is a DTensor with placements {tensor.placements} on {mesh}; it must be Shard(0) on a "
            "one-dimensional mesh over `group`: redistribute it, or pass the rank's rows as a plain tensor"
        )
    return tensor.to_local()


def _place(
    weight: Tensor, labels: Tensor, topk_ids: Tensor | None, ignore_index: int, group: dist.ProcessGroup
) -> tuple[int, int]:
    """The id of this rank's first row and the size of the vocabulary; all ranks raise if the labels differ."""
    k = 0 if topk_ids is None else topk_ids.shape[-1]
    local = labels.new_tensor([len(weight), labels.numel(), k, 0, 0], dtype=torch.int64)
    local[3], local[4] = (labels != ignore_index).sum(), labels.sum()
    gathered = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(gathered, local, group=group)
    sizes, *same = torch.stack(gathered, 1).tolist()
    names = ("number of labels", "k", "number of labels that count", "sum of labels")
    for name, values in zip(names, same, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks of the group differ in their {name}: {values}; all ranks that share a vocabulary need the "
                "same batch: do not shard the data over them"
            )
    if 0 in sizes:
        raise ValueError(f"the ranks of the group hold {sizes} rows of weight; every rank needs at least one")
    return sum(sizes[: group.rank()]), sum(sizes)

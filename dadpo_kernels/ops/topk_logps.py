"""The primitive's sibling for the teacher: its top-k ids with log-probabilities, the tail, and the label's."""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from . import checks
from .autocast import without_autocast
from .backends import cpu, reference
from .backends.base import Best, Entries, accumulator_dtype, merge_tail, run_topk
from .backends.registry import BACKENDS, resolve
from .head import Head, HeadOptions
from .log import debug
from .operator import operator
from .run import exact_plan
from .valid_tokens import compact, spread

FASTEST = ("cuda",)  # on an H100 three times as fast as Triton's radix select


class TopkLogps(NamedTuple):
    """Log-probabilities in nats, float32 (float64 for float64 inputs).

    `ids [..., k]` int64 by descending log-probability (ties: lowest id first), `logps [..., k]`, `tail [...]` the log
    of the mass outside them, `label [...]` or None.
    """

    ids: Tensor
    logps: Tensor
    tail: Tensor
    label: Tensor | None


def linear_topk_logps(
    hidden: Tensor,
    weight: Tensor | Head,
    k: int,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    **head_options: Unpack[HeadOptions],
) -> TopkLogps:
    """The k most likely tokens of `softmax(z)` and their log-probabilities, without `[tokens, V]` logits. No gradient.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
        logps[n, i] = log q[n, ids[n, i]],  label[n] = log q[n, labels[n]]
        tail[n] = log sum_j q[n, j] over the j that are not in ids[n]

    The log-probabilities are those of the full softmax, never renormalised over the k.

    Args:
        hidden: `[..., H]` float32, bfloat16, float16 or float64.
        weight: `[V, H]` of the same dtype, or a `Head`.
        k: 0 to V.
        labels: `[...]` int64 or int32, aligned with hidden. Where it is `ignore_index` the token is skipped: ids,
            logps, tail and label are 0 there. None: every token counts and `label` is None.
        ignore_index, backend, head_options: as in `linear_selected_logps`; on GPUs "auto" prefers "cuda".

    Returns:
        `TopkLogps(ids [..., k], logps [..., k], tail [...], label [...] or None)`.

    Raises:
        TypeError, ValueError: as `linear_selected_logps`; k outside `[0, V]`.
    """
    hidden, head = Head.of(weight, head_options).map(Tensor.detach).prepare(hidden.detach())
    shape = hidden.shape[:-1]
    if not 0 <= k <= len(head.weight):
        raise ValueError(f"k={k} must lie in [0, V={len(head.weight)}]")
    if labels is not None:
        checks.check_ids("labels", labels, shape, hidden.device)
    name = resolve(backend, hidden.device, hidden.dtype, FASTEST)
    if name == "cpu" and k > cpu.MAX_K:
        if backend == "cpu":
            raise ValueError(f'k={k} is above the cpu backend\'s {cpu.MAX_K}; use backend="torch"')
        debug("k=%d is above the cpu backend's %d: torch runs it", k, cpu.MAX_K)
        name = "torch"
    ids, logps, tail, label = _topk_logps(
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, None if labels is None else labels.reshape(-1),
        k, head.logit_scale, head.softcap, head.temperature, ignore_index, name,
    )  # fmt: skip
    return TopkLogps(
        ids.view(*shape, k), logps.view(*shape, k), tail.view(shape), None if labels is None else label.view(shape)
    )


@operator
@without_autocast
def _topk_logps(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H], of hidden's dtype
    bias: Tensor | None,  # [V], of hidden's dtype
    labels: Tensor | None,  # [N] int64 or int32
    k: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str,  # a name in BACKENDS, or "reference"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(ids [N, k] int64, logps [N, k], tail [N], label [N])`."""
    if labels is None:
        index = torch.arange(len(hidden), device=hidden.device)
        y = index.new_zeros(len(hidden))
    else:
        index = (labels != ignore_index).nonzero()[:, 0]
        y = labels[index]
        checks.check_range("labels", y, len(weight), index)
    head = Head(weight, bias, logit_scale, softcap, temperature)
    valid = compact(hidden, index)
    if backend == "reference":
        logits = reference.dense_logits(valid, head)
        ids, logps, tail = reference.topk_logps(logits, k)
        label = logits.log_softmax(-1).gather(1, y.long()[:, None])[:, 0]
    else:
        ids, logps, tail, label = _tiled_topk(valid, head, y, k, backend)
    ids, logps, tail, label = (spread(values, index, hidden) for values in (ids, logps, tail, label))
    return ids, logps, tail, label


def _tiled_topk(hidden: Tensor, head: Head, labels: Tensor, k: int, backend: str) -> tuple[Tensor, ...]:
    rows, vocab, dtype = len(hidden), len(head.weight), accumulator_dtype(hidden.dtype)
    entries = Entries.merge(labels, None)
    tiles = BACKENDS[backend].tiles(hidden, head, entries)
    plan = exact_plan(backend, rows, vocab, hidden.shape[1], hidden.dtype, memory_budget=0)
    # Twice k: candidates are collected until the buffer is full and then cut back to the best k.
    best = Best(
        hidden.new_full((rows, 2 * k + 1), -torch.inf, dtype=dtype),
        hidden.new_zeros(rows, 2 * k + 1, dtype=torch.int32),
        hidden.new_zeros(rows, dtype=torch.int32),
        k,
    )
    state = run_topk(tiles, plan, best)
    values, ids = best.values[:, :k], best.ids[:, :k].long()
    # By descending value; among equals by ascending id.
    by_id = ids.argsort(dim=1)
    order = by_id.gather(1, values.gather(1, by_id).argsort(dim=1, descending=True, stable=True))
    values, ids = values.gather(1, order), ids.gather(1, order)
    base, lse, tail = merge_tail(state, values)
    return ids, (values - base[:, None]) - lse[:, None], tail, (state.selected[:, 0] - base) - lse


@torch.library.register_fake("dadpo::topk_logps")
def _(hidden, weight, bias, labels, k, logit_scale, softcap, temperature, ignore_index, backend):
    n, dtype = len(hidden), accumulator_dtype(hidden.dtype)
    return (
        hidden.new_empty(n, k, dtype=torch.int64),
        hidden.new_empty(n, k, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
    )

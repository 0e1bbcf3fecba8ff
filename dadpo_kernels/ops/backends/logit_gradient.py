"""From the gradients of the selected log-probabilities to the gradient of the logits, in `[n]` and `[n, M]` numbers.

This is where the formula at the top of `dadpo_kernels/ops/selected_logps.py` is evaluated; backends only spread it.
"""

import torch
from torch import Tensor

from ..head import Head
from .base import Coefficients, Entries


def logit_coefficients(entries: Entries, head: Head, logps: Tensor, state: Tensor, grads: Tensor) -> Coefficients:
    """The gradient of the raw products `hidden @ weight.T`: one scalar per token, and its exact values at the entries.

    `logps` and `grads` are `[n, K + 2]`: top-k, label, tail; `state` is `[n, 3]`: lse, the tail's max and sum.
    """
    lse, tail_max, tail_sum = state.unbind(1)
    empty = tail_sum == 0  # the top k covers the vocabulary: log 0 takes no gradient
    tail = logps[:, -1].masked_fill(empty, 0)
    grads = torch.cat([grads[:, :-1], grads[:, -1:].masked_fill(empty[:, None], 0)], 1)
    total = grads.sum(1)
    c = (grads[:, -1] - total * tail.exp()).masked_fill(empty, 0)  # dz_j = c exp(z_j - lse_tail)

    logp = logps[:, :-1].gather(1, entries.order)
    g, in_topk = segment_sums(entries.ids, grads[:, :-1].gather(1, entries.order), entries.in_topk)
    values = torch.where(in_topk, -total[:, None] * logp.exp(), c[:, None] * (logp - tail[:, None]).exp()) + g

    slope = head.slope(logp + lse[:, None])
    if slope is not None:
        values = values * slope
    factor = head.logit_scale / head.temperature
    return Coefficients(
        (c * factor / tail_sum.masked_fill(empty, 1)).contiguous(),
        tail_max.masked_fill(empty, 0).contiguous(),
        (values * factor).contiguous(),
    )


def segment_sums(ids: Tensor, grads: Tensor, in_topk: Tensor) -> tuple[Tensor, Tensor]:
    """For ascending `ids [n, M]`: the sum of `grads` over equal ids, and whether any of them is a top-k id, at each.

    A doubling scan in both directions: deterministic, and exact where an id stands alone.
    """

    def scan(x: Tensor, reverse: bool) -> Tensor:
        key = ids.flip(1) if reverse else ids
        x = x.flip(1) if reverse else x
        step = 1
        while step < x.shape[1]:
            same = key[:, step:] == key[:, :-step]
            x = torch.cat([x[:, :step], x[:, step:] + x[:, :-step] * same], 1)
            step *= 2
        return x.flip(1) if reverse else x

    flags = in_topk.to(grads.dtype)
    sums = scan(grads, False) + scan(grads, True) - grads
    return sums, (scan(flags, False) + scan(flags, True)) > 0.5

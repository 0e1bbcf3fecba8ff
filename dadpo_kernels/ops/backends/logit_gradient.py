"""From the gradients of the selected log-probabilities to the gradient of the logits, in `[n]` and `[n, M]` numbers.

This is where the formula at the top of `dadpo_kernels/ops/selected_logps.py` is evaluated; backends only spread it.
"""

import torch
from torch import Tensor

from ..head import Head
from .base import Coefficients, Entries


def logit_coefficients(
    entries: Entries, head: Head, logps: Tensor, tail: Tensor, state: Tensor, grads: Tensor, grad_tail: Tensor
) -> Coefficients:
    """The gradient of the raw products `hidden @ weight.T`: one scalar per token, and its exact values at the entries.

    Args:
        logps, grads: `[n, K + 1]`, of top-k and label; tail, grad_tail: `[n]`.
        state: `[n, 3]`, lse, the tail's max and sum.
    """
    lse, tail_max, tail_sum = state.unbind(1)
    grads, grad_tail = grads.to(state.dtype), grad_tail.to(state.dtype)
    empty = tail_sum == 0  # the top k covers the vocabulary: log 0 takes no gradient
    tail, grad_tail = tail.masked_fill(empty, 0), grad_tail.masked_fill(empty, 0)
    total = grads.sum(1) + grad_tail
    c = torch.addcmul(grad_tail, total, tail.exp(), value=-1).masked_fill(empty, 0)  # dz_j = c exp(z_j - lse_tail)

    logp = logps.gather(1, entries.order)
    g, in_topk = segment_sums(entries, grads.gather(1, entries.order))
    # In the top k, -total exp(logp); a label outside, c exp(logp - tail); and what comes in.
    share = logp.sub(tail[:, None]).where(~in_topk, logp).exp()
    values = torch.addcmul(g, torch.where(in_topk, -total[:, None], c[:, None]), share)

    slope = head.slope(logp + lse[:, None])
    if slope is not None:
        values = values * slope
    factor = head.logit_scale / head.temperature
    if factor != 1:
        c, values = c * factor, values * factor
    return Coefficients(c / tail_sum.masked_fill(empty, 1), tail_max.masked_fill(empty, 0), values)


def segment_sums(entries: Entries, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of `grads [n, M]` over equal ids, and whether any of them is a top-k id, at each.

    Exact where an id stands alone. Among equals the label comes last, so all before it are top-k ids.
    """
    ids, in_topk = entries.ids, entries.in_topk.clone()
    same = ids[:, 1:] == ids[:, :-1]
    in_topk[:, 1:] |= same
    if entries.pairs:
        before, behind = grads[:, :-1] * same, grads[:, 1:] * same
        sums = grads.clone()
        sums[:, 1:] += before
        sums[:, :-1] += behind
        return sums, in_topk
    return scan(ids, grads, False) + scan(ids, grads, True) - grads, in_topk


def scan(ids: Tensor, grads: Tensor, reverse: bool) -> Tensor:
    """Sums over equal ids up to each place, or from it on: by doubling, hence deterministic."""
    key, x = (ids.flip(1), grads.flip(1)) if reverse else (ids, grads)
    step = 1
    while step < x.shape[1]:
        same = key[:, step:] == key[:, :-step]
        x = torch.cat([x[:, :step], x[:, step:] + x[:, :-step] * same], 1)
        step *= 2
    return x.flip(1) if reverse else x

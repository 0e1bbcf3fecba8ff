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
        state: `[n, 3]`, lse, and of the tail the largest logit and the inverse of the sum relative to it; both 0 where
            the top k covers the vocabulary.
    """
    lse, base, inverse = state.unbind(1)
    grad_tail = grad_tail.masked_fill(inverse == 0, 0)  # log 0 takes no gradient
    total = grads.sum(1) + grad_tail
    c = torch.addcmul(grad_tail, total, tail.exp(), value=-1)  # dz_j = c exp(z_j - lse_tail)

    logp = logps.gather(1, entries.order)
    g, in_topk = segment_sums(entries, grads.gather(1, entries.order))
    # In the top k, -total exp(logp); a label outside, c exp(logp - tail); and what comes in.
    share = torch.where(in_topk, logp, logp - tail[:, None]).exp()
    values = torch.addcmul(g, torch.where(in_topk, -total[:, None], c[:, None]), share)

    slope = head.slope(logp + lse[:, None])
    if slope is not None:
        values = values * slope
    factor = head.logit_scale / head.temperature
    if factor != 1:
        c, values = c * factor, values * factor
    return Coefficients(c * inverse, base.contiguous(), values)


def segment_sums(entries: Entries, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of `grads [n, M]` over equal ids, and whether any of them is a top-k id, at each; edits `grads`.

    Exact where an id stands alone. Among equals the label comes last, so all before it are top-k ids.
    """
    ids, in_topk = entries.ids, entries.in_topk.clone()
    same = ids[:, 1:] == ids[:, :-1]
    in_topk[:, 1:].logical_or_(same)
    if entries.pairs:
        before, behind = grads[:, :-1] * same, grads[:, 1:] * same
        grads[:, 1:].add_(before)
        grads[:, :-1].add_(behind)
        return grads, in_topk
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

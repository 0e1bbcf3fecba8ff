"""What trainers log about the next-token distribution and no loss needs: one product of the head, no gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import head_checks as checks
from .backends.base import Entries, Head, statistic_dtype
from .backends.torch_ import TorchTiles, finite


class TokenStatistics(NamedTuple):
    """Of `q = softmax(z)` at every token, 0 (False) where the label is `ignore_index`.

    Attributes:
        entropy: `[...]`, `-Σ q log q`, nats.
        mean_logit: `[...]`, the mean of `z` over the vocabulary.
        log_sum_sq: `[...]`, `log Σ q²` (WPO's alignment term, arXiv 2406.11827).
        is_top1: `[...]` bool, whether the label is the most probable token (the first of several).
    """

    entropy: Tensor
    mean_logit: Tensor
    log_sum_sq: Tensor
    is_top1: Tensor


@torch.no_grad()
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TokenStatistics:
    """Statistics of the whole next-token distribution without `[tokens, V]` logits, in plain PyTorch on any device.

    Args:
        hidden, weight, labels, bias, logit_scale, softcap, temperature, ignore_index: see `linear_selected_logps`.

    Returns:
        TokenStatistics, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `linear_selected_logps`.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    checks.check_head(hidden, weight, bias, logit_scale, softcap, temperature)
    checks.check_ids("labels", labels, hidden.shape[:-1], hidden.device)
    valid = labels != ignore_index
    y = labels[valid]
    checks.check_range("labels", y, len(weight))
    rows, dtype = hidden[valid], statistic_dtype(hidden.dtype)
    tiles = TorchTiles(rows, Head(weight, bias, logit_scale, softcap, temperature), Entries.merge(y, None))
    tile = TorchTiles.tile_columns(len(rows), rows.shape[1], rows.dtype)

    # Sums of e = exp(z - top): of e, e², z and -e log e. When the top rises by d, e shrinks by r = exp(-d).
    top = rows.new_full((len(rows),), -torch.inf, dtype=dtype)
    argmax = torch.zeros_like(y)
    total, squares, plogp, logits_sum = (torch.zeros_like(top) for _ in range(4))
    for first in range(0, len(weight), tile):
        z = tiles.logits(first, min(tile, len(weight) - first))
        logits_sum += z.sum(1)
        tile_top, at = z.max(1)
        argmax = torch.where(tile_top > top, first + at, argmax)
        new_top = finite(torch.maximum(top, tile_top))
        d = new_top - top
        r = (-d).exp()
        plogp = r * (plogp + (total * d).nan_to_num(0))  # 0 * inf before the first finite logit
        e = z.sub_(new_top[:, None]).exp_()
        total = total * r + e.sum(1)
        squares = squares * r * r + e.square().sum(1)
        plogp += torch.special.entr(e).sum(1)
        top = torch.maximum(top, tile_top)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).masked_scatter_(valid, values)

    return TokenStatistics(
        spread(total.log() + plogp / total),
        spread(logits_sum / len(weight)),
        spread(squares.log() - 2 * total.log()),
        spread(argmax == y),
    )

"""What trainers log about the next-token distribution and no loss needs: one product of the head, no gradient."""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from . import checks
from .autocast import without_autocast
from .backends.base import Entries, accumulator_dtype
from .backends.torch_ import TorchTiles, finite
from .head import Head, HeadOptions
from .operator import operator
from .valid_tokens import compact, spread


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
    weight: Tensor | Head,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    **head_options: Unpack[HeadOptions],
) -> TokenStatistics:
    """Statistics of the whole next-token distribution without `[tokens, V]` logits, on any device. No gradient.

    Args:
        hidden, weight, labels, ignore_index, head_options: see `linear_selected_logps`.

    Returns:
        TokenStatistics, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `linear_selected_logps`.
    """
    hidden, head = Head.of(weight, head_options).prepare(hidden)
    checks.check_ids("labels", labels, hidden.shape[:-1], hidden.device)
    values = _token_statistics(
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, labels.reshape(-1),
        head.logit_scale, head.softcap, head.temperature, ignore_index,
    )  # fmt: skip
    return TokenStatistics(*(v.view(labels.shape) for v in values))


@operator
@without_autocast
def _token_statistics(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H], of hidden's dtype
    bias: Tensor | None,  # [V], of hidden's dtype
    labels: Tensor,  # [N] int64 or int32
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `TokenStatistics`, `[N]` each."""
    index = (labels != ignore_index).nonzero()[:, 0]
    y = labels[index]
    checks.check_range("labels", y, len(weight), index)
    values = _statistics(compact(hidden, index), Head(weight, bias, logit_scale, softcap, temperature), y)
    entropy, mean_logit, log_sum_sq, is_top1 = (spread(v, index, labels) for v in values)
    return entropy, mean_logit, log_sum_sq, is_top1


@torch.library.register_fake("dadpo::token_statistics")
def _(hidden, weight, bias, labels, logit_scale, softcap, temperature, ignore_index):
    n, dtype = len(labels), accumulator_dtype(hidden.dtype)
    return *(hidden.new_empty(n, dtype=dtype) for _ in range(3)), hidden.new_empty(n, dtype=torch.bool)


def _statistics(rows: Tensor, head: Head, y: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TokenStatistics` of `rows [n, H]` with labels `y [n]`."""
    vocab, dtype = len(head.weight), accumulator_dtype(rows.dtype)
    tiles = TorchTiles(rows, head, Entries.merge(y, None))
    tile = TorchTiles.tile_columns(len(rows), rows.shape[1], rows.dtype)

    # Sums of e = exp(z - top): of e, e², z and -e log e. When the top rises by d, e shrinks by r = exp(-d).
    top = rows.new_full((len(rows),), -torch.inf, dtype=dtype)
    argmax = torch.zeros_like(y)
    total, squares, plogp, logits_sum = (torch.zeros_like(top) for _ in range(4))
    for first in range(0, vocab, tile):
        z = tiles.logits(first, min(tile, vocab - first))
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

    return total.log() + plogp / total, logits_sum / vocab, squares.log() - 2 * total.log(), argmax == y

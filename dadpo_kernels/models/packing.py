"""Padding-free batches: sequences one behind the other in a row, as rows of their own for losses over answers."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def unpack(
    packed: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    fill: float = 0,
) -> Tensor:
    """`[1, N, ...]` or `[N, ...]`, R sequences one behind the other, as `[R, T, ...]`, padded on the right.

    Differentiable. For hidden states it costs a copy: what is padded here has no label, and the primitives drop
    tokens without a label before their first product. Pack the chosen answers first and the rejected ones second, in
    the same order, and the result is what `linear_dadpo_loss` takes.

    Args:
        packed: per-token values: hidden states, aligned labels, log-probabilities.
        position_ids: `[1, N]` or `[N]`, counting every sequence from 0.
        cu_seqlens: `[R + 1]`, where sequences start and the last one ends, as FlashAttention takes them. Either this
            or position_ids.
        attention_mask: `[1, N]` or `[N]`, 1 for tokens and then 0 for padding behind the last sequence, which is left
            out. None: there is none.
        fill: what to pad with; -100 for labels.

    Raises:
        ValueError: neither or both of the descriptions; one that does not fit `packed`; positions that do not count
            from 0; or, without an attention_mask, positions that end in a 0, which may be a sequence or padding.
    """
    if (position_ids is None) == (cu_seqlens is None):
        raise ValueError("give either position_ids or cu_seqlens, and not both")
    total = _tokens(attention_mask)
    if position_ids is not None:
        bounds = _bounds(position_ids.reshape(-1)[:total], padding=attention_mask is None)
    else:
        bounds = cu_seqlens.tolist()  # type: ignore[union-attr]
    lengths = [end - start for start, end in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or min(lengths) < 0:
        raise ValueError(
            f"no sequence starts at the first token, or one ends before it starts: bounds {bounds[:4]}..."
        )
    tokens = bounds[-1] if attention_mask is None else attention_mask.numel()
    values = packed[0] if packed.shape[:2] == (1, tokens) else packed
    if len(values) != tokens or total not in (None, bounds[-1]):
        raise ValueError(
            f"packed has shape {list(packed.shape)} and the sequences have {bounds[-1]} tokens in total"
            + ("" if total is None else f", {total} by attention_mask")
        )
    return pad_sequence(list(values[: bounds[-1]].split(lengths)), batch_first=True, padding_value=fill)


def _tokens(attention_mask: Tensor | None) -> int | None:
    """The number of tokens in front of the padding."""
    if attention_mask is None:
        return None
    flat = attention_mask.reshape(-1) != 0
    total = int(flat.sum())
    if not flat[:total].all():
        raise ValueError("attention_mask has tokens behind padding: packed sequences are padded behind the last one")
    return total


def _bounds(positions: Tensor, padding: bool) -> list[int]:
    """Where sequences start, and the end; `padding`: zeros at the end may be some."""
    starts = (positions == 0).nonzero()[:, 0]
    bounds = [*starts.tolist(), len(positions)]
    counted = torch.arange(len(positions), device=positions.device)
    if len(starts):
        counted = counted - starts.repeat_interleave(torch.tensor(bounds, device=positions.device).diff())
    if not torch.equal(counted.to(positions.dtype), positions):
        at = int((counted != positions).nonzero()[0])
        raise ValueError(
            f"position_ids[{at}] is {int(positions[at])}: every sequence must count its tokens from 0; for padding "
            "behind the last one pass attention_mask"
        )
    if padding and len(positions) > 1 and positions[-1] == 0:
        raise ValueError(
            "position_ids end in a 0, which may be a sequence of one token or padding: pass attention_mask or "
            "cu_seqlens"
        )
    return bounds

"""Padding-free batches: sequences one behind the other in a row, as rows of their own for losses over answers."""

from itertools import pairwise

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def unpack(
    packed: Tensor, *, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, fill: float = 0
) -> Tensor:
    """`[1, N, ...]` or `[N, ...]`, R sequences one behind the other, as `[R, T, ...]`, padded on the right.

    Differentiable. For hidden states it costs a copy: what is padded here has no label, and the primitives drop
    tokens without a label before their first product. Pack the chosen answers first and the rejected ones second, in
    the same order, and the result is what `linear_dadpo_loss` takes.

    Args:
        packed: per-token values: hidden states, aligned labels, log-probabilities.
        position_ids: `[1, N]` or `[N]`, starting anew at 0 with every sequence.
        cu_seqlens: `[R + 1]`, where sequences start and the last one ends, as FlashAttention takes them. Either this
            or position_ids.
        fill: what to pad with; -100 for labels.

    Raises:
        ValueError: neither or both of the descriptions, or one that does not fit `packed`.
    """
    if (position_ids is None) == (cu_seqlens is None):
        raise ValueError("give either position_ids or cu_seqlens, and not both")
    if position_ids is not None:
        flat = position_ids.reshape(-1)
        starts = (flat == 0).nonzero()[:, 0].tolist()
        bounds = [*starts, len(flat)]
    else:
        bounds = cu_seqlens.tolist()  # type: ignore[union-attr]
    lengths = [end - start for start, end in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or min(lengths) < 0:
        raise ValueError(
            f"no sequence starts at the first token, or one ends before it starts: bounds {bounds[:4]}..."
        )
    values = packed[0] if packed.shape[:2] == (1, bounds[-1]) else packed
    if len(values) != bounds[-1]:
        raise ValueError(f"packed has shape {list(packed.shape)} and the sequences have {bounds[-1]} tokens in total")
    return pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=fill)

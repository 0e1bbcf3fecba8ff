"""The dense oracle: full logits, ordinary autograd, any floating dtype up to float64.

Every other backend is tested against this file in float64, and `backend="reference"` runs it.
"""

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..head import Head


def dense_logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits `[N, V]` in float32 at least: operands are widened before the product, so nothing is rounded twice."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head = head.map(lambda tensor: tensor.to(wide))
    return head.transform(hidden.to(wide) @ head.weight.T, head.bias)


@without_autocast
def selected_logps(
    hidden: Tensor, head: Head, labels: Tensor, topk_ids: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense `(label [N], topk [N, K], tail [N])`, differentiable any number of times.

    Its backward is autograd's own: called inside `torch.autocast` it is rounded, as that of any product is.
    """
    rows = (labels != ignore_index).nonzero()[:, 0]
    y = labels[rows].long()
    ids = y.new_zeros(len(rows), 0) if topk_ids is None else topk_ids[rows].long()
    logps = dense_logits(hidden[rows], head).log_softmax(-1)
    outside = torch.ones_like(logps, dtype=torch.bool).scatter_(1, ids, False)
    tail = logps.where(outside, -torch.inf).logsumexp(-1) if ids.shape[1] else logps.sum(-1) * 0
    values = logps.gather(1, y[:, None])[:, 0], logps.gather(1, ids), tail
    return tuple(v.new_zeros(len(labels), *v.shape[1:]).index_copy(0, rows, v) for v in values)  # type: ignore[return-value]


def topk_logps(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense `(ids [N, k] int64, logps [N, k], tail [N])` of `logits [N, V]`; ties go to the lowest id."""
    logps = logits.log_softmax(-1)
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids, logps.gather(1, ids), logps.scatter(1, ids, -torch.inf).logsumexp(-1)

"""What a batch of preference pairs knows of its teacher: the one type between the cache and the loss."""

from typing import NamedTuple

from torch import Tensor


class TeacherTargets(NamedTuple):
    """The teacher's log-probabilities at every answer token of a batch of pairs, chosen rows first, rejected second.

    All are in nats, under the teacher's softmax over its *whole* vocabulary (never renormalised on the top-k), so
    that `exp(topk_logps).sum(-1) + exp(topk_tail) == 1` up to rounding. The realised token is stored beside the
    top-k because the student's own answers often hold tokens that are outside it.

    Positions without a label hold zeros and are never read. Within a row of `topk_ids` no id occurs twice.

    Attributes:
        label_logps: `[2B, T]` float32, log-probability of the realised token `labels[t]`.
        topk_ids: `[2B, T, K]` int32 or int64, the ids of the K most probable tokens.
        topk_logps: `[2B, T, K]` float32, their log-probabilities.
        topk_tail: `[2B, T]` float32, log of the mass outside `topk_ids` (`-inf` if there is none).
    """

    label_logps: Tensor
    topk_ids: Tensor
    topk_logps: Tensor
    topk_tail: Tensor

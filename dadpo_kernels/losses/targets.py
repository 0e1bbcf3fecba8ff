"""What a batch of preference pairs knows of its teacher: the one type between the cache and the loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import is_logp, require


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

    def answer_logps(self, valid: Tensor) -> Tensor:
        """`[2B]`: the teacher's log-probability of each answer, the sum of `label_logps` where `valid [2B, T]`.

        Raises ValueError if one of them is NaN, positive or infinite, or if the shape is not that of `valid`.
        """
        _check_shape("label_logps", self.label_logps, valid.shape)
        require(
            is_logp(self.label_logps) & (self.label_logps > -torch.inf) | ~valid,
            self.label_logps,
            "teacher.label_logps",
            "a finite log-probability is needed wherever there is a label",
        )
        wide = torch.promote_types(self.label_logps.dtype, torch.float32)
        return self.label_logps.masked_fill(~valid, 0).sum(-1, dtype=wide)

    def checked_topk(self, valid: Tensor, vocabulary: int) -> "TeacherTargets":
        """Itself, or ValueError if `topk_ids`, `topk_logps` and `topk_tail` cannot be compared with a student's.

        Their shapes must go with that of `valid [2B, T]`, and where it is true log-probabilities must be neither NaN
        nor positive and ids below `vocabulary`, the rows of the student's head.
        """
        masked = ~valid[..., None]
        _check_shape("topk_tail", self.topk_tail, valid.shape)
        _check_shape("topk_logps", self.topk_logps, (*valid.shape, self.topk_logps.shape[-1]))
        _check_shape("topk_ids", self.topk_ids, self.topk_logps.shape)
        remedy = "a log-probability is needed wherever there is a label"
        require(is_logp(self.topk_logps) | masked, self.topk_logps, "teacher.topk_logps", remedy)
        require(is_logp(self.topk_tail) | ~valid, self.topk_tail, "teacher.topk_tail", remedy)
        require(
            (self.topk_ids >= 0) & (self.topk_ids < vocabulary) | masked,
            self.topk_ids,
            "teacher.topk_ids",
            f"the student's head has {vocabulary} rows and every id must be one of them: resize the student's "
            "embeddings to the teacher's vocabulary, or capture from a teacher of its family",
        )
        return self


def _check_shape(name: str, given: Tensor, needed: tuple[int, ...]) -> None:
    if given.shape != needed:
        raise ValueError(
            f"teacher.{name} has shape {list(given.shape)}, {list(needed)} is needed: the rows and positions of labels"
        )

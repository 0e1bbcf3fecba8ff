"""The teacher's log-probabilities of a batch of pairs: the one type between the cache and the losses."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import is_logp, require


class TeacherTargets(NamedTuple):
    """The teacher's log-probabilities at every answer token of a batch of pairs, chosen rows first, rejected second.

    All are in nats, under the teacher's softmax over its *whole* vocabulary (never renormalised on the top-k), so
    that `exp(topk_logps).sum(-1) + exp(topk_tail) == 1` up to rounding. The realised token's is stored in addition to
    the top-k, because the student's own answers often hold tokens that are outside it.

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

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Names of the fields in a batch: `teacher_label_logps`, `teacher_topk_ids`, ..."""
        return tuple(f"teacher_{name}" for name in cls._fields)

    @classmethod
    def from_batch(cls, batch: Mapping[str, Tensor]) -> "TeacherTargets":
        """The targets in a batch of `PairCollator`, its `teacher_*` columns.

        Raises:
            ValueError: some of them are missing; the message names them.
        """
        if missing := [column for column in cls.columns() if column not in batch]:
            raise ValueError(
                f"the options need a teacher, and the batch does not have {', '.join(missing)}: train on a "
                "PairDataset, or give these columns in your data_collator, aligned with labels as PairCollator does it"
            )
        return cls(*(batch[column] for column in cls.columns()))

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

    def checked_topk(self, valid: Tensor) -> "TeacherTargets":
        """Itself, or ValueError if `topk_ids`, `topk_logps` and `topk_tail` cannot be compared with a student's.

        Their shapes must go with that of `valid [2B, T]`, and where it is true log-probabilities must be neither NaN
        nor positive. The primitive checks the ids.
        """
        _check_shape("topk_tail", self.topk_tail, valid.shape)
        _check_shape("topk_logps", self.topk_logps, (*valid.shape, self.topk_logps.shape[-1]))
        _check_shape("topk_ids", self.topk_ids, self.topk_logps.shape)
        remedy = "a log-probability is needed wherever there is a label"
        require(is_logp(self.topk_logps) | ~valid[..., None], self.topk_logps, "teacher.topk_logps", remedy)
        require(is_logp(self.topk_tail) | ~valid, self.topk_tail, "teacher.topk_tail", remedy)
        return self


def _check_shape(name: str, given: Tensor, needed: tuple[int, ...]) -> None:
    if given.shape != needed:
        raise ValueError(
            f"teacher.{name} has shape {list(given.shape)}, {list(needed)} is needed: the rows and positions of labels"
        )

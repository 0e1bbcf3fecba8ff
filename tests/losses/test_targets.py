"""From a batch's columns to targets."""

import pytest
import torch

from dadpo_kernels import TeacherTargets


def test_targets_from_a_batch_are_its_columns():
    batch = {name: torch.full((2, 3), float(i)) for i, name in enumerate(TeacherTargets.columns())}
    targets = TeacherTargets.from_batch(batch | {"labels": torch.zeros(2, 3)})
    for name in TeacherTargets._fields:
        assert getattr(targets, name) is batch[f"teacher_{name}"]
    del batch["teacher_topk_ids"]
    with pytest.raises(ValueError, match="the batch does not have teacher_topk_ids: train on a PairDataset"):
        TeacherTargets.from_batch(batch)

"""A packed batch of pairs gives the loss and gradients of the padded one."""

import pytest
import torch
import torch.nn.functional as F

from dadpo_kernels import linear_dadpo_loss
from dadpo_kernels.models.packing import unpack

LENGTHS = [5, 3, 7, 1]


@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens", "padding"])
def test_preference_loss_of_a_packed_batch(how):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 7, 8, generator=g, dtype=torch.double)
    weight = torch.randn(50, 8, generator=g, dtype=torch.double)
    labels = torch.randint(50, (4, 7), generator=g)
    labels[0, :2] = -100
    inside = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    labels[~inside] = -100
    options = {"ref_logps": torch.tensor([-9.0, -8.0, -30.0, -4.0]), "beta_ref": 0.1, "beta_teacher": 0.0}
    results = []
    for pack in (False, True):
        h, w, y = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), labels
        rows = h
        if pack:
            positions, bounds = torch.arange(7).expand(4, -1)[inside], torch.tensor([0, *LENGTHS])
            mask, padding = torch.ones(16), 4 if how == "padding" else 0
            where = {
                "position_ids": {"position_ids": positions[None], "attention_mask": mask[None]},
                "cu_seqlens": {"cu_seqlens": bounds.int().cumsum(0)},
                "padding": {"position_ids": F.pad(positions, (0, 4)), "attention_mask": F.pad(mask, (0, 4))},
            }
            rows = unpack(F.pad(h[inside], (0, 0, 0, padding))[None], **where[how])
            y = unpack(F.pad(labels[inside], (0, padding)), **where[how], fill=-100)
            assert torch.equal(y, labels)
        out = linear_dadpo_loss(rows, w, y, **options)
        out.loss.backward()
        results.append((out.loss, h.grad, w.grad))
    assert results[0][2].abs().max() > 1e-3
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(padded, packed)


def test_descriptions_that_do_not_fit_are_refused():
    values = torch.zeros(5, 2)
    for options, message in [
        ({}, "give either"),
        ({"position_ids": torch.arange(5), "cu_seqlens": torch.tensor([0, 5])}, "not both"),
        ({"position_ids": torch.arange(4)}, "4 tokens in total"),
        ({"position_ids": torch.arange(1, 6)}, r"position_ids\[0\] is 1: every sequence must count"),
        ({"position_ids": torch.tensor([0, 1, 1, 1, 1])}, r"position_ids\[2\] is 1"),
        ({"position_ids": torch.tensor([0, 1, 2, 3, 0])}, "may be a sequence of one token or padding"),
        ({"position_ids": torch.tensor([0, 1, 2, 0, 0])}, "pass attention_mask or cu_seqlens"),
        ({"position_ids": torch.arange(5), "attention_mask": torch.tensor([1, 1, 0, 1, 0])}, "behind padding"),
        ({"cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.tensor([1, 1, 1, 0, 0])}, "3 by attention_mask"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "4 tokens in total"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "ends before it starts"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "starts at the first token"),
    ]:
        with pytest.raises(ValueError, match=message):
            unpack(values, **options)


def test_padding_behind_the_last_sequence_is_no_sequence():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 0]])
    mask = torch.ones(1, 16)
    mask[:, 14:] = 0
    rows = unpack(torch.arange(16), position_ids=positions, attention_mask=mask, fill=-1)
    assert rows.tolist() == [[0, 1, 2, 3, -1], [4, 5, 6, -1, -1], [7, 8, 9, 10, 11], [12, 13, -1, -1, -1]]
    assert unpack(torch.arange(2), position_ids=torch.tensor([0, 0]), attention_mask=torch.ones(2)).shape == (2, 1)
    assert unpack(torch.arange(1), position_ids=torch.tensor([0])).shape == (1, 1)

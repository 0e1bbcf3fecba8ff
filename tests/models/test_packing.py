"""A packed batch of pairs gives the loss and gradients of the padded one."""

import pytest
import torch

from dadpo_kernels import linear_dadpo_loss
from dadpo_kernels.models.packing import unpack

LENGTHS = [5, 3, 7, 1]


@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens"])
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
            where = {
                "position_ids": torch.arange(7).expand(4, -1)[inside][None],
                "cu_seqlens": torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0),
            }
            rows = unpack(h[inside][None], **{how: where[how]})
            y = unpack(labels[inside], **{how: where[how]}, fill=-100)
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
        ({"position_ids": torch.arange(1, 6)}, "starts at the first token"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "ends before it starts"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "starts at the first token"),
    ]:
        with pytest.raises(ValueError, match=message):
            unpack(values, **options)

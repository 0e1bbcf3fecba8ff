"""The primitive's sibling for the teacher: its top-k ids with log-probabilities, the tail, and the label's."""

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import reference


class TopkLogps(NamedTuple):
    ids: Tensor
    logps: Tensor
    tail: Tensor
    label: Tensor | None


@torch.no_grad()
def linear_topk_logps(
    hidden: Tensor, weight: Tensor, k: int, *, labels: Tensor | None = None, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0, ignore_index: int = -100,
    backend: str = "auto",
) -> TopkLogps:  # fmt: skip
    shape = hidden.shape[:-1]
    h = hidden.flatten(0, -2)
    ids, logps, tail, lse = reference.topk_logps(h, weight, bias, k, logit_scale, softcap, temperature)
    label = None
    if labels is not None:
        label = reference.selected_logps(
            h, weight, bias, labels.flatten(), None, logit_scale, softcap, temperature, ignore_index
        )[0]
        label = label.unflatten(0, shape)
    return TopkLogps(ids.unflatten(0, shape), logps.unflatten(0, shape), tail.unflatten(0, shape), label)

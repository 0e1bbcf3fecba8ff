"""The primitive: log-probabilities of the label, of the teacher's top-k ids and of the tail, from hidden states."""

from typing import NamedTuple

from torch import Tensor

from .backends import reference


class SelectedLogps(NamedTuple):
    label: Tensor
    topk: Tensor
    tail: Tensor


def linear_selected_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None = None, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0, ignore_index: int = -100,
    backend: str = "auto", memory_budget: int | None = None,
) -> SelectedLogps:  # fmt: skip
    shape = labels.shape
    ids = None if topk_ids is None else topk_ids.flatten(0, -2)
    out = reference.selected_logps(
        hidden.flatten(0, -2), weight, bias, labels.flatten(), ids, logit_scale, softcap, temperature, ignore_index
    )
    return SelectedLogps(*(o.float().unflatten(0, shape) for o in out))

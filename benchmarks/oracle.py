"""The float64 loss and gradients that every variant's error is measured against."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Inputs
from benchmarks.variants import dense_logps, loss_from_logps

ROWS = 128  # logits of so many tokens exist at a time: 156 MB in float64 at V=151,936


def float64_gradients(inputs: Inputs, objective: str) -> dict[str, Tensor]:
    """`loss []`, `hidden_grad [N, H]` at the N valid tokens and `weight_grad [V, H]`, computed in float64.

    The inputs are taken as they are: for bfloat16 this is the exact gradient at the rounded values. The gradients are
    returned in float32, whose rounding is below every variant's error.
    """
    valid = inputs.valid
    hidden = inputs.hidden.flatten(0, 1)[valid].double().requires_grad_()
    weight = inputs.weight.detach().double().requires_grad_()
    labels = inputs.labels.flatten()[valid]
    topk_ids = inputs.teacher.topk_ids.flatten(0, 1)[valid].long() if objective == "dpo+kl" else None
    parts = []
    for rows in torch.arange(len(labels)).split(ROWS):
        ids = None if topk_ids is None else topk_ids[rows]
        parts.append(checkpoint(dense_logps, hidden[rows], weight, labels[rows], ids, use_reentrant=False))
    loss = loss_from_logps(inputs, objective, *(torch.cat(column) for column in zip(*parts, strict=True)))
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"loss": loss.detach(), "hidden_grad": hidden.grad.float(), "weight_grad": weight.grad.float()}


def save_gradients(inputs: Inputs, objective: str, path: Path) -> None:
    save_file(float64_gradients(inputs, objective), path)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """`|value - exact| / |exact|` in the Euclidean norm, summed in float64 over slices."""
    pairs = zip(value.split(8192), exact.split(8192), strict=True)
    squares = torch.stack(
        [torch.stack([(v.double() - e).square().sum(), e.double().square().sum()]) for v, e in pairs]
    )
    difference, norm = squares.sum(0)
    return (difference / norm).sqrt().item()

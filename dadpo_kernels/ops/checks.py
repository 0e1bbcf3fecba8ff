"""Checks of values, which on a GPU must not wait for the device."""

import torch
from torch import Tensor


def require(ok: Tensor, values: Tensor, name: str, remedy: str) -> None:
    """Raise ValueError at the first position of `values` that is not `ok`; both have the same shape.

    On a GPU, and in a compiled graph, the condition is asserted on the device instead: the program stops with the
    same message, a little later, and no kernel launch waits for the answer.
    """
    if ok.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(ok.all(), f"{name}: {remedy}")
    elif not ok.all():
        first = (~ok).nonzero()[0].tolist()
        raise ValueError(f"{name}{first} is {values[tuple(first)].item()}: {remedy}")


def is_logp(values: Tensor) -> Tensor:
    """Not NaN and not positive, except for the rounding of a log-probability near 0."""
    return values <= 1e-3

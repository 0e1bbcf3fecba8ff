"""Passes choose the dtype of each product themselves, so that sums stay in float32: no autocast inside."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What `torch.autocast` casts to on this device; None where it is off, or not known, as for meta tensors."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with `torch.autocast` disabled for the device of its first tensor.

    `Head.prepare` has cast the operands by then. Inside, autocast would round the float32 products of widened tiles
    back to bfloat16, and with them every log-probability.
    """

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next(argument for argument in args if isinstance(argument, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return exact

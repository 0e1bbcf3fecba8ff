"""Backends by name, and which one a call gets.

A backend is a `Tiles` class (see `base.py`) and an `obstacle` function that tells why it cannot take a call.
`reference`, the dense oracle, is not tiled.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..live.cpu_pass import CpuLivePass
from ..live.live_pass import LivePass
from ..log import debug
from . import cpu, cuda, torch_, triton_
from .base import Tiles


class Backend(NamedTuple):
    """What the package knows of a backend."""

    tiles: type[Tiles]
    obstacle: Callable[[torch.device, torch.dtype], str | None]  # why it cannot take such tensors, or None
    devices: tuple[str, ...]  # where "auto" considers it
    live: type[LivePass] = LivePass  # its live plan


# In order of preference: as measured on an H100 (benchmarks/REPORT.md).
BACKENDS = {
    "cpu": Backend(cpu.CpuTiles, cpu.obstacle, ("cpu",), CpuLivePass),
    "triton": Backend(triton_.FusedTiles, triton_.obstacle, ("cuda",)),
    "cuda": Backend(cuda.CudaTiles, cuda.obstacle, ("cuda",)),
    "triton_rows": Backend(triton_.TritonTiles, triton_.obstacle, ("cuda",)),
    "torch": Backend(torch_.TorchTiles, torch_.obstacle, ("cpu", "cuda", "xpu", "mps")),
}


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is the name of one, "auto" or "reference"."""
    if backend not in ("auto", "reference", *BACKENDS):
        raise ValueError(f"backend={backend!r} is unknown; choose one of auto, reference, {', '.join(BACKENDS)}")


def resolve(backend: str, device: torch.device, dtype: torch.dtype, first: Sequence[str] = ()) -> str:
    """The backend that a call with tensors of this device and dtype runs on.

    Args:
        first: names that "auto" prefers to the order of `BACKENDS`.

    Raises:
        ValueError: an unknown name, or a backend that cannot run this call, with the reason.
    """
    check_name(backend)
    if device.type == "meta":
        return "torch"  # nothing runs there: the operators answer with shapes
    if backend == "reference":
        return backend
    if backend == "auto":
        for name in dict.fromkeys([*first, *BACKENDS]):
            candidate = BACKENDS[name]
            if device.type not in candidate.devices:
                continue
            reason = candidate.obstacle(device, dtype)
            if reason is None:
                return name
            debug("backend %s is passed over: %s", name, reason)
        return "torch"
    reason = BACKENDS[backend].obstacle(device, dtype)
    if reason:
        raise ValueError(f'backend="{backend}" cannot run this call: {reason}; use backend="torch" or "auto"')
    return backend

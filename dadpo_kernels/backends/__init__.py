"""Backends by name, and which one a call gets.

Each backend is a `Tiles` class (see `tiled.py`); `reference` is the dense oracle and not tiled.
"""

import torch

from . import cpu
from .tiled import Tiles
from .torch_ import TorchTiles

NAMES = ("auto", "reference", "torch", "cpu")


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that a call with tensors of this device and dtype runs on.

    Raises:
        ValueError: an unknown name, or a backend that cannot run this call, with the reason.
    """
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(NAMES)}")
    reason = cpu_obstacle(device, dtype)
    if backend == "auto":
        return "torch" if reason else "cpu"
    if backend == "cpu" and reason:
        raise ValueError(f'backend="cpu" cannot run this call: {reason}; use backend="torch" or "auto"')
    return backend


def cpu_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ CPU kernels cannot take tensors of this device and dtype, or None if they can."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in cpu.DTYPES:
        return f"it takes {' and '.join(str(d) for d in cpu.DTYPES)}, not {dtype}"
    return cpu.unavailable()


def tiles_class(name: str) -> type[Tiles]:
    return {"torch": TorchTiles, "cpu": cpu.CpuTiles}[name]

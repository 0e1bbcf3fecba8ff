"""Backends by name, and which one a call gets.

Each backend is a module with a `TILES` class (see `tiled.py`) and an `obstacle` function that tells why it cannot take
a call. Modules are imported when they are first asked for. `reference`, the dense oracle, is not tiled.
"""

import importlib
from types import ModuleType

import torch

from .tiled import Tiles

# Name: (module, devices that "auto" considers it for), in order of preference.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("cpu", ("cpu",)),
    "torch": ("torch_", ("cpu", "cuda", "xpu", "mps")),
}


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f".{BACKENDS[name][0]}", __name__)


@torch.compiler.assume_constant_result  # a compiler cannot trace an import
def tiles_class(name: str) -> type[Tiles]:
    return module_of(name).TILES


def obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot take tensors of this device and dtype, or None if it can."""
    return module_of(name).obstacle(device, dtype)


@torch.compiler.assume_constant_result
def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that a call with tensors of this device and dtype runs on.

    Raises:
        ValueError: an unknown name, or a backend that cannot run this call, with the reason.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        candidates = (name for name, (_, devices) in BACKENDS.items() if device.type in devices)
        return next((name for name in candidates if obstacle(name, device, dtype) is None), "torch")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of auto, reference, {', '.join(BACKENDS)}")
    reason = obstacle(backend, device, dtype)
    if reason:
        raise ValueError(f'backend="{backend}" cannot run this call: {reason}; use backend="torch" or "auto"')
    return backend

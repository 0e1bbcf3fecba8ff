"""Triton's kernels compiled by the very launches that the package makes, and not run.

A driver that only names a target stands in for CUDA's, so no GPU is needed, and the tensors may be on the device
"meta", which has shapes and no memory: every launch is compiled with exactly the types, alignments and options that
it would have on the device. What is compiled lands in Triton's cache on disk, where the real launch finds it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dadpo_kernels.ops.backends.base import Best, Coefficients, Entries, Grads, Retained, State
from dadpo_kernels.ops.backends.gpu_base import RowTiles
from dadpo_kernels.ops.head import Head


class OfflineDriver:
    """Stands in for Triton's CUDA driver: it names a target and has no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[dict]:
    """Launches inside compile for that target and run nothing: `{kernel's hash: (name, CompiledKernel)}`."""
    compiled: dict = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        compiled.setdefault(kernel.hash, (name, kernel))

    offline = mock.patch.object(driver, "_active", OfflineDriver(capability))
    with mock.patch.object(JITFunction, "run", compile_only), offline:
        yield compiled


def problem(
    kind: type[RowTiles],
    dtype: torch.dtype,
    *,
    rows: int,
    columns: int,
    width: int,
    top_k: int,
    bias: bool = False,
    softcap: bool = False,
    device: str = "cpu",
) -> RowTiles:
    """One tile: `hidden [rows, width]`, `weight [columns, width]`, and `top_k` ids with the label among them."""
    weight = torch.zeros(columns, width, dtype=dtype, device=device)
    head = Head(weight, weight[:, 0].contiguous() if bias else None, 1.0, 30.0 if softcap else None, 1.0)
    ids = torch.arange(top_k, device=device).expand(rows, top_k)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    hidden = torch.zeros(rows, width, dtype=dtype, device=device)
    return kind(hidden, head, Entries.merge(labels, ids if top_k else None))


def passes(tiles: RowTiles, top_k: int) -> None:
    """Every pass of a backend over one tile: forward, retaining or not, both gradients, and the best `top_k`."""
    rows, entries = tiles.entries.ids.shape
    columns = len(tiles.head.weight)
    hidden, state = tiles.hidden, State.new(rows, entries, tiles.hidden)
    wide = {"dtype": torch.float32}
    retained = Retained(tiles.padded(columns, hidden.dtype), hidden.new_zeros(rows, **wide))
    coefficients = Coefficients(state.max, state.max, state.selected)
    grads = Grads(
        hidden.new_zeros(hidden.shape, **wide), torch.zeros_like(tiles.head.weight), hidden.new_zeros(columns, **wide)
    )
    for stored in (None, retained):
        tiles.forward(0, columns, state, stored)
        tiles.backward(0, columns, coefficients, grads, stored)
    if top_k:
        slots = hidden.new_zeros(rows, 2 * top_k + 1, **wide)
        tiles.topk(0, columns, state, Best(slots, slots.to(torch.int32), slots[:, 0].to(torch.int32), top_k))

"""The C++ kernels of `csrc/cpu`: float32 and bfloat16, each tile's product and row pass fused, on every core.

The extension sees addresses only; shapes, dtypes and layouts are made right here. See `csrc/cpu/passes.h`.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from ..head import Head
from .base import Best, Coefficients, Entries, Grads, Retained, State, Tiles

_cpu: Any
try:
    _cpu = importlib.import_module("dadpo_kernels._cpu")
except ImportError:
    _cpu = None

WORKSPACE = 24 * 2**20  # bytes of one tile of the gradient of the logits
DTYPES = (torch.float32, torch.bfloat16)
MAX_K = 2048  # bound of the candidate buffer in csrc/cpu/rows.h


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take tensors of this device and dtype, or None if it can."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in DTYPES:
        return f"it takes {' and '.join(str(d) for d in DTYPES)}, not {dtype}"
    return None if _cpu else "the extension dadpo_kernels._cpu is not built (it needs a C++ compiler at install time)"


def prepare(tensor: Tensor) -> Tensor:
    """Advise huge pages for a freshly allocated buffer, and return it."""
    _cpu.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Workspace:
    """Memory that a kernel uses during a call, retained from call to call."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def at_least(self, size: int) -> int:
        """A 64-byte aligned address with `size` bytes behind it."""
        if self.buffer is None or self.buffer.numel() < size + 64:
            self.buffer = None
            self.buffer = prepare(torch.empty(size + 64, dtype=torch.uint8))
        return -(-address(self.buffer) // 64) * 64


def operand(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products read matrices of `dtype`: bfloat16 only where the processor multiplies it."""
    return dtype if _cpu.multiplies_bf16() else torch.float32


def describe_tile(
    hidden: Tensor,
    head: Head,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    columns: int,
    ids: Tensor,
    in_topk: Tensor,
):
    """What the extension knows of a tile: addresses, sizes, strides in elements, and the head's scalars.

    Args:
        hidden: `[n, H]`, unit stride in its last dimension.
        weight, bias: the rows of the head from column `first` on, `[>= columns, H]` and float32 `[>= columns]`.
        ids, in_topk: the entries, `[n, M]` int32 and bool, contiguous.
    """
    scale, softcap, inv_temperature = head.scalars
    return _cpu.Tile(
        hidden=address(hidden),
        rows=hidden.shape[0],
        width=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        weight=address(weight),
        weight_stride=weight.stride(0),
        bias=address(bias),
        first=first,
        columns=columns,
        ids=address(ids),
        in_topk=address(in_topk),
        entries=ids.shape[1],
        scale=scale,
        softcap=softcap,
        inv_temperature=inv_temperature,
        bf16=hidden.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )


class CpuTiles(Tiles):
    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        super().__init__(hidden, head, entries)
        self.weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        self.in_topk = entries.in_topk.contiguous()
        self.workspace = Workspace()
        self.packed_hidden: Tensor | None = None

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return prepare(torch.empty(shape, dtype=dtype, device=device))

    @staticmethod
    def tile_columns(rows: int, width: int, dtype: torch.dtype) -> int:
        group = _cpu.GROUP
        return max(1, min(4096, WORKSPACE // (operand(dtype).itemsize * max(1, rows))) // group) * group

    @staticmethod
    def retained_shape(rows: int, columns: int) -> tuple[int, int]:
        groups = -(-columns // _cpu.GROUP)
        return groups * _cpu.GROUP, groups

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype, grad_weight: bool) -> int:
        tile = _cpu.Tile(
            hidden=0, rows=rows, width=width, hidden_stride=width, weight=0, weight_stride=width, bias=0, first=0,
            columns=columns, ids=0, in_topk=0, entries=1, scale=1.0, softcap=0.0, inv_temperature=1.0,
            bf16=dtype == torch.bfloat16, threads=torch.get_num_threads(),
        )  # fmt: skip
        packed_hidden = rows * width * operand(dtype).itemsize if grad_weight else 0
        return _cpu.workspace_bytes(tile, True, True, grad_weight) + packed_hidden

    def tile(self, first: int, columns: int):
        bias = None if self.bias is None else self.bias[first:]
        return describe_tile(
            self.hidden, self.head, self.weight[first:], bias, first, columns, self.entries.ids, self.in_topk
        )

    def space(self, tile, logits: bool, grad_hidden: bool, keep_dz: bool) -> int:
        return self.workspace.at_least(_cpu.workspace_bytes(tile, logits, grad_hidden, keep_dz))

    def forward(self, first: int, columns: int, state: State, retained: Retained | None) -> None:
        tile = self.tile(first, columns)
        exps, bases = (address(retained.exps), address(retained.bases)) if retained else (0, 0)
        _cpu.forward(
            tile, address(state.max), address(state.sum), address(state.selected), exps, bases,
            self.space(tile, True, False, False),
        )  # fmt: skip

    def grad_hidden_columns(self) -> int:
        """Columns of the accumulator: whole panels."""
        return -(-self.hidden.shape[1] // _cpu.panel()) * _cpu.panel()

    def backward(
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: Retained | None
    ) -> None:
        tile = self.tile(first, columns)
        if grads.weight is not None and self.packed_hidden is None:
            rows = len(self.hidden) + len(self.hidden) % 2  # bfloat16 operands come in pairs
            dtype = operand(self.hidden.dtype)
            self.packed_hidden = prepare(torch.empty(self.grad_hidden_columns() * rows, dtype=dtype))
            _cpu.pack_hidden(tile, address(self.packed_hidden))
        exps, bases = (address(retained.exps), address(retained.bases)) if retained else (0, 0)
        weight = None if grads.weight is None else grads.weight[first:]
        bias = None if grads.bias is None else grads.bias[first:]
        _cpu.backward(
            tile, address(coefficients.c), address(coefficients.base), address(coefficients.values),
            address(grads.hidden), address(weight), 0 if weight is None else weight.stride(0), address(bias),
            exps, bases, address(self.packed_hidden),
            self.space(tile, retained is None, grads.hidden is not None, weight is not None or bias is not None),
        )  # fmt: skip

    def topk(self, first: int, columns: int, state: State, best: Best) -> None:
        tile = self.tile(first, columns)
        _cpu.topk(
            tile, address(state.max), address(state.sum), address(state.selected), address(best.values),
            address(best.ids), address(best.counts), best.k, best.values.shape[1],
            self.space(tile, True, False, False),
        )  # fmt: skip

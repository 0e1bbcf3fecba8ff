"""Tiles as one product in memory and a few kernels over its rows: what the GPU backends have in common.

cuBLAS writes a tile of products in float32, a kernel reads it once per pass, and the gradient's products are cuBLAS's
again. Subclasses supply the kernels.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..head import Head
from .base import Coefficients, Entries, Grads, RetainedTile, Tiles
from .torch_ import wide_mm

WORKSPACE = 128 * 2**20  # bytes of a tile of products in float32 and of its gradient in the operands' dtype
STRIP = 32 * 2**20  # bytes of a weight gradient in float32, less than a large GPU's L2 cache
COLUMNS = 8  # rows of a tile start at multiples of this many columns, for 16-byte accesses
BASES = 4  # floats a row: so that the exponentials behind the bases start at a multiple of 16 bytes


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a @ b`, float32 from operands of any dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def rounded_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, summed in float32 and rounded once.

    Left to itself, cuBLAS may split a sum and round its parts (PyTorch allows it by default: see its switch
    `allow_bf16_reduced_precision_reduction`). A strip of the product in float32 stays in cache until it is rounded.
    """
    if out.dtype == torch.float32:
        torch.mm(a, b, out=out)
        return
    rows = max(256, STRIP // (4 * out.shape[1]) // 256 * 256)
    for strip in (slice(first, first + rows) for first in range(0, len(out), rows)):
        out[strip] = wide_mm(a[strip], b)


def whole(columns: int) -> int:
    """`columns`, rounded up to what rows are padded to."""
    return -(-columns // COLUMNS) * COLUMNS


def strip_bytes(columns: int, width: int, dtype: torch.dtype) -> int:
    """What `rounded_mm` takes for a weight gradient `[columns, width]`."""
    return min(columns * width * 4, max(STRIP, 256 * width * 4)) if dtype != torch.float32 else 0


class RowTiles(Tiles):
    max_columns = 16384

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        super().__init__(hidden, head, entries)
        self.rows = hidden.shape[0]
        self.weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()

    @classmethod
    def tile_columns(cls, rows: int, width: int, dtype: torch.dtype) -> int:
        fitting = WORKSPACE // ((4 + dtype.itemsize) * max(1, rows)) // 256 * 256
        return max(256, min(cls.max_columns, fitting))

    @staticmethod
    def retained_shape(rows: int, columns: int) -> tuple[int, int]:
        return whole(columns), BASES

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype, grad_weight: bool) -> int:
        # The tile of products and that of its gradient, or a product that is scaled before it joins hidden's gradient;
        # beside either a strip of the weight's gradient.
        strip = strip_bytes(columns, width, dtype) if grad_weight else 0
        return rows * max(whole(columns) * (4 + dtype.itemsize), width * 4) + strip

    def padded(self, columns: int, dtype: torch.dtype) -> Tensor:
        """An empty `[n, columns]`."""
        return torch.empty(self.rows, whole(columns), dtype=dtype, device=self.hidden.device)[:, :columns]

    def products(self, first: int, columns: int) -> Tensor:
        """`hidden @ weight[first : first + columns].T`, `[n, columns]` in float32."""
        out, weight = self.padded(columns, torch.float32), self.weight[first : first + columns].T
        if self.hidden.is_cuda and self.hidden.dtype != out.dtype:
            return torch.mm(self.hidden, weight, out_dtype=out.dtype, out=out)
        return torch.mm(self.hidden.float(), weight.float(), out=out)

    @abstractmethod
    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        """`c exp(z - base)` times the softcap's slope, `values` at the entries: `[n, columns]` in hidden's dtype."""

    @abstractmethod
    def enter_values(
        self, first: int, columns: int, coefficients: Coefficients, retained: RetainedTile
    ) -> AbstractContextManager[Tensor]:
        """While it lasts, `factors[:, None] * retained.exps` is that gradient; gives the `factors [n]`."""

    @abstractmethod
    def column_sums(self, matrix: Tensor, factors: Tensor | None, out: Tensor) -> None:
        """`out[j] = sum_n factors[n] matrix[n, j]` in float32; `factors` None: all 1."""

    def backward(
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: RetainedTile | None
    ) -> None:
        if retained is None:
            self.add_products(first, columns, self.logit_gradient(first, columns, coefficients), grads)
        else:
            self.retained_gradient(first, columns, coefficients, grads, retained)

    def add_products(self, first: int, columns: int, dz: Tensor, grads: Grads) -> None:
        """The tile's share of all gradients, from the gradient of its logits."""
        if grads.hidden is not None:
            accumulate(grads.hidden, dz, self.weight[first : first + columns])
        self.head_gradient(first, columns, dz, self.hidden, None, grads)

    def retained_gradient(
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: RetainedTile
    ) -> None:
        """The same from retained exponentials: both products read them as they lie, with no pass over the tile."""
        with self.enter_values(first, columns, coefficients, retained) as factors:
            exps = retained.exps[:, :columns]
            if grads.hidden is not None:
                product = wide_mm(exps, self.weight[first : first + columns])
                grads.hidden.addcmul_(product, factors[:, None])
            scaled = self.hidden
            if grads.weight is not None:
                scaled = (self.hidden * factors[:, None]).to(self.hidden.dtype)
            self.head_gradient(first, columns, exps, scaled, factors, grads)

    def head_gradient(
        self, first: int, columns: int, matrix: Tensor, hidden: Tensor, factors: Tensor | None, grads: Grads
    ) -> None:
        """The tile's rows of the gradients of weight and bias from `matrix [n, columns]`."""
        if grads.weight is not None:
            rounded_mm(matrix.T, hidden, grads.weight[first : first + columns])
        if grads.bias is not None:
            self.column_sums(matrix, factors, grads.bias[first : first + columns])

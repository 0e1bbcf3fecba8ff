"""Tiles as one product in memory and a few kernels over its rows: what the GPU backends have in common.

cuBLAS writes a tile of products in float32, a kernel reads it once per pass, and the gradient's products are cuBLAS's
again. Subclasses supply the kernels.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .tiled import Coefficients, Entries, Grads, Head, Kept, Tiles
from .torch_ import wide_mm

WORKSPACE = 192 * 2**20  # bytes of a tile of products in float32 and of its gradient in the operands' dtype
COLUMNS = 8  # rows of a tile start at multiples of this many columns, for 16-byte accesses
BASES = 4  # floats a row: so that the exponentials behind the bases start at a multiple of 16 bytes


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a @ b`, float32 from operands of any dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def whole(columns: int) -> int:
    """`columns`, rounded up to what rows are padded to."""
    return -(-columns // COLUMNS) * COLUMNS


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
    def kept_shape(rows: int, columns: int) -> tuple[int, int]:
        return whole(columns), BASES

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
        # The tile of products and that of its gradient; a product that is scaled before it joins hidden's gradient.
        return rows * (whole(columns) * (4 + dtype.itemsize) + width * 4)

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
    def kept_logit_gradient(self, first: int, columns: int, coefficients: Coefficients, kept: Kept) -> Tensor:
        """The same from retained exponentials."""

    @abstractmethod
    def enter_values(
        self, first: int, columns: int, coefficients: Coefficients, kept: Kept
    ) -> AbstractContextManager[Tensor]:
        """While it lasts, `factors[:, None] * kept.exps` is that gradient; gives the `factors [n]`."""

    @abstractmethod
    def column_sums(self, matrix: Tensor, factors: Tensor | None, out: Tensor) -> None:
        """`out[j] = sum_n factors[n] matrix[n, j]` in float32; `factors` None: all 1."""

    def gradient(self, first: int, columns: int, coefficients: Coefficients, grads: Grads, kept: Kept | None) -> None:
        if kept is not None and self.hidden.dtype != torch.float16:
            # Both products read the exponentials as they lie: no pass over the tile. Not in float16: see csrc/cuda.
            with self.enter_values(first, columns, coefficients, kept) as factors:
                exps = kept.exps[:, :columns]
                if grads.hidden is not None:
                    product = wide_mm(exps, self.weight[first : first + columns])
                    grads.hidden.addcmul_(product, factors[:, None])
                scaled = self.hidden
                if grads.weight is not None:
                    scaled = (self.hidden * factors[:, None]).to(self.hidden.dtype)
                self.head_gradient(first, columns, exps, scaled, factors, grads)
            return
        if kept is not None:
            dz = self.kept_logit_gradient(first, columns, coefficients, kept)
        else:
            dz = self.logit_gradient(first, columns, coefficients)
        if grads.hidden is not None:
            accumulate(grads.hidden, dz, self.weight[first : first + columns])
        self.head_gradient(first, columns, dz, self.hidden, None, grads)

    def head_gradient(
        self, first: int, columns: int, matrix: Tensor, hidden: Tensor, factors: Tensor | None, grads: Grads
    ) -> None:
        """The tile's rows of the gradients of weight and bias from `matrix [n, columns]`."""
        if grads.weight is not None:
            torch.mm(matrix.T, hidden, out=grads.weight[first : first + columns])
        if grads.bias is not None:
            self.column_sums(matrix, factors, grads.bias[first : first + columns])

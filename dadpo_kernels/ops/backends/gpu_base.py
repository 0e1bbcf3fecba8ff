"""Tiles as one product in memory and a kernel over its rows: what the GPU backends have in common.

cuBLAS writes a tile of products in float32, a kernel reads it once per pass, and the gradient's products are cuBLAS's
again. What is retained is one matrix with one base per row: its share of the gradients is one product each, which read
it as it lies. Subclasses supply the kernels.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..head import Head
from ..plan import Plan
from .base import Coefficients, Entries, Grads, Retained, Tiles, accumulator_dtype

WORKSPACE = 128 * 2**20  # bytes of a tile of products in float32 and of its gradient in the operands' dtype
COLUMNS = 8  # rows of a tile start at multiples of this many columns, for 16-byte accesses
STEP = 256  # columns: a block of every kernel divides it
REACH = 30.0  # nats that the tail of a row may rise above its base: e^30 < 2^44
FLOOR = 2.0**-40  # of a row's largest gradient: what `entered` may add to others


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`, summed in float32 and rounded once.

    On a GPU, a float32 result of narrower operands is cuBLAS's, by `out_dtype`: in PyTorch since 2.11, also for
    `addmm`. Elsewhere, where only tests come, the operands are widened.
    """
    if not a.is_cuda:
        a, b = a.float(), b.float()
        if out.dtype != torch.float32:
            product = a @ b
            out.copy_(out + product if add else product)
            return
    wider: Any = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    with unsplit_sums(out.dtype):
        if add:
            torch.addmm(out, a, b, out=out, **wider)
        else:
            torch.mm(a, b, out=out, **wider)


@contextmanager
def unsplit_sums(dtype: torch.dtype) -> Iterator[None]:
    """cuBLAS does not split a long sum and round its parts, which PyTorch allows it by default.

    The switch is the process's: a thread that uses another device meanwhile may find it either way.
    """
    matmul, kinds = torch.backends.cuda.matmul, {torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = f"allow_{kinds[dtype]}_reduced_precision_reduction" if dtype in kinds else None
    if name is None or not getattr(matmul, name):
        yield
        return
    setattr(matmul, name, False)
    try:
        yield
    finally:
        setattr(matmul, name, True)


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
        fitting = WORKSPACE // ((4 + dtype.itemsize) * max(1, rows)) // STEP * STEP
        return max(STEP, min(cls.max_columns, fitting))

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype, grad_weight: bool) -> int:
        # The tile of products and that of its gradient, or hidden times the factors of what is retained.
        return rows * max(whole(columns) * (4 + dtype.itemsize), width * dtype.itemsize if grad_weight else 0)

    @staticmethod
    def retained_step(tile: int, dtype: torch.dtype) -> int:
        return STEP

    @classmethod
    def retained_bytes(cls, rows: int, columns: int, tile: int, dtype: torch.dtype) -> int:
        return rows * whole(columns) * dtype.itemsize + rows * accumulator_dtype(dtype).itemsize

    def retained(self, plan: Plan, first: int, columns: int, buffer: Tensor) -> Retained | None:
        if first >= plan.retained:
            return None
        dtype, padded = self.hidden.dtype, whole(plan.retained)
        size = plan.rows * padded * dtype.itemsize
        exps = buffer[:size].view(dtype).view(plan.rows, padded)[:, : plan.retained]
        return Retained(exps, buffer[size : size + plan.rows * 4].view(torch.float32))

    def backward_parts(self, plan: Plan) -> Iterator[tuple[int, int]]:
        return plan.parts(plan.vocab, plan.tile)

    def padded(self, columns: int, dtype: torch.dtype) -> Tensor:
        """An empty `[n, columns]`."""
        return torch.empty(self.rows, whole(columns), dtype=dtype, device=self.hidden.device)[:, :columns]

    def products(self, first: int, columns: int) -> Tensor:
        """`hidden @ weight[first : first + columns].T`, `[n, columns]` in float32."""
        out = self.padded(columns, torch.float32)
        multiply(self.hidden, self.weight[first : first + columns].T, out)
        return out

    @abstractmethod
    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        """`c exp(z - base)` times the softcap's slope, `values` at the entries: `[n, columns]` in hidden's dtype."""

    @abstractmethod
    def exchange(self, matrix: Tensor, values: Tensor) -> None:
        """Swaps `matrix [n, columns]` at the entries below `columns` with `values [n, M]`; of equal ids, the first."""

    @abstractmethod
    def column_sums(self, matrix: Tensor, factors: Tensor | None, out: Tensor) -> None:
        """`out[j] = sum_n factors[n] matrix[n, j]` in float32; `factors` None: all 1."""

    def backward(
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: Retained | None
    ) -> None:
        if retained is None:
            dz = self.logit_gradient(first, columns, coefficients)
            if grads.hidden is not None:
                multiply(dz, self.weight[first : first + columns], grads.hidden, add=True)
            self.head_gradient(first, dz, self.hidden, None, grads)
            return
        with self.entered(coefficients, retained) as factors:
            if grads.hidden is not None:  # all that is retained comes first
                multiply(retained.exps, self.weight[:columns], grads.hidden)
                grads.hidden.mul_(factors[:, None])
            scaled = self.hidden
            if grads.weight is not None:
                scaled = torch.mul(self.hidden, factors[:, None], out=torch.empty_like(self.hidden))
            self.head_gradient(first, retained.exps, scaled, factors, grads)

    def head_gradient(self, first: int, matrix: Tensor, hidden: Tensor, factors: Tensor | None, grads: Grads) -> None:
        """The gradients of weight and bias at the columns of `matrix [n, columns]`."""
        part = slice(first, first + matrix.shape[1])
        if grads.weight is not None:
            multiply(matrix.T, hidden, grads.weight[part])
        if grads.bias is not None:
            self.column_sums(matrix, factors, grads.bias[part])

    @contextmanager
    def entered(self, coefficients: Coefficients, retained: Retained) -> Iterator[Tensor]:
        """While it lasts, `factors[:, None] * exps` is the gradient of the logits; gives the `factors [n]`.

        The factor is `c exp(bases - base)`, and the quotients `values / factor` take the entries' places. Where the
        factor is tiny it is raised, so that the quotients stay finite and `hidden * factor` keeps its digits. What
        this adds at other columns is at most `FLOOR` of the row's largest value: no exponential is above
        `exp(base - bases)`, and none above `exp(REACH)`.
        """
        c, values = coefficients.c, coefficients.values
        # A row without a tail in the retained columns has base 0, however low its other logits are.
        lift = (coefficients.base - retained.bases).clamp(min=-REACH).exp()
        largest = torch.linalg.vector_norm(values, math.inf, 1)
        least = largest * FLOOR / lift.clamp(1.0, math.exp(REACH))
        least = torch.maximum(least, largest.clamp(max=torch.finfo(c.dtype).tiny))  # which may have underflowed
        factors = c / lift
        factors = torch.maximum(factors.abs(), least).copysign(factors)
        # A factor of 0 is left where all values are 0 too.
        outside = (values / factors.masked_fill(factors == 0, 1)[:, None]).to(retained.exps.dtype)
        self.exchange(retained.exps, outside)
        try:
            yield factors
        finally:
            self.exchange(retained.exps, outside)  # a second backward reads the forward's exponentials

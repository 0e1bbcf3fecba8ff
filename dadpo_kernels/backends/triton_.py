"""Triton kernels around, or instead of, the matrix products: `triton_rows` and `triton`.

`RowTiles` lets cuBLAS write a tile of products in float32 and reads it once per pass. `FusedTiles` computes the
products in its own kernels, so that statistics, retained exponentials and the gradient of the logits leave the chip
and the logits do not. The gradient's products are cuBLAS's in both.
"""

import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .tiled import Best, Coefficients, Entries, Grads, Head, Kept, State, Tiles
from .torch_ import TorchTiles, finite, wide_mm

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16)
WORKSPACE = 192 * 2**20  # bytes of a tile of products in float32 and of its gradient in the operands' dtype
MAX_K = 2048  # of the radix select, which holds the best k in registers
# Kept exponentials start at a multiple of 16 bytes, for cuBLAS and TMA, if the bases before them take 16 a row.
BASES = 4
REACH = 30.0  # e^30 < 2^44: what a guessed base may be away from a tile's largest logit


class Config(NamedTuple):
    """How a fused kernel cuts its product: rows, columns and depth of a block, row blocks in a group (see `place`)."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def fixed_config() -> Config:
    return Config(128, 128, 64, 8, 8, 3)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these backends cannot take tensors of this device and dtype, or None if they can."""
    if not INSTALLED:
        return "the package triton is not installed"
    if dtype not in DTYPES:
        return f"it takes {' and '.join(str(d) for d in DTYPES)}, not {dtype}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}"
    major = torch.cuda.get_device_properties(device).major
    return None if major >= 8 else f"it needs compute capability 8.0 or later, this device has {major}.x"


def kernels(name: str) -> ModuleType:
    return importlib.import_module(f"dadpo_kernels.backends.triton_kernels.{name}")


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a @ b`, float32 from operands of any dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


class RowTiles(Tiles):
    """cuBLAS products in float32, then one Triton pass over them."""

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        super().__init__(hidden, head, entries)
        self.rows = hidden.shape[0]
        self.weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        self.kernels = kernels("rows")
        self.transform = (head.scale, head.softcap or 1.0, 1 / head.temperature)
        self.softcap = head.softcap is not None

    @staticmethod
    def tile_columns(rows: int, width: int, dtype: torch.dtype) -> int:
        return max(256, min(16384, WORKSPACE // ((4 + dtype.itemsize) * max(1, rows)) // 256 * 256))

    @staticmethod
    def kept_shape(rows: int, columns: int) -> tuple[int, int]:
        return -(-columns // 8) * 8, BASES

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
        # The tile of products and that of its gradient; a product that is scaled before it joins hidden's gradient.
        return rows * (columns * (4 + dtype.itemsize) + width * 4)

    def bias(self, first: int, columns: int) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias[first : first + columns]

    def shape(self, columns: int) -> dict:
        """How a row program covers its row."""
        block = max(128, power_of_2(columns))
        return {
            "SOFTCAP": self.softcap,
            "BLOCK": block,
            "ENTRIES": power_of_2(self.entries.ids.shape[1]),
            "num_warps": max(4, min(16, block // 1024)),
        }

    def products(self, first: int, columns: int) -> Tensor:
        return wide_mm(self.hidden, self.weight[first : first + columns].T)

    def partials(self, groups: int) -> tuple[Tensor, Tensor]:
        """Maxima and sums `[groups, n]` of the softmax over groups of a tile's columns."""
        maxima = torch.empty(groups, self.rows, dtype=torch.float32, device=self.hidden.device)
        return maxima, torch.empty_like(maxima)

    def absorb(
        self, maxima: Tensor, sums: Tensor, state: State, kept: Kept | None = None, stale: Tensor | None = None
    ) -> None:
        """Merges partial states into the running one; with `stale`, judges and replaces the guessed bases."""
        self.kernels.absorb[(-(-self.rows // 32),)](
            maxima, sums, self.rows, len(maxima), state.max, state.sum, kept and kept.bases, BASES, stale, REACH,
            ROWS=32, GROUPS=power_of_2(len(maxima)),
        )  # fmt: skip

    def statistics(self, first: int, columns: int, state: State, kept: Kept | None) -> None:
        with torch.cuda.device_of(self.hidden):
            e, products, (maxima, sums) = self.entries, self.products(first, columns), self.partials(1)
            exps, bases = (kept.exps, kept.bases) if kept else (None, None)
            self.kernels.statistics[(self.rows,)](
                products, products.stride(0), columns, first, self.bias(first, columns), *self.transform,
                e.ids, e.in_topk, e.ids.shape[1], state.selected, maxima, sums,
                exps, exps.stride(0) if kept else 0, bases, BASES, **self.shape(columns),
            )  # fmt: skip
            self.absorb(maxima, sums, state)

    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        """`[n, columns]` in the operands' dtype."""
        e, products = self.entries, self.products(first, columns)
        dz = torch.empty_like(products, dtype=self.hidden.dtype)
        self.kernels.logit_gradient[(self.rows,)](
            products, products.stride(0), columns, first, self.bias(first, columns), *self.transform,
            e.ids, e.ids.shape[1], coefficients.c, coefficients.base, coefficients.values, dz, dz.stride(0),
            **self.shape(columns),
        )  # fmt: skip
        return dz

    def gradient(self, first: int, columns: int, coefficients: Coefficients, grads: Grads, kept: Kept | None) -> None:
        with torch.cuda.device_of(self.hidden):
            if kept is None:
                dz = self.logit_gradient(first, columns, coefficients)
                if grads.hidden is not None:
                    accumulate(grads.hidden, dz, self.weight[first : first + columns])
                self.grad_weight(first, columns, dz, self.hidden, None, grads)
            else:
                self.kept_gradient(first, columns, coefficients, grads, kept)

    def kept_gradient(self, first: int, columns: int, coefficients: Coefficients, grads: Grads, kept: Kept) -> None:
        """Both products read the retained exponentials as they lie: no pass over the tile."""
        e, m = self.entries, self.entries.ids.shape[1]
        exps = kept.exps[:, :columns]
        factors, saved = torch.empty_like(coefficients.c), torch.empty_like(e.ids, dtype=exps.dtype)
        where = (exps, exps.stride(0), columns, first, e.ids, m)
        block = {"ENTRIES": power_of_2(m), "num_warps": 1}
        self.kernels.enter_values[(self.rows,)](
            *where, coefficients.c, coefficients.base, coefficients.values, kept.bases, BASES, factors, saved, **block
        )
        if grads.hidden is not None:
            grads.hidden.addcmul_(wide_mm(exps, self.weight[first : first + columns]), factors[:, None])
        scaled = (self.hidden * factors[:, None]).to(self.hidden.dtype) if grads.weight is not None else self.hidden
        self.grad_weight(first, columns, exps, scaled, factors, grads)
        self.kernels.restore[(self.rows,)](*where, saved, **block)

    def grad_weight(
        self, first: int, columns: int, matrix: Tensor, hidden: Tensor, factors: Tensor | None, grads: Grads
    ) -> None:
        """The tile's rows of the gradients of weight and bias from `matrix [n, columns]`."""
        if grads.weight is not None:
            torch.mm(matrix.T, hidden, out=grads.weight[first : first + columns])
        if grads.bias is not None:
            self.kernels.column_sums[(-(-columns // 64),)](
                matrix, matrix.stride(0), self.rows, columns, factors, grads.bias[first:], ROWS=64, COLUMNS=64
            )

    def topk(self, first: int, columns: int, state: State, best: Best) -> None:
        if best.k > MAX_K:
            TorchTiles(self.hidden, self.head, self.entries).topk(first, columns, state, best)
            return
        with torch.cuda.device_of(self.hidden):
            e, products, (maxima, sums) = self.entries, self.products(first, columns), self.partials(1)
            kernels("topk").select[(self.rows,)](
                products, products.stride(0), columns, first, self.bias(first, columns), *self.transform,
                e.ids, e.ids.shape[1], state.selected, best.values, best.ids, best.values.stride(0),
                min(best.k, first), min(best.k, first + columns), maxima, sums,
                BEST=power_of_2(best.k), **self.shape(columns),
            )  # fmt: skip
            self.absorb(maxima, sums, state)


class FusedTiles(RowTiles):
    """Products computed in the kernels that consume them: of a tile of logits, only what is kept leaves the chip.

    Retained exponentials need a base before the tile's maximum is known. It is guessed: the largest logit of the tail
    so far, 0 before the first tile. bfloat16 and float32 have exponents to spare, so a guess serves within e^+-REACH;
    a row whose guess did not is repaired with the maximum, which is known then.
    """

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        super().__init__(hidden, head, entries)
        same = entries.ids[:, 1:] == entries.ids[:, :-1]
        self.drop = entries.in_topk.clone()
        self.drop[:, 1:] |= same  # the label comes last among equals
        self.drop[:, :-1] &= ~same

    @staticmethod
    def tile_columns(rows: int, width: int, dtype: torch.dtype) -> int:
        return max(256, min(16384, WORKSPACE // (dtype.itemsize * max(1, rows)) // 256 * 256))

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
        # The tile of the logits' gradient; a product that is scaled before it joins hidden's gradient.
        return rows * (columns * dtype.itemsize + width * 4)

    def starts(self, first: int, columns: int, block: int) -> Tensor:
        """`[blocks + 1, n]`: where each row's entries of each block of columns begin."""
        edges = torch.arange(first, first + columns + block, block, device=self.hidden.device, dtype=torch.int32)
        edges[-1] = first + columns
        found = torch.searchsorted(self.entries.ids, edges.repeat(self.rows, 1), out_int32=True)
        return found.T.contiguous()

    def launch(self, kernel, config: Config, first: int, columns: int, *arguments) -> None:
        blocks = -(-self.rows // config.BLOCK_M) * -(-columns // config.BLOCK_N)
        weight, width = self.weight[first : first + columns], self.hidden.shape[1]
        kernel[(blocks,)](
            self.hidden, self.hidden.stride(0), self.rows, weight, weight.stride(0), self.bias(first, columns),
            columns, width, first, *self.transform, self.starts(first, columns, config.BLOCK_N), self.entries.ids,
            *arguments, SOFTCAP=self.softcap, EVEN_K=width % config.BLOCK_K == 0, **config._asdict(),
        )  # fmt: skip

    def statistics(self, first: int, columns: int, state: State, kept: Kept | None) -> None:
        kernel, entries = kernels("forward").statistics, self.entries.ids.shape[1]
        with torch.cuda.device_of(self.hidden):
            config = fixed_config()
            maxima, sums = self.partials(-(-columns // config.BLOCK_N))
            found = (self.drop, entries, state.selected, maxima, sums)
            if kept is None:
                self.launch(kernel, config, first, columns, *found, None, 0, None, 0, None)
                self.absorb(maxima, sums, state)
                return
            kept.bases.copy_(finite(state.max)[:, None])
            store = (kept.exps, kept.exps.stride(0), kept.bases, BASES)
            stale = torch.empty(self.rows, dtype=torch.int8, device=self.hidden.device)
            self.launch(kernel, config, first, columns, *found, *store, None)
            self.absorb(maxima, sums, state, kept, stale)
            self.launch(kernel, config, first, columns, *found, *store, stale)

    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        dz = torch.empty(self.rows, -(-columns // 8) * 8, dtype=self.hidden.dtype, device=self.hidden.device)
        self.launch(
            kernels("backward").logit_gradient, fixed_config(), first, columns, self.entries.ids.shape[1],
            coefficients.c, coefficients.base, coefficients.values, dz, dz.stride(0),
        )  # fmt: skip
        return dz[:, :columns]

"""Triton kernels around, or instead of, the matrix products: `triton_rows` and `triton`.

`TritonTiles` are the row tiles of `row_tiles.py` with Triton's passes over them. `FusedTiles` computes the products of
hidden and weight in its own kernels, so that statistics, retained exponentials and the gradient of the logits leave
the chip and the logits do not. The gradient's products are cuBLAS's in both.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ..head import Head
from .base import Best, Coefficients, Entries, Grads, RetainedTile, State
from .gpu_base import BASES, WORKSPACE, RowTiles, strip_bytes, whole
from .torch_ import TorchTiles, finite
from .tuning import Config, choose

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16)
MAX_K = 2048  # of the radix select, which holds the best k in registers
REACH = 30.0  # e^30 < 2^44: what a guessed base may be away from a tile's largest logit


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
    if torch.version.hip:
        return "it was written for NVIDIA's GPUs, and this is a ROCm build of PyTorch"
    major = torch.cuda.get_device_properties(device).major
    return None if major >= 8 else f"it needs compute capability 8.0 or later, this device has {major}.x"


def kernels(name: str) -> ModuleType:
    return importlib.import_module(f"dadpo_kernels.ops.backends.triton_kernels.{name}")


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def describe(matrix: Tensor, block: list[int]):
    """A descriptor of `matrix` for the tensor memory accelerator, which copies it in such blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block)


def describable(matrix: Tensor) -> bool:
    """Whether `describe` takes it, and any rows of it."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


class TritonTiles(RowTiles):
    """cuBLAS products in float32, then one Triton pass over them."""

    max_columns = 8192  # of a row in one program, which holds 16 of them a thread: more spill in the radix select

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        super().__init__(hidden, head, entries)
        self.kernels = kernels("rows")
        self.transform = head.scalars
        self.softcap = head.softcap is not None

    def bias(self, first: int, columns: int) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias[first : first + columns]

    def shape(self, columns: int) -> dict:
        """How a row program covers its row."""
        block = max(128, power_of_2(columns))
        return {
            "SOFTCAP": self.softcap,
            "BLOCK": block,
            "ENTRIES": power_of_2(self.entries.ids.shape[1]),
            "num_warps": max(4, block // 512),
        }

    def partials(self, groups: int) -> tuple[Tensor, Tensor]:
        """Maxima and sums `[groups, n]` of the softmax over groups of a tile's columns."""
        maxima = torch.empty(groups, self.rows, dtype=torch.float32, device=self.hidden.device)
        return maxima, torch.empty_like(maxima)

    def absorb(
        self,
        maxima: Tensor,
        sums: Tensor,
        state: State,
        retained: RetainedTile | None = None,
        stale: Tensor | None = None,
    ) -> None:
        """Merges partial states into the running one; with `stale`, judges and replaces the guessed bases."""
        bases = retained and retained.bases
        self.kernels.absorb[(-(-self.rows // 32),)](
            maxima, sums, self.rows, len(maxima), state.max, state.sum, bases, BASES, stale, REACH,
            ROWS=32, GROUPS=power_of_2(len(maxima)),
        )  # fmt: skip

    def forward(self, first: int, columns: int, state: State, retained: RetainedTile | None) -> None:
        with torch.cuda.device_of(self.hidden):
            e, products, (maxima, sums) = self.entries, self.products(first, columns), self.partials(1)
            store = (retained.exps, retained.exps.stride(0), retained.bases, BASES) if retained else (None, 0, None, 0)
            self.kernels.statistics[(self.rows,)](
                products, products.stride(0), columns, first, self.bias(first, columns), *self.transform,
                e.ids, e.in_topk, e.ids.shape[1], state.selected, maxima, sums, *store, **self.shape(columns),
            )  # fmt: skip
            self.absorb(maxima, sums, state)

    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        e, products = self.entries, self.products(first, columns)
        dz = self.padded(columns, self.hidden.dtype)
        self.kernels.logit_gradient[(self.rows,)](
            products, products.stride(0), columns, first, self.bias(first, columns), *self.transform,
            e.ids, e.ids.shape[1], coefficients.c, coefficients.base, coefficients.values, dz, dz.stride(0),
            **self.shape(columns),
        )  # fmt: skip
        return dz

    def backward(
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: RetainedTile | None
    ) -> None:
        with torch.cuda.device_of(self.hidden):
            super().backward(first, columns, coefficients, grads, retained)

    @contextmanager
    def enter_values(
        self, first: int, columns: int, coefficients: Coefficients, retained: RetainedTile
    ) -> Iterator[Tensor]:
        c, e, m = coefficients, self.entries, self.entries.ids.shape[1]
        factors, saved = torch.empty_like(c.c), torch.empty_like(e.ids, dtype=retained.exps.dtype)
        where = (retained.exps, retained.exps.stride(0), columns, first, e.ids, m)
        block = {"ENTRIES": power_of_2(m), "num_warps": 1}
        self.kernels.enter_values[(self.rows,)](
            *where, c.c, c.base, c.values, retained.bases, BASES, factors, saved, **block
        )
        yield factors
        self.kernels.restore[(self.rows,)](*where, saved, **block)

    def column_sums(self, matrix: Tensor, factors: Tensor | None, out: Tensor) -> None:
        columns = matrix.shape[1]
        self.kernels.column_sums[(-(-columns // 64),)](
            matrix, matrix.stride(0), self.rows, columns, factors, out, ROWS=64, COLUMNS=64
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


class FusedTiles(TritonTiles):
    """Products computed in the kernels that consume them: of a tile of logits, only what is retained leaves the chip.

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
        self.tma = describable(hidden) and describable(self.weight)

    @classmethod
    def tile_columns(cls, rows: int, width: int, dtype: torch.dtype) -> int:
        return max(256, min(cls.max_columns, WORKSPACE // (dtype.itemsize * max(1, rows)) // 256 * 256))

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype, grad_weight: bool) -> int:
        # As above, without the tile of products.
        strip = strip_bytes(columns, width, dtype) if grad_weight else 0
        return rows * max(whole(columns) * dtype.itemsize, width * 4) + strip

    def starts(self, first: int, columns: int, block: int) -> Tensor:
        """`[blocks + 1, n]`: where each row's entries of each block of columns begin."""
        edges = torch.arange(first, first + columns + block, block, device=self.hidden.device, dtype=torch.int32)
        edges[-1] = first + columns
        return torch.searchsorted(self.entries.ids, edges.repeat(self.rows, 1), out_int32=True).T.contiguous()

    def launcher(self, kernel, config: Config, first: int, columns: int, *arguments) -> Callable[..., None]:
        """All that a launch needs, made now; what is returned launches and does nothing else.

        Arguments that it is called with follow `arguments`.
        """
        blocks = -(-self.rows // config.BLOCK_M) * -(-columns // config.BLOCK_N)
        weight, width = self.weight[first : first + columns], self.hidden.shape[1]
        operands = [self.hidden, weight]
        if config.TMA:
            heights = (config.BLOCK_M, config.BLOCK_N)
            operands = [describe(t, [height, config.BLOCK_K]) for t, height in zip(operands, heights, strict=True)]
        return partial(
            kernel[(blocks,)],
            operands[0], self.hidden.stride(0), self.rows, operands[1], weight.stride(0), self.bias(first, columns),
            columns, width, first, *self.transform, self.starts(first, columns, config.BLOCK_N), self.entries.ids,
            *arguments, SOFTCAP=self.softcap, EVEN_K=width % config.BLOCK_K == 0, **config._asdict(),
        )  # fmt: skip

    def forward(self, first: int, columns: int, state: State, retained: RetainedTile | None) -> None:
        stale = torch.empty(self.rows, dtype=torch.int8, device=self.hidden.device) if retained else None
        if retained:
            retained.bases.copy_(finite(state.max)[:, None])
        store = (retained.exps, retained.exps.stride(0), retained.bases, BASES) if retained else (None, 0, None, 0)

        def prepare(config: Config) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor | None], None]]:
            parts = self.partials(-(-columns // config.BLOCK_N))
            entries = self.entries.ids.shape[1]
            kernel = kernels("forward").statistics
            return parts, self.launcher(
                kernel, config, first, columns, self.drop, entries, state.selected, *parts, *store
            )

        with torch.cuda.device_of(self.hidden):
            name = "retain" if retained else "statistics"
            config = choose(name, self.hidden, self.softcap, self.tma, lambda c: partial(prepare(c)[1], None))
            (maxima, sums), launch = prepare(config)
            launch(None)
            self.absorb(maxima, sums, state, retained, stale)
            if retained:
                launch(stale)

    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        dz = self.padded(columns, self.hidden.dtype)

        def prepare(config: Config) -> Callable[[], None]:
            return self.launcher(
                kernels("backward").logit_gradient, config, first, columns, self.entries.ids.shape[1],
                coefficients.c, coefficients.base, coefficients.values, dz, dz.stride(0),
            )  # fmt: skip

        prepare(choose("gradient", self.hidden, self.softcap, self.tma, prepare))()
        return dz

"""Triton kernels around, or instead of, the matrix products: `triton_rows` and `triton`.

`TritonTiles` are the row tiles of `gpu_base.py` with Triton's passes over them. `FusedTiles` computes the products of
hidden and weight in its own kernels, so that statistics, retained exponentials and the gradient of the logits leave
the chip and the logits do not. The gradient's products are cuBLAS's in both.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from types import ModuleType

import torch
from torch import Tensor

from ..head import Head
from ..log import debug
from ..plan import Plan
from .base import Best, Coefficients, Entries, Grads, Retained, State
from .gpu_base import REACH, STEP, WORKSPACE, RowTiles, whole
from .torch_ import TorchTiles, finite
from .tuning import Config, choose

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16)
MAX_K = 2048  # of the radix select, which holds the best k in registers
SPAN = 32768  # columns of a fused forward at a time, at most
BLOCK_BYTES = 12  # of a row in a block of columns: its partial state, and where its entries begin
PROBE = 1024  # columns that the first base is taken from


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


def span(rows: int) -> int:
    """Columns of a fused forward at a time: its blocks of 64 columns must fit into the workspace."""
    fitting = WORKSPACE // (BLOCK_BYTES * max(1, rows)) * 64
    return max(STEP, min(SPAN, fitting) // STEP * STEP)


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

    def forward(self, first: int, columns: int, state: State, retained: Retained | None) -> None:
        with torch.cuda.device_of(self.hidden):
            e, products = self.entries, self.products(first, columns)
            store = (
                (retained.exps[:, first:], retained.exps.stride(0), retained.bases) if retained else (None, 0, None)
            )
            self.kernels.forward[(self.rows,)](
                products, products.stride(0), columns, first, self.bias(first, columns), *self.transform,
                e.ids, e.in_topk, e.ids.shape[1], state.selected, state.max, state.sum, *store, REACH,
                **self.shape(columns),
            )  # fmt: skip

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
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: Retained | None
    ) -> None:
        with torch.cuda.device_of(self.hidden):
            super().backward(first, columns, coefficients, grads, retained)

    def exchange(self, matrix: Tensor, values: Tensor) -> None:
        ids = self.entries.ids
        self.kernels.exchange[(self.rows,)](
            matrix, matrix.stride(0), matrix.shape[1], ids, values, ids.shape[1],
            ENTRIES=power_of_2(ids.shape[1]), num_warps=1,
        )  # fmt: skip

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
            e, products = self.entries, self.products(first, columns)
            kernels("topk").select[(self.rows,)](
                products, products.stride(0), columns, first, self.bias(first, columns), *self.transform,
                e.ids, e.ids.shape[1], state.selected, best.values, best.ids, best.values.stride(0),
                min(best.k, first), min(best.k, first + columns), state.max, state.sum,
                BEST=power_of_2(best.k), **self.shape(columns),
            )  # fmt: skip


class FusedTiles(TritonTiles):
    """Products computed in the kernels that consume them: of a tile of logits, only what is retained leaves the chip.

    Retained exponentials need a base before any logit is known. A few columns, computed twice, give one; a row whose
    tail then rises by more than REACH above it is repaired with its largest logit, at the end.
    """

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        super().__init__(hidden, head, entries)
        self.tma = describable(hidden) and describable(self.weight)
        if not self.tma:
            debug(
                "the rows of hidden or weight do not start at multiples of 16 bytes: they are read element by element"
            )

    @cached_property
    def drop(self) -> Tensor:
        """`[n, M]` bool: the last of equal ids, if one of them is a top-k id."""
        ids, drop = self.entries.ids, self.entries.in_topk.clone()
        same = ids[:, 1:] == ids[:, :-1]
        drop[:, 1:].logical_or_(same)  # the label comes last among equals
        drop[:, :-1].logical_and_(~same)
        return drop

    @classmethod
    def tile_columns(cls, rows: int, width: int, dtype: torch.dtype) -> int:
        return max(256, min(cls.max_columns, WORKSPACE // (dtype.itemsize * max(1, rows)) // 256 * 256))

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype, grad_weight: bool) -> int:
        # As above, without the tile of products; or what the forward of a span holds.
        backward = rows * max(whole(columns), width if grad_weight else 0) * dtype.itemsize
        return max(backward, span(rows) // 64 * BLOCK_BYTES * rows)

    def forward_parts(self, plan: Plan) -> Iterator[tuple[int, int]]:
        return plan.parts(span(plan.rows), span(plan.rows))

    def starts(self, first: int, columns: int, block: int) -> Tensor:
        """`[blocks + 1, n]`: where each row's entries of each block of columns begin."""
        ids, edges = self.entries.ids, -(-columns // block) + 1
        out = torch.empty(edges, self.rows, dtype=torch.int32, device=self.hidden.device)
        kernels("fused").starts[(-(-self.rows // 32), -(-edges // 32))](
            ids, self.rows, ids.shape[1], first, columns, block, out, ROWS=32, EDGES=32
        )
        return out

    def launcher(
        self, name: str, config: Config, grid: tuple[int, ...], first: int, columns: int, *arguments
    ) -> Callable[[], None]:
        """All that a launch needs, made now; what is returned launches and does nothing else."""
        weight, width = self.weight[first : first + columns], self.hidden.shape[1]
        operands = [self.hidden, weight]
        if config.TMA:
            heights = (config.BLOCK_M, config.BLOCK_N)
            operands = [describe(t, [height, config.BLOCK_K]) for t, height in zip(operands, heights, strict=True)]
        return partial(
            getattr(kernels("fused"), name)[grid],
            operands[0], self.hidden.stride(0), self.rows, operands[1], weight.stride(0), self.bias(first, columns),
            columns, width, *arguments, SOFTCAP=self.softcap, EVEN_K=width % config.BLOCK_K == 0, **config.options,
        )  # fmt: skip

    def by_blocks(
        self, name: str, config: Config, first: int, columns: int, stored: Tensor | None, *arguments
    ) -> Callable[[], None]:
        """A launch of a kernel that cuts the product into blocks, and stores `[n, columns]` or nothing."""
        ids = self.entries.ids
        described = (first, *self.transform, self.starts(first, columns, config.BLOCK_N), ids, ids.shape[1])
        if config.PERSISTENT:
            hopper, weight = kernels("hopper"), self.weight[first : first + columns]
            return hopper.launcher(
                getattr(hopper, name), self.hidden, weight, stored, self.rows, self.bias(first, columns), columns,
                self.hidden.shape[1], *described, *arguments, SOFTCAP=self.softcap, **config.options,
            )  # fmt: skip
        blocks = -(-self.rows // config.BLOCK_M) * -(-columns // config.BLOCK_N)
        store = (None, 0) if stored is None else (stored, stored.stride(0))
        return self.launcher(name, config, (blocks,), first, columns, *described, *store, *arguments)

    def partial_states(
        self, kernel: str, first: int, columns: int, state: State, retained: Retained | None
    ) -> tuple[Tensor, Tensor]:
        """Maxima and sums `[blocks of columns, n]` of the tail; entries' logits and exponentials are stored.

        `kernel` is its name in `tuning`.
        """
        exps = retained.exps[:, first : first + columns] if retained else None
        bases = retained.bases if retained else None

        def prepare(config: Config) -> tuple[Tensor, Callable[[], None]]:
            blocks = -(-columns // config.BLOCK_N)
            parts = torch.empty(2, blocks, self.rows, dtype=torch.float32, device=self.hidden.device)
            return parts, self.by_blocks(
                "forward", config, first, columns, exps, self.drop, state.selected, *parts, bases
            )

        parts, launch = prepare(choose(kernel, self.hidden, self.softcap, self.tma, lambda c: prepare(c)[1]))
        launch()
        return parts[0], parts[1]

    def forward(self, first: int, columns: int, state: State, retained: Retained | None) -> None:
        with torch.cuda.device_of(self.hidden):
            if retained and first == 0:
                maxima, _ = self.partial_states("probe", 0, min(columns, PROBE), state, None)
                retained.bases.copy_(finite(maxima.amax(0)))
            kernel = "retain" if retained else "forward"
            maxima, sums = self.partial_states(kernel, first, columns, state, retained)
            kernels("fused").merge[(-(-self.rows // 32),)](
                maxima, sums, self.rows, len(maxima), state.max, state.sum, ROWS=32, GROUPS=32
            )
            if retained and first + columns == retained.exps.shape[1]:
                self.repair(state.max, retained)

    def repair(self, maxima: Tensor, retained: Retained) -> None:
        """Where the tail of the retained columns rose too far above the base, its largest logit is the base."""
        exps, before = retained.exps, retained.bases
        bases = torch.where((maxima - before).abs() > REACH, finite(maxima), before)

        def prepare(config: Config) -> Callable[[], None]:
            grid = -(-self.rows // config.BLOCK_M), 8
            return self.launcher(
                "repair", config, grid, 0, exps.shape[1], *self.transform, exps, exps.stride(0), before, bases
            )

        prepare(choose("repair", self.hidden, self.softcap, self.tma, prepare))()
        before.copy_(bases)

    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        dz = self.padded(columns, self.hidden.dtype)
        c = coefficients

        def prepare(config: Config) -> Callable[[], None]:
            return self.by_blocks("logit_gradient", config, first, columns, dz, c.c, c.base, c.values)

        prepare(choose("gradient", self.hidden, self.softcap, self.tma, prepare))()
        return dz

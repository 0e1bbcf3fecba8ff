"""The CUDA C++ kernels of `csrc/cuda`: cuBLAS tiles and one pass over them, compiled when the package is installed.

The extension sees addresses only; shapes, dtypes and layouts are made right here. See `csrc/cuda/passes.h`.
"""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..head import Head
from .base import Best, Coefficients, Entries, Grads, RetainedTile, State
from .gpu_base import BASES, RowTiles
from .torch_ import TorchTiles

_cuda: Any
try:
    _cuda = importlib.import_module("dadpo_kernels._cuda")
except ImportError:
    _cuda = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take tensors of this device and dtype, or None if it can."""
    if device.type != "cuda" or torch.version.hip:
        return f"the tensors are on {device}" + (" of a ROCm build" if torch.version.hip else "")
    if dtype not in DTYPES:
        return f"it takes {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    if not _cuda:
        return "the extension dadpo_kernels._cuda is not built (it needs nvcc at install time)"
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(_cuda.ARCHITECTURES, capability):
        version = "{}.{}".format(*capability)
        return (
            f"dadpo_kernels._cuda was built for {_cuda.ARCHITECTURES} and this device has compute capability "
            f"{version}: reinstall with TORCH_CUDA_ARCH_LIST={version}"
        )
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, as `8.0 9.0a 10.0+PTX`, runs on a device of this compute capability.

    Machine code runs on later minor versions of its major one, with a suffix on its own version alone; PTX without a
    suffix runs on everything later.
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", architectures):
        built = int(major), int(minor)
        if built == capability or (not suffix and built <= capability and (ptx or built[0] == capability[0])):
            return True
    return False


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class CudaTiles(RowTiles):
    module: ClassVar[Any] = _cuda

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        super().__init__(hidden, head, entries)
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        types = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
        self.type = getattr(self.module.Type, types[hidden.dtype])

    @classmethod
    def tile_columns(cls, rows: int, width: int, dtype: torch.dtype) -> int:
        # A row that fits into one block is read once, also where its exponentials are retained.
        return min(cls.module.COLUMNS, super().tile_columns(rows, width, dtype))

    def queue(self):
        """The current stream of the tensors' device."""
        device = self.hidden.device
        return self.module.Queue(device.index, torch.cuda.current_stream(device).cuda_stream)

    def launch(self, name: str, *args) -> None:
        # The extension has a CUDA runtime of its own: it and PyTorch must agree on the current device.
        with torch.cuda.device_of(self.hidden):
            getattr(self.module, name)(self.queue(), *args)

    def busy_blocks(self) -> int:
        """Blocks that keep the device busy."""
        return 2 * torch.cuda.get_device_properties(self.hidden.device).multi_processor_count

    def segments(self, columns: int) -> int:
        """Blocks that share a row: one, unless rows are too few for the device or too long for a block."""
        needed = -(-columns // self.module.COLUMNS)
        wanted = min(self.busy_blocks() // max(1, self.rows), columns // 1024)
        return max(1, needed, wanted)

    def tile(self, products: Tensor, first: int, segments: int):
        columns, (scale, softcap, inv_temperature) = products.shape[1], self.head.scalars
        return self.module.Tile(
            products=address(products),
            rows=self.rows,
            stride=products.stride(0),
            first=first,
            columns=columns,
            bias=0 if self.bias is None else address(self.bias[first:]),
            scale=scale,
            softcap=softcap,
            inv_temperature=inv_temperature,
            ids=address(self.entries.ids),
            entries=self.entries.ids.shape[1],
            segments=segments,
        )

    def retained(self, matrix: Tensor | None):
        return self.module.Retained(address(matrix), 0 if matrix is None else matrix.stride(0), self.type)

    def partials(self, segments: int) -> tuple[Tensor, Tensor]:
        """Maxima and sums `[segments, n]` of the softmax over segments of a tile's rows."""
        maxima = torch.empty(segments, self.rows, dtype=torch.float32, device=self.hidden.device)
        return maxima, torch.empty_like(maxima)

    def absorb(self, maxima: Tensor, sums: Tensor, state: State, bases: Tensor | None) -> None:
        self.launch(
            "absorb", address(maxima), address(sums), self.rows, len(maxima), address(state.max),
            address(state.sum), address(bases), BASES,
        )  # fmt: skip

    def forward(self, first: int, columns: int, state: State, retained: RetainedTile | None) -> None:
        products, segments = self.products(first, columns), self.segments(columns)
        tile, (maxima, sums) = self.tile(products, first, segments), self.partials(segments)
        at_once = retained is not None and segments == 1
        self.launch(
            "statistics", tile, address(self.entries.in_topk), address(state.selected), address(maxima), address(sums),
            self.retained(retained.exps if retained and at_once else None),
        )  # fmt: skip
        self.absorb(maxima, sums, state, retained.bases if retained else None)
        if retained and not at_once:
            # The base is known when all segments are: a second read, of rows so few that the cache has them.
            self.launch("logit_gradient", tile, 0, address(retained.bases), BASES, 0, self.retained(retained.exps))

    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        products, dz = self.products(first, columns), self.padded(columns, self.hidden.dtype)
        c = coefficients
        self.launch(
            "logit_gradient", self.tile(products, first, self.segments(columns)), address(c.c), address(c.base), 1,
            address(c.values), self.retained(dz),
        )  # fmt: skip
        return dz

    def retained_call(self, first: int, columns: int, c: Coefficients, retained: RetainedTile, **outputs: Tensor):
        return self.module.RetainedGradient(
            retained=self.retained(retained.exps),
            rows=self.rows,
            first=first,
            columns=columns,
            ids=address(self.entries.ids),
            entries=self.entries.ids.shape[1],
            c=address(c.c),
            base=address(c.base),
            values=address(c.values),
            bases=address(retained.bases),
            bases_stride=BASES,
            dz=address(outputs.get("dz")),
            dz_stride=outputs["dz"].stride(0) if "dz" in outputs else 0,
            factors=address(outputs.get("factors")),
            saved=address(outputs.get("saved")),
        )

    def retained_gradient(
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: RetainedTile
    ) -> None:
        if self.hidden.dtype != torch.float16:
            super().retained_gradient(first, columns, coefficients, grads, retained)
            return
        # float16 has no exponents to spare for entries over a factor: see csrc/cuda.
        dz = self.padded(columns, self.hidden.dtype)
        self.launch("scale_retained", self.retained_call(first, columns, coefficients, retained, dz=dz))
        self.add_products(first, columns, dz, grads)

    @contextmanager
    def enter_values(
        self, first: int, columns: int, coefficients: Coefficients, retained: RetainedTile
    ) -> Iterator[Tensor]:
        factors = torch.empty_like(coefficients.c)
        saved = torch.empty_like(self.entries.ids, dtype=self.hidden.dtype)
        gradient = self.retained_call(first, columns, coefficients, retained, factors=factors, saved=saved)
        self.launch("enter_values", gradient)
        yield factors
        self.launch("restore", gradient)

    def column_sums(self, matrix: Tensor, factors: Tensor | None, out: Tensor) -> None:
        self.launch("column_sums", self.retained(matrix), self.rows, matrix.shape[1], address(factors), address(out))

    def topk(self, first: int, columns: int, state: State, best: Best) -> None:
        if best.k > self.module.MAX_K:
            TorchTiles(self.hidden, self.head, self.entries).topk(first, columns, state, best)
            return
        products, (maxima, sums) = self.products(first, columns), self.partials(1)
        self.launch(
            "topk", self.tile(products, first, 1), address(state.selected), address(best.values),
            address(best.ids), best.values.shape[1], min(best.k, first), min(best.k, first + columns), address(maxima),
            address(sums),
        )  # fmt: skip
        self.absorb(maxima, sums, state, None)

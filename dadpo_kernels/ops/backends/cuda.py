"""The CUDA C++ kernels of `csrc/cuda`: cuBLAS tiles and one pass over them, compiled when the package is installed.

The extension sees addresses only; shapes, dtypes and layouts are made right here. See `csrc/cuda/passes.h`.
"""

import importlib
import re
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..head import Head
from .base import Best, Coefficients, Entries, Retained, State
from .gpu_base import REACH, STEP, RowTiles
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
        return min(cls.module.COLUMNS, super().tile_columns(rows, width, dtype))

    @staticmethod
    def retained_step(tile: int, dtype: torch.dtype) -> int:
        # float16 has no exponents to spare, for a base that is not the maximum and for entries over a factor.
        return 0 if dtype == torch.float16 else STEP

    def queue(self):
        """The current stream of the tensors' device."""
        device = self.hidden.device
        return self.module.Queue(device.index, torch.cuda.current_stream(device).cuda_stream)

    def launch(self, name: str, *args) -> None:
        # The extension has a CUDA runtime of its own: it and PyTorch must agree on the current device.
        with torch.cuda.device_of(self.hidden):
            getattr(self.module, name)(self.queue(), *args)

    def tile(self, products: Tensor, first: int):
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
        )

    def matrix(self, matrix: Tensor | None):
        return self.module.Matrix(address(matrix), 0 if matrix is None else matrix.stride(0), self.type)

    def forward(self, first: int, columns: int, state: State, retained: Retained | None) -> None:
        products = self.products(first, columns)
        self.launch(
            "forward", self.tile(products, first), address(self.entries.in_topk), address(state.selected),
            address(state.max), address(state.sum), self.matrix(retained.exps if retained else None),
            address(retained.bases if retained else None), REACH,
        )  # fmt: skip

    def logit_gradient(self, first: int, columns: int, coefficients: Coefficients) -> Tensor:
        products, dz, c = self.products(first, columns), self.padded(columns, self.hidden.dtype), coefficients
        self.launch(
            "logit_gradient", self.tile(products, first), address(c.c), address(c.base), address(c.values),
            self.matrix(dz),
        )  # fmt: skip
        return dz

    def exchange(self, matrix: Tensor, values: Tensor) -> None:
        ids = self.entries.ids
        self.launch("exchange", self.matrix(matrix), *matrix.shape, address(ids), ids.shape[1], address(values))

    def column_sums(self, matrix: Tensor, factors: Tensor | None, out: Tensor) -> None:
        self.launch("column_sums", self.matrix(matrix), *matrix.shape, address(factors), address(out))

    def topk(self, first: int, columns: int, state: State, best: Best) -> None:
        if best.k > self.module.MAX_K:
            TorchTiles(self.hidden, self.head, self.entries).topk(first, columns, state, best)
            return
        products = self.products(first, columns)
        self.launch(
            "topk", self.tile(products, first), address(state.selected), address(best.values), address(best.ids),
            best.values.shape[1], min(best.k, first), min(best.k, first + columns), address(state.max),
            address(state.sum),
        )  # fmt: skip

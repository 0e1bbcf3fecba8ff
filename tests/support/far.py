"""Memory whose rows lie so far apart that their offsets need more than 32 bits."""

import mmap
import sys

import pytest
import torch

NORESERVE = 0x4000  # Linux's; Python names it from 3.13 on
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is reserved as on Linux")


def far(rows: int, columns: int, dtype: torch.dtype, stride: int = 2**31 + 8) -> torch.Tensor:
    """`[rows, columns]` of zeros, rows `stride` elements apart; only the pages that are written take memory."""
    size = rows * stride * dtype.itemsize
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(area, dtype=dtype).as_strided((rows, columns), (stride, 1))

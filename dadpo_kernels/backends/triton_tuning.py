"""Which block shapes the fused Triton kernels run with: a short list for each chip, the fastest of it kept on disk.

The lists hold what compiles without spills on that chip (`benchmarks/static_report.py` shows it, a test insists). The
first call of a shape class times them once. `DADPO_AUTOTUNE=0` takes the first of the list instead: the same block
shapes, hence the same rounding, on every machine of that generation. `DADPO_CACHE_DIR` moves the file.
"""

import importlib.metadata
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """How a kernel cuts its product: rows, columns and depth of a block, row blocks in a group (see `place`)."""

    BLOCK_M: int
    BLOCK_N: int  # divides 256, the unit of a tile of the vocabulary
    BLOCK_K: int
    GROUP: int
    num_warps: int
    num_stages: int
    TMA: bool = False  # copies blocks by descriptors; needs compute capability 9.0

    def __str__(self) -> str:
        shape = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}, group {self.GROUP}"
        return f"{shape}, {self.num_warps} warps, {self.num_stages} stages{', TMA' if self.TMA else ''}"

    @property
    def described(self) -> "Config":
        return self._replace(TMA=True)

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory that its stages take."""
        return self.num_stages * (self.BLOCK_M + self.BLOCK_N) * self.BLOCK_K * dtype.itemsize


SQUARE, NARROW = Config(128, 128, 64, 8, 8, 3), Config(128, 64, 64, 8, 4, 3)
FLAT, SMALL = Config(64, 256, 64, 8, 8, 3), Config(64, 64, 32, 8, 4, 3)

# By kernel and compute capability's major; later chips get the last.
CONFIGS = {
    "statistics": {
        8: [SQUARE, NARROW, FLAT],
        9: [SQUARE, NARROW, FLAT, SQUARE.described, NARROW.described],
        10: [SQUARE, NARROW, FLAT, SQUARE.described],
    },
    "retain": {
        8: [SQUARE, NARROW, FLAT],
        9: [SQUARE, NARROW, FLAT, SQUARE.described, NARROW.described],
        10: [NARROW, NARROW.described],
    },
    "gradient": {
        8: [SQUARE, NARROW, FLAT],
        9: [SQUARE, NARROW, FLAT, SQUARE.described, NARROW.described],
        10: [SQUARE, NARROW, FLAT, SQUARE.described],
    },
}


def candidates(
    kernel: str, major: int, dtype: torch.dtype, width: int, *, tma: bool = True, shared: int = 2**31
) -> list[Config]:
    """The list of one kernel ("statistics", "retain" or "gradient"), the fixed choice first.

    float32 is three products of its halves, and a width that no depth divides takes masks: both want registers.

    Args:
        tma: descriptors can be made of the operands.
        shared: bytes of shared memory that a block may have; consumer cards have less than their generation's big one.
    """
    if dtype == torch.float32 or width % 64:
        return [SMALL]
    chips = CONFIGS[kernel]
    choices = chips.get(major, chips[max(chips)])
    return [config for config in choices if (tma or not config.TMA) and config.shared(dtype) <= shared]


def choose(kernel: str, hidden: Tensor, softcap: bool, tma: bool, launch: Callable[[Config], object]) -> Config:
    """The configuration for this device and shape class. `launch` runs the kernel once, without lasting effect."""
    rows, width = hidden.shape
    if not hidden.is_cuda or not rows:  # the interpreter; nothing to time
        return candidates(kernel, 8, hidden.dtype, width)[0]
    device = torch.cuda.get_device_properties(hidden.device)
    shared = device.shared_memory_per_multiprocessor - 1024  # one KiB of every block is the system's
    choices = candidates(kernel, device.major, hidden.dtype, width, tma=tma, shared=shared)
    if os.environ.get("DADPO_AUTOTUNE") == "0" or torch.are_deterministic_algorithms_enabled():
        return choices[0]
    key = (
        f"{device.name}, triton {version('triton')}, dadpo-kernels {version('dadpo-kernels')}: {kernel} "
        f"{hidden.dtype} rows<={1 << max(0, rows - 1).bit_length()} width={width} softcap={softcap} tma={tma}"
    )
    return tuned(key, choices, lambda config: seconds(lambda: launch(config)))


_known: dict[str, Config] = {}


def tuned(key: str, choices: list[Config], seconds: Callable[[Config], float]) -> Config:
    """The fastest of `choices`: as known to this process, else to the file, else as measured now."""
    if key not in _known:
        stored = read().get(key)
        found = [config for config in choices if list(config) == stored]  # a file chooses, it cannot invent
        if not found:
            found = [min(choices, key=seconds)]
            write({**read(), key: list(found[0])})
        _known[key] = found[0]
    return _known[key]


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time on the device, after one call that compiles."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DADPO_CACHE_DIR") or Path(base) / "dadpo_kernels") / "autotune.json"


def read() -> dict:
    try:
        stored = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def write(stored: dict) -> None:
    """Replaces the file at once, so that no process reads half of it; where it cannot be written, nothing is kept."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as temporary:
            json.dump(stored, temporary, indent=1)
        os.replace(temporary.name, path)
    except OSError:
        return


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

"""Which block shapes the fused Triton kernels run with: a short list for each chip, the fastest of it kept on disk.

The lists hold what keeps the matrix units of that chip busy: no spills in the product's loop, no wait after every
instruction (`benchmarks/static_report.py` shows it for two compilers, a test insists). The first call of a shape class
times them once. `DADPO_AUTOTUNE=0` takes the first of the list instead: the same block shapes, hence the same
rounding, on every machine of that generation. `DADPO_CACHE_DIR` moves the file.
"""

import functools
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

from ..log import debug

LAUNCHES, ROUNDS = 20, 5  # in a graph, and of all graphs


class Config(NamedTuple):
    """How a kernel cuts its product: rows, columns and depth of a block, row blocks in a group (see `place`)."""

    BLOCK_M: int
    BLOCK_N: int  # divides 256, the unit of a tile of the vocabulary
    BLOCK_K: int
    GROUP: int
    num_warps: int
    num_stages: int
    TMA: bool = False  # copies blocks by descriptors; needs compute capability 9.0
    PERSISTENT: bool = False  # the kernels of `triton_kernels/hopper.py`, which copy by descriptors too

    def __str__(self) -> str:
        copies = ", persistent" if self.PERSISTENT else ", TMA" if self.TMA else ""
        shape = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}, group {self.GROUP}"
        return f"{shape}, {self.num_warps} warps, {self.num_stages} stages{copies}"

    @property
    def described(self) -> "Config":
        return self._replace(TMA=True)

    @property
    def options(self) -> dict[str, int | bool]:
        """As the kernels take it."""
        options = self._asdict()
        persistent = options.pop("PERSISTENT")
        if persistent:
            options |= {"STAGES": options.pop("num_stages")}
            del options["TMA"]
        return options

    def shared(self, kernel: str, dtype: torch.dtype) -> int:
        """Bytes of shared memory that it takes at most: the blocks of all stages, and barriers of 16 bytes.

        A persistent kernel has room for the block that it stores besides, and for a reduction over rows.
        """
        stages = self.num_stages * ((self.BLOCK_M + self.BLOCK_N) * self.BLOCK_K * dtype.itemsize + 16)
        if not self.PERSISTENT:
            return stages
        return stages + 256 + (self.BLOCK_M * self.BLOCK_N * dtype.itemsize if kernel != "forward" else 0)


SQUARE, NARROW = Config(128, 128, 64, 8, 8, 3), Config(128, 64, 64, 8, 4, 3)
FLAT, SMALL = Config(64, 256, 64, 8, 8, 3), Config(64, 64, 32, 8, 4, 3)
# The fastest on an H100, of twice as many: a persistent program for each SM, whose copies run on in the epilogue; two
# blocks of the square with four warps on an SM, one's epilogue beside the other's product; a tall block, which
# computes a third more with each byte that it copies.
WIDE = Config(128, 256, 64, 8, 8, 3, TMA=True, PERSISTENT=True)
PAIRED, TALL = Config(128, 128, 64, 8, 4, 3, TMA=True), Config(256, 128, 64, 8, 8, 4, TMA=True)
HOPPER = [PAIRED, TALL, SQUARE]
BLACKWELL = [SQUARE, NARROW, FLAT, SQUARE.described]

# By kernel and compute capability's major; later chips get the last.
CONFIGS = {
    "forward": {
        8: [SQUARE, NARROW, FLAT],
        9: [WIDE._replace(num_stages=4), *HOPPER],
        10: BLACKWELL,
    },
    "retain": {
        8: [SQUARE, NARROW, FLAT],
        9: [WIDE, *HOPPER],
        10: [NARROW, NARROW.described, SQUARE, SQUARE.described],
    },
    "gradient": {8: [SQUARE, NARROW, FLAT], 9: [WIDE, *HOPPER], 10: BLACKWELL},
    # A few columns, and none most of the time: not worth timing.
    "probe": {8: [SQUARE]},
    "repair": {8: [NARROW]},
}


def candidates(
    kernel: str,
    major: int,
    dtype: torch.dtype,
    width: int,
    *,
    tma: bool = True,
    shared: int = 2**31,
) -> list[Config]:
    """The list of one kernel (of `CONFIGS`), the fixed choice first.

    float32 is three products of its halves, and a width that no depth divides takes masks, unless blocks are copied by
    descriptors: both want registers.

    Args:
        tma: descriptors can be made of the operands.
        shared: bytes of shared memory that a block may have; consumer cards have less than their generation's big one.
    """
    if dtype == torch.float32:
        return [SMALL]
    chips = CONFIGS[kernel]
    choices = chips.get(major, chips[max(chips)])
    if width % 64:
        choices = [*(config for config in choices if config.TMA), SMALL]
    return [config for config in choices if (tma or not config.TMA) and config.shared(kernel, dtype) <= shared]


def choose(
    kernel: str, hidden: Tensor, softcap: bool, tma: bool, prepare: Callable[[Config], Callable[[], object]]
) -> Config:
    """The configuration for this device and shape class.

    `prepare` allocates and describes all that a launch needs; what it returns launches the kernel once and may be
    called any number of times.
    """
    rows, width = hidden.shape
    if not hidden.is_cuda or not rows:  # the interpreter; nothing to time
        return candidates(kernel, 8, hidden.dtype, width)[0]
    device = torch.cuda.get_device_properties(hidden.device)
    shared = device.shared_memory_per_multiprocessor - 1024  # one KiB of every block is the system's
    choices = candidates(kernel, device.major, hidden.dtype, width, tma=tma, shared=shared)
    fixed = os.environ.get("DADPO_AUTOTUNE") == "0" or torch.are_deterministic_algorithms_enabled()
    if fixed or len(choices) == 1:
        return choices[0]
    key = (
        f"{device.name}, triton {version('triton')}, dadpo-kernels {version('dadpo-kernels')}: {kernel} "
        f"{hidden.dtype} rows<={1 << max(0, rows - 1).bit_length()} width={width} softcap={softcap} tma={tma}"
    )
    if config := known(key, choices):
        return config
    if torch.cuda.is_current_stream_capturing():  # nothing can be timed now; a later call will
        return choices[0]
    times = timed(choices, prepare)
    config = fastest(times)
    debug("Triton configuration for %s: %s", key, config)
    return keep(key, config, times)


_known: dict[str, Config] = {}


def known(key: str, choices: list[Config]) -> Config | None:
    """Which of `choices` this process, else the file, has chosen."""
    if key not in _known:
        entry = read().get(key)
        stored = entry.get("config") if isinstance(entry, dict) else None
        config = next((config for config in choices if list(config) == stored), None)  # a file cannot invent one
        if config is None:
            return None
        _known[key] = config
    return _known[key]


def keep(key: str, config: Config, times: dict[Config, list[float]]) -> Config:
    """Stores the choice for this process and later ones, with the measurements for people to read."""
    measured = {str(c): {"median": statistics.median(t), "spread": spread(t)} for c, t in times.items()}
    write({**read(), key: {"config": list(config), "seconds": measured}})
    _known[key] = config
    return config


def fastest(times: dict[Config, list[float]]) -> Config:
    """By the median; the first, unless another gains more on it than the times of either are spread."""
    first, best = next(iter(times)), min(times, key=lambda config: statistics.median(times[config]))
    gain = statistics.median(times[first]) - statistics.median(times[best])
    return best if gain > max(spread(times[first]), spread(times[best])) else first


def spread(times: list[float]) -> float:
    """The width of the middle half, which one disturbed replay does not change."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def timed(choices: list[Config], prepare: Callable[[Config], Callable[[], object]]) -> dict[Config, list[float]]:
    """Seconds of a launch, a time a round; in each round all take their turn, so that drift meets them alike.

    What does not compile or launch is left out, unless it is the first.
    """
    graphs, launches = {}, []  # a graph holds addresses: what its launch holds must live as long
    for config in choices:
        try:
            launches.append(prepare(config))
            graphs[config] = captured(launches[-1])
        except Exception as error:
            if config == choices[0]:
                raise
            debug("Triton configuration %s is left out: %s", config, error)
    rounds = [{config: seconds(graph) for config, graph in graphs.items()} for _ in range(ROUNDS)]
    return {config: [times[config] for times in rounds] for config in graphs}


def captured(launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """LAUNCHES in one graph, which the device runs without Python; ready to be timed."""
    launch()  # compiles and loads, which a capture must not
    graph = torch.cuda.CUDAGraph()
    # On a stream of this device, for PyTorch's own for captures is of the device that came first; and of this thread's
    # work only, for a data loader's may pin memory meanwhile. The outer context is left also where a capture fails.
    capture = torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), capture:
        for _ in range(LAUNCHES):
            launch()
    graph.replay()  # the first takes the graph to the device
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / LAUNCHES


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


@functools.cache  # reading a package's metadata takes most of a millisecond
def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

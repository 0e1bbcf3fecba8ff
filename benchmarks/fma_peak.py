"""The rate of float32 multiply-adds that the processor reaches with nothing to load: a bound for every product."""

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
STEPS = 16_000_000


def fma_peak(threads: int) -> Callable[[], float]:
    """A function that returns floating-point operations per second of all `threads` together, in some 30 ms.

    Compiled for this processor by the C++ compiler that `CXX` names (`c++` without); `CalledProcessError` if it fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "fma_peak.so"
        options = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "c++"), *options, str(SOURCE), "-o", str(library)], check=True)
        fma_steps = ctypes.CDLL(str(library)).fma_steps
    fma_steps.restype, fma_steps.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]

    def one(_: int) -> float:
        start = time.perf_counter()
        operations = fma_steps(STEPS, ctypes.byref(ctypes.c_float(0.0)))
        return operations / (time.perf_counter() - start)

    def rate() -> float:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(one, range(threads)))

    return rate

"""Time and memory of one call, or why it failed."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(device: torch.device, run: Callable[[], object], repeats: int) -> float:
    """Median time of a call after one that warms up."""
    return statistics.median(times(device, run, repeats))


def times(device: torch.device, run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call after one that warms up: on the device's own clock where it has one."""
    run()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return seconds


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int | None:
    """What a call allocates at most above what was there, gradients included; None where it is not known."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes."""
    source = torch.randn(size // 4, device=device)  # not zeros, on which some GPUs are faster
    target = torch.empty_like(source)
    return 2 * size / seconds(device, lambda: target.copy_(source), repeats)


class Unavailable(Exception):
    """What was to be measured is not here: no failure of it."""


class DeviceLost(Exception):
    """The device refuses everything for as long as this process lives, as after an illegal access."""


def attempt(run: Callable[[], dict]) -> dict:
    """What `run` returns, or the reason why it did not.

    Raises:
        DeviceLost: and nothing after it would either.
    """
    try:
        return run()
    except (Unavailable, ModuleNotFoundError) as error:
        return {"skipped": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
    # Behind the handler: what the failed call held is free now.
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            raise DeviceLost(reason) from None
    return {"error": reason}

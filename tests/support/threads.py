"""Results that must not depend on how many threads compute them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def on_threads(counts: Iterable[int], run: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What `run` gives on so many of PyTorch's threads, one after the other."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def assert_close(results: list[dict[str, Tensor]], rtol: float = 0, atol: float = 0) -> None:
    """All like the first; by default to the last bit."""
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=rtol, atol=atol, msg=name)

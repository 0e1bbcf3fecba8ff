"""What the live plan's backwards report, for a trainer's log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..ops.live.diagnostics import live_diagnostics

NAMES = ("certificate", "live_share", "exact_share", "units")  # of LiveDiagnostics


class LiveMetrics:
    """`live/certificate`, `live/live_share`, `live/exact_share`, `live/units`: token means since the last log.

    Args:
        grad_tolerance: of the run; without one there is nothing to report.
        reduce: the sum of a tensor over all ranks; every rank calls `pop`.
        device: where `reduce` takes tensors.
    """

    def __init__(self, grad_tolerance: float | None, reduce: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._enabled, self._reduce, self._device = grad_tolerance is not None, reduce, device
        self._sums = [0.0] * (1 + len(NAMES))  # of tokens, and of each number times the tokens that it is of

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Count the backwards of the live plan that run inside."""
        with live_diagnostics() as backwards:
            yield
        for backward in backwards:
            numbers = (1.0, *(getattr(backward, name) for name in NAMES))
            self._sums = [total + backward.tokens * x for total, x in zip(self._sums, numbers, strict=True)]

    def pop(self) -> dict[str, float]:
        """The means of all ranks by their names in the log, and a new count; nothing if no such backward ran."""
        if not self._enabled:
            return {}
        tokens, *totals = self._reduce(torch.tensor(self._sums, device=self._device)).tolist()
        self._sums = [0.0] * len(self._sums)
        return {f"live/{name}": total / tokens for name, total in zip(NAMES, totals, strict=True)} if tokens else {}

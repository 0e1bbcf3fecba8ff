"""What the live plan's backwards report, for a trainer's log."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..ops.live.diagnostics import live_diagnostics

NAMES = ("certificate", "live_share", "exact_share", "units")  # of LiveDiagnostics


class LiveMetrics:
    """`live/certificate`, `live/live_share`, `live/exact_share`, `live/units`: token means since the last log."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._tokens, self._sums = 0, dict.fromkeys(NAMES, 0.0)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Counts the backwards of the live plan that run inside."""
        with live_diagnostics() as backwards:
            yield
        for backward in backwards:
            self._tokens += backward.tokens
            for name in NAMES:
                self._sums[name] += backward.tokens * getattr(backward, name)

    def pop(self) -> dict[str, float]:
        """The means by their names in the log, and from here on a new count; nothing if no such backward ran."""
        means = {f"live/{name}": total / self._tokens for name, total in self._sums.items()} if self._tokens else {}
        self._reset()
        return means

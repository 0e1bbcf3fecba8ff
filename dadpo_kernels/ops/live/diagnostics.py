"""Diagnostics of a backward of the live plan: its measured error and its cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class LiveDiagnostics:
    """One backward of the live plan.

    Attributes:
        tokens: that took part.
        certificate: `|dz' - dz| / |dz|` of the gradient of the logits `[tokens, V]` in the Frobenius norm, with the
            loss's own coefficients; never more than the `grad_tolerance` asked for.
        live_share: share of the vocabulary's columns that were live, mean over tokens.
        exact_share: share of the tokens whose chunk the backward recomputed exactly; all their columns count as live.
        units: products of forward and backward, in units of `N·V·H`; the exact plans take 3 to 4.
    """

    tokens: int
    certificate: float
    live_share: float
    exact_share: float
    units: float


_collectors: list[list[LiveDiagnostics]] = []


@contextmanager
def live_diagnostics() -> Iterator[list[LiveDiagnostics]]:
    """Collect a `LiveDiagnostics` for every backward of `linear_selected_logps` with a `grad_tolerance` inside.

        with live_diagnostics() as backwards:
            loss.backward()
        print(backwards[0].certificate, backwards[0].units)

    Collects from the whole process, not from one thread: autograd may run the backward in another thread.
    """
    collected: list[LiveDiagnostics] = []
    _collectors.append(collected)
    try:
        yield collected
    finally:
        _collectors[:] = [other for other in _collectors if other is not collected]


def record(diagnostics: LiveDiagnostics) -> None:
    """Hand the diagnostics of a backward to every collector that is open."""
    for collector in _collectors:
        collector.append(diagnostics)

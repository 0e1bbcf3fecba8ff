"""How a pass will run: which tiles of the vocabulary are retained between forward and backward, and what that costs.

One unit of work is one `N·V·H` matrix product (`2·N·V·H` floating-point operations). Dense training needs three.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A pass over `vocab` columns in tiles of `tile` columns, the first `retained` columns kept for the backward.

    Attributes:
        rows: tokens that take part (masked ones are dropped before).
        vocab: columns of the head.
        tile: columns of a tile; the last one may be shorter, and so may the last one that is retained.
        retained: leading columns whose exponentials the forward keeps.
        retained_bytes: what they occupy.
        grad_hidden, grad_weight: which gradient products the backward makes.
    """

    rows: int
    vocab: int
    tile: int
    retained: int
    retained_bytes: int
    grad_hidden: bool
    grad_weight: bool

    def parts(self, retained: int, recomputed: int) -> Iterator[tuple[int, int]]:
        """`(first column, columns)` in order: of what is retained so many columns at a time, then of the others."""
        for start, stop, step in ((0, self.retained, retained), (self.retained, self.vocab, recomputed)):
            for first in range(start, stop, step):
                yield first, min(step, stop - first)

    @property
    def tiles(self) -> Iterator[tuple[int, int]]:
        """`(first column, columns)` of every tile, in order."""
        return self.parts(self.tile, self.tile)

    @property
    def units(self) -> float:
        """Matrix products of forward and backward together, in units of `N·V·H`."""
        if not (self.grad_hidden or self.grad_weight):
            return 1.0
        return 1.0 + (1.0 - self.retained / self.vocab) + self.grad_hidden + self.grad_weight

    @property
    def name(self) -> str:
        """`no_grad`, `recompute`, `partial` or `retain`."""
        if not (self.grad_hidden or self.grad_weight):
            return "no_grad"
        if not self.retained:
            return "recompute"
        return "retain" if self.retained == self.vocab else "partial"

    def __str__(self) -> str:
        frozen = "" if self.grad_weight or self.name == "no_grad" else ", frozen head"
        return (
            f"{self.name}{frozen}: {self.units:.2f} products of {self.rows} tokens x {self.vocab} columns, "
            f"tiles of {self.tile}, {self.retained_bytes / 2**20:.0f} MiB retained"
        )


def make_plan(
    rows: int,
    vocab: int,
    tile: int,
    step: int,
    retained_bytes: Callable[[int], int],
    memory_budget: int,
    grad_hidden: bool,
    grad_weight: bool,
) -> Plan:
    """Retains as many columns, in multiples of `step` or all, as `retained_bytes(columns)` lets fit into the budget.

    Without a backward it retains none, and with step 0 neither.
    """
    retained = 0
    if rows and step and (grad_hidden or grad_weight):
        multiples = range(step, vocab + step, step)
        fitting = bisect_right(multiples, memory_budget, key=lambda columns: retained_bytes(min(columns, vocab)))
        retained = min(fitting * step, vocab)
    return Plan(rows, vocab, tile, retained, retained_bytes(retained) if retained else 0, grad_hidden, grad_weight)

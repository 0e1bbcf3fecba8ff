"""How a pass will run: which tiles of the vocabulary are retained between forward and backward, and what that costs.

One unit of work is one `N·V·H` matrix product (`2·N·V·H` floating-point operations). Dense training needs three.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A pass over `vocab` columns in tiles of `tile` columns, the first `retained` tiles kept for the backward.

    Attributes:
        rows: tokens that take part (masked ones are dropped before).
        vocab: columns of the head.
        tile: columns of a tile, the last one may be shorter.
        retained: tiles whose exponentials the forward keeps.
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

    @property
    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """`(index, first column, columns)` of every tile, in order."""
        for index, first in enumerate(range(0, self.vocab, self.tile)):
            yield index, first, min(self.tile, self.vocab - first)

    @property
    def units(self) -> float:
        """Matrix products of forward and backward together, in units of `N·V·H`."""
        if not (self.grad_hidden or self.grad_weight):
            return 1.0
        recomputed = 1.0 - min(self.vocab, self.retained * self.tile) / self.vocab
        return 1.0 + recomputed + self.grad_hidden + self.grad_weight

    @property
    def name(self) -> str:
        """`no_grad`, `recompute`, `partial` or `retain`."""
        if not (self.grad_hidden or self.grad_weight):
            return "no_grad"
        if not self.retained:
            return "recompute"
        return "retain" if self.retained * self.tile >= self.vocab else "partial"

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
    tile_bytes: Callable[[int], int],
    memory_budget: int,
    grad_hidden: bool,
    grad_weight: bool,
) -> Plan:
    """Retains as many tiles, of `tile_bytes(columns)` each, as fit into the budget; none without a backward."""
    full, last = divmod(vocab, tile)
    one_tile, all_tiles = tile_bytes(tile), full * tile_bytes(tile) + (tile_bytes(last) if last else 0)
    if not rows or not (grad_hidden or grad_weight):
        return Plan(rows, vocab, tile, 0, 0, grad_hidden, grad_weight)
    if all_tiles <= memory_budget:
        return Plan(rows, vocab, tile, full + bool(last), all_tiles, grad_hidden, grad_weight)
    retained = min(full, memory_budget // one_tile)
    return Plan(rows, vocab, tile, retained, retained * one_tile, grad_hidden, grad_weight)

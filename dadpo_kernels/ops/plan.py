"""How a pass will run: which tiles of the vocabulary are retained between forward and backward, and what that costs.

One unit of work is one `N·V·H` matrix product (`2·N·V·H` floating-point operations). Dense training needs three.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

DEFAULT_BUDGET = 256 * 2**20
LIVE_WORKSPACE = 48 * 2**20  # bytes, in the live plan, of a chunk's logits, and of the weight of a backward's tile
LIVE_TILE = 16384  # columns of such a tile at most


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
    budget: int,
    grad_hidden: bool,
    grad_weight: bool,
) -> Plan:
    """Retains as many tiles, of `tile_bytes(columns)` each, as fit into `budget` bytes; none without a backward."""
    full, last = divmod(vocab, tile)
    each, whole = tile_bytes(tile), full * tile_bytes(tile) + (tile_bytes(last) if last else 0)
    if not rows or not (grad_hidden or grad_weight):
        return Plan(rows, vocab, tile, 0, 0, grad_hidden, grad_weight)
    if whole <= budget:
        return Plan(rows, vocab, tile, full + bool(last), whole, grad_hidden, grad_weight)
    retained = min(full, budget // each)
    return Plan(rows, vocab, tile, retained, retained * each, grad_hidden, grad_weight)


@dataclass(frozen=True)
class LivePlan:
    """A pass over chunks of tokens that is exact on the live columns of each chunk: see `backends/live.py`.

    Attributes:
        rows, vocab, tile: as in `Plan`; tiles bound the backward's workspace.
        chunk: tokens that share their live columns, the last chunk may have fewer.
        profile_bytes: what the chunks' profiles occupy between forward and backward.
        budget: bytes for the exponentials of live columns, kept as far as they fit.
        tolerance: bound of the relative error of the gradient of the logits.
    """

    rows: int
    vocab: int
    tile: int
    chunk: int
    profile_bytes: int
    budget: int
    tolerance: float

    @property
    def chunks(self) -> list[slice]:
        """The rows of every chunk, in order."""
        return [slice(first, min(first + self.chunk, self.rows)) for first in range(0, self.rows, self.chunk)]

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """`(first column, columns)` of every tile, in order."""
        return [(first, min(self.tile, self.vocab - first)) for first in range(0, self.vocab, self.tile)]


def live_chunk(vocab: int) -> int:
    """Tokens of a chunk: as many as its workspace holds, in whole panels of any CPU's product (64)."""
    return min(512, max(64, LIVE_WORKSPACE // (4 * vocab) // 64 * 64))


def profile_bytes(tokens: int, vocab: int, itemsize: int) -> int:
    """One number per column and chunk, float32 at least."""
    return -(-tokens // live_chunk(vocab)) * vocab * max(4, itemsize)


def live_bytes(tokens: int, vocab: int, itemsize: int, budget: int) -> int:
    """The buffer of a live pass over at most `tokens`: profiles, and exponentials within the budget."""
    return profile_bytes(tokens, vocab, itemsize) + min(budget, tokens * vocab * itemsize)


def make_live_plan(
    tokens: int, rows: int, vocab: int, width: int, itemsize: int, buffer: int, tolerance: float
) -> LivePlan:
    """The live plan over `rows` of `tokens` tokens, with a buffer of `live_bytes` for all of them."""
    profiles = profile_bytes(tokens, vocab, itemsize)
    tile = min(vocab, LIVE_TILE, max(1024, LIVE_WORKSPACE // (4 * width)))
    return LivePlan(rows, vocab, tile, live_chunk(vocab), profiles, buffer - profiles, tolerance)

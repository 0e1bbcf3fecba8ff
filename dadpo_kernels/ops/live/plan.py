"""Chunks and buffers of the live plan: see `live_pass.py`."""

from dataclasses import dataclass

LIVE_WORKSPACE = 48 * 2**20  # bytes of a chunk's logits, and of the weight of one of the backward's tiles
LIVE_TILE = 16384  # columns of such a tile at most


@dataclass(frozen=True)
class LivePlan:
    """A pass over chunks of tokens that is exact on the live columns of each chunk.

    Attributes:
        rows: tokens that take part (masked ones are dropped before).
        vocab: columns of the head.
        tile: columns of a tile of the backward, the last one may be shorter.
        chunk: tokens that share their live columns, the last chunk may have fewer.
        profile_bytes: what the chunks' profiles occupy between forward and backward.
        retained_bytes: that and the live columns' exponentials, which are kept as far as they fit.
        grad_tolerance: bound of the relative error of the gradient of the logits.
    """

    rows: int
    vocab: int
    tile: int
    chunk: int
    profile_bytes: int
    retained_bytes: int
    grad_tolerance: float

    name = "live"

    @property
    def chunks(self) -> list[slice]:
        """The rows of every chunk, in order."""
        return [slice(first, min(first + self.chunk, self.rows)) for first in range(0, self.rows, self.chunk)]

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """`(first column, columns)` of every tile, in order."""
        return [(first, min(self.tile, self.vocab - first)) for first in range(0, self.vocab, self.tile)]

    @property
    def units(self) -> float:
        """Matrix products of forward and backward together, in units of `N·V·H`, if no column were live.

        The share of live columns depends on the data; each gradient adds that share. `live_diagnostics` tells both
        after a backward.
        """
        return 1.0

    def __str__(self) -> str:
        return (
            f"live: at least {self.units:.2f} products of {self.rows} tokens x {self.vocab} columns, chunks of "
            f"{self.chunk} tokens, up to {self.retained_bytes / 2**20:.0f} MiB retained, "
            f"grad_tolerance={self.grad_tolerance:g}"
        )


def live_chunk(vocab: int) -> int:
    """Tokens of a chunk: as many as its workspace holds, in whole panels of any CPU's product (64)."""
    return min(512, max(64, LIVE_WORKSPACE // (4 * vocab) // 64 * 64))


def profile_bytes(tokens: int, vocab: int, itemsize: int) -> int:
    """One number per column and chunk, float32 at least."""
    return -(-tokens // live_chunk(vocab)) * vocab * max(4, itemsize)


def live_buffer_bytes(tokens: int, vocab: int, itemsize: int, memory_budget: int) -> int:
    """The buffer of a live pass over at most `tokens`: profiles, and exponentials within the budget."""
    return profile_bytes(tokens, vocab, itemsize) + min(memory_budget, tokens * vocab * itemsize)


def make_live_plan(
    tokens: int, rows: int, vocab: int, width: int, itemsize: int, buffer_bytes: int, grad_tolerance: float
) -> LivePlan:
    """The live plan over `rows` of `tokens` tokens, with a buffer of `live_buffer_bytes` for all of them."""
    profiles = profile_bytes(tokens, vocab, itemsize)
    tile = min(vocab, LIVE_TILE, max(1024, LIVE_WORKSPACE // (4 * width)))
    return LivePlan(rows, vocab, tile, live_chunk(vocab), profiles, buffer_bytes, grad_tolerance)

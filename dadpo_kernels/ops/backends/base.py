"""The one loop over tiles of the vocabulary. Backends supply what happens inside a tile.

The vocabulary is the outer loop and all tokens are inside: each tile of the weight gradient is written once, and the
small `[N, H]` gradient is the float32 accumulator. A row keeps one running softmax state, that of the columns
*outside* its top-k ids (the tail); its total follows from it and the selected logits, so nothing is ever subtracted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..head import Head
from ..plan import Plan


@dataclass(frozen=True)
class Entries:
    """The selected ids of each row in ascending order: its top-k ids and its label. Duplicates stay, side by side.

    Among equals the label comes last.
    """

    ids: Tensor  # [n, M] int32
    order: Tensor  # [n, M] int64: position of each entry in [topk..., label]
    pairs: bool = False  # no id is known to stand more than twice in a row

    @classmethod
    def merge(cls, labels: Tensor, topk_ids: Tensor | None) -> "Entries":
        ids = labels[:, None] if topk_ids is None else torch.cat([topk_ids.to(labels.dtype), labels[:, None]], 1)
        ids, order = ids.sort(dim=1, stable=True)
        return cls(ids.to(torch.int32).contiguous(), order)

    def rows(self, part: slice | Tensor) -> "Entries":
        """The entries of some rows: views of a slice."""
        return Entries(self.ids[part], self.order[part], self.pairs)

    @cached_property
    def in_topk(self) -> Tensor:
        """`[n, M]` bool."""
        return self.order < self.order.shape[1] - 1

    @cached_property
    def repeats(self) -> Tensor:
        """`[n, M]` bool: the entry before has the same id."""
        return torch.nn.functional.pad(self.ids[:, 1:] == self.ids[:, :-1], (1, 0))

    def thrice(self) -> Tensor:
        """`[n]` bool: some id of the row stands three times or more."""
        return (self.ids[:, 2:] == self.ids[:, :-2]).any(1)


@dataclass(frozen=True)
class Coefficients:
    """The gradient of the logits: `c[n] exp(z - base[n])` everywhere but at the entries, where it is `values`.

    The base is the largest logit of the tail, not its lse: that one is rounded at the size of the logits.
    """

    c: Tensor  # [n]
    base: Tensor  # [n]
    values: Tensor  # [n, M], equal for duplicate ids


@dataclass(frozen=True)
class Retained:
    """Retained exponentials: `exp(z - base)` times the softcap's slope.

    A tile with one base per row and group of its columns, or all retained columns with one base per row: each backend
    has its layout, see `Tiles.retained`.
    """

    exps: Tensor  # [n, columns]
    bases: Tensor  # [n, groups] or [n]


class Tiles(ABC):
    """One pass of one backend over `hidden [n, H]` and a head."""

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        self.hidden, self.head, self.entries = hidden, head, entries

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for what the backend writes: retained tiles and gradients."""
        return torch.empty(shape, dtype=dtype, device=device)

    @staticmethod
    @abstractmethod
    def tile_columns(rows: int, width: int, dtype: torch.dtype) -> int:
        """Columns of a tile: the workspace must not grow with the number of rows."""

    @staticmethod
    def retained_shape(rows: int, columns: int) -> tuple[int, int]:
        """`(padded columns, groups)` of a retained tile."""
        return columns, 1

    @staticmethod
    def retained_step(tile: int, dtype: torch.dtype) -> int:
        """The number of retained columns is a multiple of this one, or all; 0: none are retained in this dtype."""
        return tile

    @classmethod
    def retained_bytes(cls, rows: int, columns: int, tile: int, dtype: torch.dtype) -> int:
        """What the first `columns` columns occupy: tile by tile, bases and exponentials, in whole cache lines."""

        def of_tile(columns: int) -> int:
            padded, groups = cls.retained_shape(rows, columns)
            return -(-rows * (padded * dtype.itemsize + groups * accumulator_dtype(dtype).itemsize) // 64) * 64

        full, last = divmod(columns, tile)
        return full * of_tile(tile) + (of_tile(last) if last else 0)

    def retained(self, plan: Plan, first: int, columns: int, buffer: Tensor) -> Retained | None:
        """Where the byte buffer holds the tile at column `first`; None if the plan recomputes it."""
        if first >= plan.retained:
            return None
        dtype, wide = self.hidden.dtype, accumulator_dtype(self.hidden.dtype)
        padded, groups = self.retained_shape(plan.rows, columns)
        start = self.retained_bytes(plan.rows, first, plan.tile, dtype)
        middle = start + plan.rows * groups * wide.itemsize
        bases = buffer[start:middle].view(wide).view(plan.rows, groups)
        exps = buffer[middle : middle + plan.rows * padded * dtype.itemsize].view(dtype).view(plan.rows, padded)
        return Retained(exps, bases)

    @staticmethod
    @abstractmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype, grad_weight: bool) -> int:
        """What forward and backward hold at once, in addition to their results, while they work on one tile.

        Without `grad_weight`, for a frozen head, nothing is kept for the weight's gradient.
        """

    def grad_hidden_columns(self) -> int:
        """Columns of the accumulator for hidden's gradient: at least H."""
        return self.hidden.shape[1]

    def forward_parts(self, plan: Plan) -> Iterator[tuple[int, int]]:
        """`(first column, columns)` of what `forward` takes at a time."""
        return plan.tiles

    def backward_parts(self, plan: Plan) -> Iterator[tuple[int, int]]:
        """`(first column, columns)` of what `backward` takes at a time."""
        return plan.tiles

    @abstractmethod
    def forward(self, first: int, columns: int, state: "State", retained: Retained | None) -> None:
        """Adds the tile's columns outside the top-k ids to the state and stores the entries' logits."""

    @abstractmethod
    def backward(
        self, first: int, columns: int, coefficients: Coefficients, grads: "Grads", retained: Retained | None
    ) -> None:
        """Adds the tile's share to `grads.hidden` and writes its rows of `grads.weight` and `grads.bias`."""

    @abstractmethod
    def topk(self, first: int, columns: int, state: "State", best: "Best") -> None:
        """Keeps the `k` best logits so far and adds all others to the state; stores the entries' logits."""


@dataclass(frozen=True)
class State:
    """The running softmax of each row over its columns outside the top k, and the logits of its entries."""

    max: Tensor  # [n] the largest logit
    sum: Tensor  # [n] float64, of exp(z - max)
    selected: Tensor  # [n, M] logits at the entries

    @classmethod
    def new(cls, rows: int, entries: int, like: Tensor) -> "State":
        return cls(
            like.new_full((rows,), -torch.inf, dtype=accumulator_dtype(like.dtype)),
            like.new_zeros(rows, dtype=torch.float64),
            like.new_full((rows, entries), -torch.inf, dtype=accumulator_dtype(like.dtype)),
        )

    def rows(self, part: slice) -> "State":
        """The state of some rows: views, so what is written to them is written to this state."""
        return State(self.max[part], self.sum[part], self.selected[part])


@dataclass(frozen=True)
class Grads:
    """Where a backward puts gradients; None where none is wanted."""

    hidden: Tensor | None  # [n, >= H] accumulator, see `grad_hidden_columns`
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V] in the dtype of `accumulator_dtype`


@dataclass(frozen=True)
class Best:
    """The k largest logits of each row so far, in buffers with room for more."""

    values: Tensor  # [n, capacity]
    ids: Tensor  # [n, capacity] int32
    counts: Tensor  # [n] int32
    k: int


def inside_topk(entries: Entries, selected: Tensor) -> Tensor:
    """`[n, M]`: the logits of the top-k ids, each id once, -inf elsewhere."""
    counted = entries.in_topk.clone()
    counted[:, 1:].logical_and_(~(entries.repeats[:, 1:] & entries.in_topk[:, :-1]))
    return selected.where(counted, -torch.inf)


def merge_tail(state: State, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(base, lse - base, log of the tail's share)`, all `[n]`, from the tail's state and the logits inside the top k.

    The base is the row's largest logit: a log-probability is `(z - base) - (lse - base)`, which loses nothing when all
    logits are large. The share is `log(1 / (1 + e^(inside - tail)))`: it keeps its digits when the tail holds nearly
    everything, where a difference of two lse would not.
    """
    base = torch.cat([inside, state.max[:, None]], 1).amax(1)
    base = base.masked_fill(base == -torch.inf, 0)
    lse_tail = state.max - base + state.sum.log().to(base.dtype)
    lse_inside = (inside - base[:, None]).logsumexp(1)
    return base, torch.logaddexp(lse_tail, lse_inside), torch.nn.functional.logsigmoid(lse_tail - lse_inside)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def run_forward(tiles: Tiles, plan: Plan, buffer: Tensor) -> State:
    state = State.new(plan.rows, tiles.entries.ids.shape[1], tiles.hidden)
    for first, columns in tiles.forward_parts(plan):
        tiles.forward(first, columns, state, tiles.retained(plan, first, columns, buffer))
    return state


def run_backward(tiles: Tiles, plan: Plan, buffer: Tensor, coefficients: Coefficients, grads: Grads) -> None:
    for first, columns in tiles.backward_parts(plan):
        tiles.backward(first, columns, coefficients, grads, tiles.retained(plan, first, columns, buffer))


def run_topk(tiles: Tiles, plan: Plan, best: Best) -> State:
    state = State.new(plan.rows, tiles.entries.ids.shape[1], tiles.hidden)
    for first, columns in plan.tiles:
        tiles.topk(first, columns, state, best)
    return state

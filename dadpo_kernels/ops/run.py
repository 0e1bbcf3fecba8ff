"""How a pass runs: its backend, the memory it may keep, how exact its gradient is; and the plan that follows."""

from dataclasses import dataclass

import torch

from .backends.registry import BACKENDS, check_name, resolve
from .live.plan import LivePlan, live_buffer_bytes, make_live_plan
from .plan import Plan, make_plan

DEFAULT_MEMORY_BUDGET = 256 * 2**20


@dataclass(frozen=True)
class Run:
    """The options of a pass that change its cost and not what it computes (but for `grad_tolerance`).

    Attributes:
        backend: a name of `backends.registry.BACKENDS`, "reference" or "auto".
        memory_budget: bytes the forward may keep for the backward; 0 keeps nothing, None means 256 MiB.
        grad_tolerance: relative error allowed in the gradient of the logits, in (0, 1); None for exact gradients.

    Raises:
        ValueError: a backend that is not known, a negative budget, a tolerance outside (0, 1).
    """

    backend: str = "auto"
    memory_budget: int | None = None
    grad_tolerance: float | None = None

    def __post_init__(self) -> None:
        check_name(self.backend)
        if self.memory_budget is not None and self.memory_budget < 0:
            raise ValueError(f"memory_budget={self.memory_budget} is negative; pass bytes, 0 to keep nothing, or None")
        if self.grad_tolerance is not None and not 0 < self.grad_tolerance < 1:
            raise ValueError(
                f"grad_tolerance={self.grad_tolerance} must lie in (0, 1): it bounds a relative error, and 1e-3 is "
                "about that of bfloat16; pass None for exact gradients"
            )

    @property
    def budget_bytes(self) -> int:
        """`memory_budget`, or its default."""
        return DEFAULT_MEMORY_BUDGET if self.memory_budget is None else self.memory_budget

    def resolve(self, device: torch.device, dtype: torch.dtype) -> str:
        """The backend of a call with tensors of this device and dtype."""
        return resolve(self.backend, device, dtype)

    def buffer_bytes(self, tokens: int, vocab: int, dtype: torch.dtype, backend: str) -> int:
        """Size of the buffer that the forward fills for the backward: the budget, or less if less can be used.

        Known from shapes alone, before masked tokens are counted, so that a compiler can trace it.
        """
        if self.grad_tolerance is not None:
            return live_buffer_bytes(tokens, vocab, dtype.itemsize, self.budget_bytes)
        if not BACKENDS[backend].tiles.retained_step(vocab, dtype):
            return 0
        columns = vocab + 512  # padding of the tiles' rows, and a base for each group of columns
        everything = tokens * (columns * dtype.itemsize + columns // 16) + columns // 4
        return min(self.budget_bytes, everything)


def exact_plan(
    backend: str,
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    memory_budget: int,
    grad_hidden: bool = True,
    grad_weight: bool = True,
) -> Plan:
    """The exact plan of a pass of `rows` tokens on a backend; see `plan_for`."""
    tiles = BACKENDS[backend].tiles
    tile = min(tiles.tile_columns(rows, width, dtype), vocab)

    def retained_bytes(columns: int) -> int:
        return tiles.retained_bytes(rows, columns, tile, dtype)

    step = tiles.retained_step(tile, dtype)
    return make_plan(rows, vocab, tile, step, retained_bytes, memory_budget, grad_hidden, grad_weight)


def plan_for(
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    *,
    backend: str,
    memory_budget: int | None = None,
    grad_tolerance: float | None = None,
    tokens: int | None = None,
    grad_hidden: bool = True,
    grad_weight: bool = True,
) -> Plan | LivePlan:
    """The plan a call of `linear_selected_logps` takes: `print` it, or read its `units` and `retained_bytes`.

    Args:
        rows: tokens that are not masked.
        vocab, width: V and H of the head.
        dtype: of hidden and weight.
        backend: the name of one, such as "cpu".
        memory_budget, grad_tolerance: as in `linear_selected_logps`; with a tolerance it is a `LivePlan`.
        tokens: with the masked ones, for which the live plan's buffer has room; None: as many as `rows`.
        grad_hidden, grad_weight: which gradients are wanted; a frozen head has `grad_weight=False`.

    Raises:
        ValueError: a backend that is not known or has no plans, fewer tokens than rows, or options that
            `linear_selected_logps` refuses.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    tokens = rows if tokens is None else tokens
    if tokens < rows:
        raise ValueError(f"tokens={tokens} must be at least rows={rows}, the tokens that are not masked")
    run = Run(backend, memory_budget, grad_tolerance)
    if grad_tolerance is None or not (grad_hidden or grad_weight):
        return exact_plan(backend, rows, vocab, width, dtype, run.budget_bytes, grad_hidden, grad_weight)
    buffer_bytes = run.buffer_bytes(tokens, vocab, dtype, backend)
    return make_live_plan(tokens, rows, vocab, width, dtype.itemsize, buffer_bytes, grad_tolerance)

"""What a forward and backward of the loss takes beside its inputs, before anything is run."""

from dataclasses import dataclass

import torch

from .backends.base import statistic_dtype
from .backends.registry import BACKENDS
from .plan import Plan
from .selected_logps import plan_for


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes of `linear_selected_logps`, forward and backward, beside hidden, weight and targets.

    Attributes:
        plan: what is retained, and the cost in matrix products (`plan.units`).
        gradients: of hidden and weight, as autograd returns them.
        workspace: of one tile of the vocabulary, the float32 accumulator of hidden's gradient, the compacted hidden
            states, and the `[N, K + 2]` numbers.
        logits: of `[N, V]` in float32, for comparison: what is never held.
    """

    plan: Plan
    gradients: int
    workspace: int
    logits: int

    @property
    def total(self) -> int:
        return self.gradients + self.plan.retained_bytes + self.workspace


def estimate_memory(
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    *,
    k: int = 0,
    tokens: int | None = None,
    backend: str = "torch",
    memory_budget: int | None = None,
    frozen_head: bool = False,
) -> MemoryEstimate:
    """Peak memory and cost of a pass with these shapes.

    Args:
        rows: tokens that are not masked.
        vocab, width: V and H of the head.
        dtype: of hidden and weight.
        k: top-k ids of a token.
        tokens: with the masked ones; None: as many as `rows`.
        backend: a name of `dadpo_kernels.ops.backends.registry.BACKENDS`.
        memory_budget: bytes, None for the default.
        frozen_head: the weight needs no gradient.

    Raises:
        ValueError: a backend that is not known or not built here, or numbers that are not positive.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    for name, value, least in (("rows", rows, 1), ("vocab", vocab, 1), ("width", width, 1), ("k", k, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    tokens = rows if tokens is None else tokens
    if tokens < rows:
        raise ValueError(f"tokens={tokens} must be at least rows={rows}, the tokens that are not masked")
    plan = plan_for(
        rows, vocab, width, dtype, backend=backend, memory_budget=memory_budget, grad_weight=not frozen_head
    )
    wide = statistic_dtype(dtype).itemsize
    gradients = (tokens + (0 if frozen_head else vocab)) * width * dtype.itemsize
    tile = BACKENDS[backend].tiles.workspace_bytes(rows, plan.tile, width, dtype, not frozen_head)
    # The tiles and the copy of the valid tokens are gone before the accumulator is spread over all tokens.
    during = tile + (rows * width * dtype.itemsize if tokens > rows else 0) - tokens * width * dtype.itemsize
    after = rows * width * dtype.itemsize if dtype.itemsize < wide else 0
    numbers = tokens * (k + 2) * 4 * wide + rows * (k + 2) * 8 * wide  # kept, and while coefficients are made
    workspace = rows * width * wide + max(during, after) + numbers
    return MemoryEstimate(plan, gradients, workspace, rows * vocab * 4)

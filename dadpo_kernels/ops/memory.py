"""Memory that a forward and backward of the loss takes in addition to its inputs, before anything is run."""

from dataclasses import dataclass

import torch

from .backends.base import accumulator_dtype
from .backends.registry import BACKENDS
from .live.plan import LivePlan
from .plan import Plan
from .run import Run, plan_for


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes of `linear_selected_logps`, forward and backward, in addition to hidden, weight and targets.

    Attributes:
        plan: what is retained, and the cost in matrix products (`plan.units`). Of a live plan both depend on the data:
            the bytes are the most that it takes, the products the fewest.
        gradients: of hidden and weight, as autograd returns them.
        workspace: of one tile of the vocabulary (of one chunk in a live plan), the float32 accumulator of hidden's
            gradient, the compacted hidden states, and the `[N, K + 2]` numbers; on GPUs also what the buffer for
            retained exponentials has beyond them, since it is allocated before masked tokens are counted.
        logits: of `[N, V]` in float32, for comparison: what is never held.
    """

    plan: Plan | LivePlan
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
    grad_tolerance: float | None = None,
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
        memory_budget, grad_tolerance: as in `linear_selected_logps`.
        frozen_head: the weight needs no gradient.

    Raises:
        ValueError: a backend that is not known, or a number out of range.
    """
    for name, value, least in (("rows", rows, 1), ("vocab", vocab, 1), ("width", width, 1), ("k", k, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    tokens = rows if tokens is None else tokens
    plan = plan_for(
        rows, vocab, width, dtype, backend=backend, memory_budget=memory_budget, grad_tolerance=grad_tolerance,
        tokens=tokens, grad_weight=not frozen_head,
    )  # fmt: skip
    wide = accumulator_dtype(dtype).itemsize
    gradients = (tokens + (0 if frozen_head else vocab)) * width * dtype.itemsize
    accumulator = rows * width * wide  # of hidden's gradient
    compacted = rows * width * dtype.itemsize if tokens > rows else 0
    # Kept from the forward, and while coefficients are made.
    numbers = tokens * (k + 2) * 4 * wide + rows * (k + 2) * 8 * wide
    if isinstance(plan, LivePlan):
        forward, during = BACKENDS[backend].live.workspace_bytes(plan, width, dtype, not frozen_head)
        during = max(during, forward - gradients - accumulator)  # the forward has no gradients yet
    else:
        during = BACKENDS[backend].tiles.workspace_bytes(rows, plan.tile, width, dtype, not frozen_head)
    # The tiles and the copy of the valid tokens are gone before the accumulator is spread over all tokens.
    during += compacted - tokens * width * dtype.itemsize
    after = rows * width * dtype.itemsize if dtype.itemsize < wide else 0
    workspace = accumulator + max(during, after) + numbers
    on_gpu = "cpu" not in BACKENDS[backend].devices  # a CPU's pages that nothing touched are no memory
    if on_gpu and not isinstance(plan, LivePlan):
        workspace += Run(backend, memory_budget).buffer_bytes(tokens, vocab, dtype, backend) - plan.retained_bytes
    return MemoryEstimate(plan, gradients, workspace, rows * vocab * 4)

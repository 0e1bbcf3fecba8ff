"""Who is timed: functions from `(hidden, weight, labels, topk_ids)` to a scalar that has gradients.

The scalar is the mean of the labels' log-probabilities and, with top-k ids, of the top k's and the tail's. Rivals that
know cross-entropy alone take part without top-k ids only, and get masked tokens removed where they do not remove them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dadpo_kernels import linear_selected_logps
from dadpo_kernels.backends import BACKENDS

from ..cases import IGNORE_INDEX
from ..variants import RETAIN_EVERYTHING, dense_logps, trl_logps

Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
COMPILED = "torch.compile"
PLANS = {"recompute": 0, "retain": RETAIN_EVERYTHING}


def mean_of(label: Tensor, *topk_and_tail: Tensor) -> Tensor:
    return -label.mean() - sum(x.mean() for x in topk_and_tail)


def ours(backend: str, budget: int) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
        out = linear_selected_logps(hidden, weight, labels, topk_ids, backend=backend, memory_budget=budget)
        return mean_of(*out) if topk_ids is not None else mean_of(out.label)

    return loss


def compacted(function: Callable[..., Tensor]) -> Loss:
    """Removes masked tokens first."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
        valid = (labels != IGNORE_INDEX).nonzero()[:, 0]
        return function(hidden[valid], weight, labels[valid], None if topk_ids is None else topk_ids[valid])

    return loss


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
    return mean_of(*dense_logps(hidden, weight, labels, topk_ids))


def compiled_eager() -> Loss:
    """Compiled anew: of one function PyTorch keeps eight compilations, and runs it as it is for a ninth shape."""
    torch.compiler.reset()
    return compacted(torch.compile(eager, dynamic=False))


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut_cross_entropy(impl: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, IGNORE_INDEX, impl=impl)

    return loss


def trl(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
    return mean_of(trl_logps(hidden, weight, labels))


def contenders(device: torch.device, dtype: torch.dtype, top_k: int) -> dict[str, Loss]:
    """Ours in every backend that takes these tensors and in every plan, then the rivals."""
    found: dict[str, Loss] = {}
    for name, backend in BACKENDS.items():
        if backend.obstacle(device, dtype) is None:
            found |= {f"dadpo-kernels {name}, {plan}": ours(name, budget) for plan, budget in PLANS.items()}
    found["PyTorch eager"] = compacted(eager)
    if device.type != "cuda":  # the rest is Triton's, theirs or a compiler's
        return found
    found[COMPILED] = compiled_eager()
    if not top_k:
        found |= {
            "TRL chunked": compacted(trl),
            "Liger": compacted(liger),
            "cce": cut_cross_entropy("cce"),
            "cce_exact": cut_cross_entropy("cce_exact"),
        }
    return found

"""Who is timed: functions from `(hidden, weight, labels, topk_ids)` to a scalar that has gradients.

The scalar is the mean of the labels' log-probabilities and, with top-k ids, of the top k's and the tail's. Rivals that
know cross-entropy alone take part without top-k ids only, and get masked tokens removed where they do not remove them.
"""

from collections.abc import Callable

from torch import Tensor

from benchmarks.cases import IGNORE_INDEX
from benchmarks.gpu_suite.settings import PLANS, Settings
from benchmarks.gpu_suite.timing import Unavailable
from benchmarks.variants import dense_logps, trl_logps
from dadpo_kernels import linear_selected_logps

Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
EAGER = "PyTorch eager"


def mean_of(label: Tensor, *topk_and_tail: Tensor) -> Tensor:
    return -label.mean() - sum(x.mean() for x in topk_and_tail)


def ours(s: Settings, backend: str, plan: str) -> Loss:
    """Of this package.

    Raises:
        Unavailable: the backend cannot run here.
    """
    options = {"backend": s.backend(backend), "memory_budget": PLANS[plan]}

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
        out = linear_selected_logps(hidden, weight, labels, topk_ids, **options)
        return mean_of(*out) if topk_ids is not None else mean_of(out.label)

    return loss


def our_name(backend: str, plan: str) -> str:
    return f"dadpo-kernels {backend}, {plan}"


def compacted(function: Callable[..., Tensor]) -> Loss:
    """Removes masked tokens first."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
        valid = (labels != IGNORE_INDEX).nonzero()[:, 0]
        return function(hidden[valid], weight, labels[valid], None if topk_ids is None else topk_ids[valid])

    return loss


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
    return mean_of(*dense_logps(hidden, weight, labels, topk_ids))


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


def quack(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    # Untuned: its tuning compiles dozens of kernels for each shape.
    return chunked_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE_INDEX, tuned=False)


# By the call of the suite that has room for their wheels.
RIVALS: dict[str, dict[str, Loss]] = {
    "first": {
        "Liger": compacted(liger),
        "cce": cut_cross_entropy("cce"),
        "cce_exact": cut_cross_entropy("cce_exact"),
        "TRL chunked": compacted(trl),
    },
    "second": {"QuACK, untuned": quack},
}


def rival(s: Settings, call: str, name: str) -> Loss:
    """One of `RIVALS`, or PyTorch with full logits.

    Raises:
        Unavailable: it runs on a GPU alone.
    """
    if name == EAGER:
        return compacted(eager)
    if s.dry:
        raise Unavailable("it needs a GPU")
    return RIVALS[call][name]

"""What is compared: this package's plans and its rivals, each as a function from inputs to the scalar loss.

The objectives are

- `dpo`: daDPO's pair loss, sigmoid, mean over pairs. The rivals know only DPO and compute it through the mixture
  identity, `beta = beta_ref + beta_teacher` against the weighted mean of both references: the same number;
- `dpo+kl`: that plus `KL_WEIGHT` times the mean forward KL over the teacher's top-64 and the tail;
- `ce`: the mean cross-entropy of the labels, for the one rival that can do nothing else in a single fused call. It is
  less work than `dpo` (its gradient is known in the forward) and is marked as such wherever it is shown.

Where a rival leaves a choice, it is given the better one: masked tokens are removed for it (except in the row that
shows what TRL does by itself on a CPU), TRL is asked for log-probabilities alone, and Liger is spared its reference
model. `tests/benchmarks/test_cases.py` holds all of them against each other in value and gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BETA_REF, BETA_TEACHER, IGNORE_INDEX, KL_WEIGHT, Inputs
from dadpo_kernels import linear_dadpo_loss

BETA = BETA_REF + BETA_TEACHER
OBJECTIVES = ("dpo", "dpo+kl", "ce")
RETAIN_EVERYTHING = 1 << 40
LIVE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Variant:
    label: str
    objectives: tuple[str, ...]
    loss: Callable[[Inputs, str], Tensor]
    ours: bool = False
    frozen: bool = False  # the head's weight requires no gradient
    tolerance: float = 0.0  # relative error of the logits' gradient it may have beyond rounding
    memory_budget: int | None = None  # of an exact plan of ours, bytes; None is the default


def pair_loss(inputs: Inputs, label_logps: Tensor) -> Tensor:
    """Sigmoid DPO from the valid tokens' log-probabilities `[N]`, in order."""
    token_logps = label_logps.new_zeros(inputs.labels.shape).masked_scatter(
        inputs.valid.view_as(inputs.labels), label_logps
    )
    chosen, rejected = (token_logps.sum(-1) - inputs.mixture_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def tail_kl(inputs: Inputs, topk: Tensor, tail: Tensor) -> Tensor:
    """Mean forward KL over K+1 outcomes, from the student's log-probabilities `[N, K]` and `[N]`."""
    teacher = torch.cat([inputs.teacher.topk_logps, inputs.teacher.topk_tail[..., None]], -1)
    teacher = teacher.flatten(0, 1)[inputs.valid].to(topk.dtype)
    student = torch.cat([topk, tail[:, None]], -1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def loss_from_logps(inputs: Inputs, objective: str, label: Tensor, *topk_and_tail: Tensor) -> Tensor:
    """Any of `OBJECTIVES` from the valid tokens' log-probabilities; `dpo+kl` needs all three."""
    if objective == "ce":
        return -label.mean()
    loss = pair_loss(inputs, label)
    return loss + KL_WEIGHT * tail_kl(inputs, *topk_and_tail) if objective == "dpo+kl" else loss


def dense_logps(hidden: Tensor, weight: Tensor, labels: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, ...]:
    """Label and, given `topk_ids`, top-k and tail log-probabilities from full logits; softmax in float32 at least."""
    logits = F.linear(hidden, weight)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    label = logps.gather(1, labels[:, None])[:, 0]
    if topk_ids is None:
        return (label,)
    return label, logps.gather(1, topk_ids), logps.scatter(1, topk_ids, -torch.inf).logsumexp(-1)


def dense(inputs: Inputs, objective: str) -> Tensor:
    valid = inputs.valid
    hidden, labels = inputs.hidden.flatten(0, 1)[valid], inputs.labels.flatten()[valid]
    topk_ids = inputs.teacher.topk_ids.flatten(0, 1)[valid].long() if objective == "dpo+kl" else None
    return loss_from_logps(inputs, objective, *dense_logps(hidden, inputs.weight, labels, topk_ids))


def ours(memory_budget: int | None, grad_tolerance: float | None = None) -> Callable[[Inputs, str], Tensor]:
    def loss(inputs: Inputs, objective: str) -> Tensor:
        return linear_dadpo_loss(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            ref_logps=inputs.ref_logps,
            teacher=inputs.teacher,
            beta_ref=BETA_REF,
            beta_teacher=BETA_TEACHER,
            kl_weight=KL_WEIGHT if objective == "dpo+kl" else 0.0,
            ignore_index=IGNORE_INDEX,
            memory_budget=memory_budget,
            grad_tolerance=grad_tolerance,
        ).loss

    return loss


def liger(inputs: Inputs, objective: str) -> Tensor:
    """One pair at a time, compiled, as by default. Reference-free: see `benchmarks.cases` on why that is the same."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, _ = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)(inputs.weight, inputs.hidden, inputs.labels)
    return loss


def trl_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[
        0
    ]


def trl_every_token(inputs: Inputs, objective: str) -> Tensor:
    """TRL removes masked tokens only where Triton runs; on a CPU it projects all of them and masks afterwards."""
    labels = inputs.labels.flatten()
    logps = trl_logps(inputs.hidden.flatten(0, 1), inputs.weight, labels.clamp(min=0))
    return pair_loss(inputs, logps[inputs.valid])


def trl_compacted(inputs: Inputs, objective: str) -> Tensor:
    valid = inputs.valid
    logps = trl_logps(inputs.hidden.flatten(0, 1)[valid], inputs.weight, inputs.labels.flatten()[valid])
    return pair_loss(inputs, logps)


def torch_linear_cross_entropy(inputs: Inputs, objective: str) -> Tensor:
    """`reduction="mean"` computes the gradient in the forward and can only do cross-entropy; with `"none"` the
    per-token losses carry gradients, and so DPO can be built on them.
    """
    valid = inputs.valid
    reduction = "mean" if objective == "ce" else "none"
    losses = F.linear_cross_entropy(
        inputs.hidden.flatten(0, 1)[valid],
        inputs.weight,
        inputs.labels.flatten()[valid],
        reduction=reduction,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return losses if objective == "ce" else pair_loss(inputs, -losses)


def cut_cross_entropy(inputs: Inputs, objective: str) -> Tensor:
    """Its Triton kernels need a GPU; this is the compiled fallback it ships for other machines."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, IGNORE_INDEX, reduction="none", impl="torch_compile"
    )
    return pair_loss(inputs, -losses.flatten()[inputs.valid])


BOTH = ("dpo", "dpo+kl")


def exact_plan(label: str, memory_budget: int | None) -> Variant:
    return Variant(f"dadpo-kernels, {label}", BOTH, ours(memory_budget), ours=True, memory_budget=memory_budget)


VARIANTS = {
    "recompute": exact_plan("recompute (budget 0)", 0),
    "default": exact_plan("default budget", None),
    "retain": exact_plan("retain", RETAIN_EVERYTHING),
    "live": Variant(
        f"dadpo-kernels, live, tolerance {LIVE_TOLERANCE:g}",
        BOTH,
        ours(None, LIVE_TOLERANCE),
        ours=True,
        tolerance=LIVE_TOLERANCE,
    ),
    "frozen": replace(exact_plan("frozen head", None), frozen=True),
    "dense": Variant("PyTorch, full logits", BOTH, dense),
    "liger": Variant("Liger", ("dpo",), liger),
    "trl": Variant("TRL, every token", ("dpo",), trl_every_token),
    "trl-compacted": Variant("TRL, masked tokens removed for it", ("dpo",), trl_compacted),
    "torch-lce": Variant("PyTorch linear_cross_entropy", ("dpo", "ce"), torch_linear_cross_entropy),
    "cce": Variant("Cut Cross Entropy, torch path", ("dpo",), cut_cross_entropy),
}


def find_variant(name: str) -> Variant:
    """A variant by its name in `VARIANTS`, or `budget=BYTES` for this package at that budget; then maybe `,frozen`."""
    base, comma, option = name.partition(",")
    if comma and option == "frozen":
        return replace(find_variant(base), label=f"{find_variant(base).label}, frozen head", frozen=True)
    if name.startswith("budget="):
        return exact_plan(name, int(name.removeprefix("budget=")))
    if name not in VARIANTS:
        known = f"{', '.join(VARIANTS)}, or budget=BYTES, and after it ,frozen for a frozen head"
        raise ValueError(f"variant {name!r} is unknown: use one of {known}")
    return VARIANTS[name]

"""How far a student's next-token distribution is from its teacher's, given top-k ids and the tail only."""

import math
from typing import get_args

import torch
from torch import Tensor

from .options import DivergenceKind, Support


def topk_divergence(
    student_topk: Tensor,
    student_tail: Tensor,
    teacher_topk: Tensor,
    teacher_tail: Tensor,
    *,
    kind: DivergenceKind = "forward_kl",
    support: Support = "tail",
    js_mix: float = 0.5,
    kd_temperature: float = 1.0,
) -> Tensor:
    """Divergence between teacher `p` and student `q`, known on the top-k ids and as the mass of all the others.

    | `kind`       | value                                                           |
    |--------------|-----------------------------------------------------------------|
    | `forward_kl` | `KL(p ‖ q) = Σ p (log p - log q)`                               |
    | `reverse_kl` | `KL(q ‖ p)`                                                     |
    | `js`         | `w KL(p ‖ m) + (1-w) KL(q ‖ m)`, `m = w p + (1-w) q` with `w = js_mix` |

    | `support`      | the sum runs over                                                                            |
    |----------------|----------------------------------------------------------------------------------------------|
    | `tail`         | K+1 outcomes, the tail as one bucket: a true divergence and a lower bound of the full one    |
    | `renormalized` | the K ids, both sides renormalised on them: blind to the mass the student puts elsewhere     |
    | `truncated`    | the K ids as they are: can be negative, and its minimiser leaves the student no tail at all  |

    `js` is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, Eq. 1); TRL calls its weight `beta`.
    Log-probabilities of `-inf` count by their limit, `0 log 0 = 0`, in the value and in the gradient; an outcome that
    is possible on the left of a KL and impossible on its right makes it `inf`. Nothing is clamped. All four arguments
    are differentiable.

    Args:
        student_topk: `[..., K]` float, `log q` of the ids, in nats. K may be 0. Half precision is widened to float32.
        student_tail: `[...]`, log of the student's mass outside the ids.
        teacher_topk: `[..., K]`, `log p` of the same ids, each id once.
        teacher_tail: `[...]`, log of the teacher's mass outside the ids.
        kind: see above.
        support: see above.
        js_mix: weight `w` of the teacher in the mixture, in (0, 1). Read by `js` only.
        kd_temperature: both sides become `softmax(log-probabilities / kd_temperature)`. Only `renormalized` can do
            so: the tail at another temperature is not a function of the tail at 1. There is no factor
            `kd_temperature²` (Hinton et al., arXiv 1503.02531): put it into the weight of the loss if you want it.

    Returns:
        `[...]`, nats, float32, or float64 if the student's log-probabilities are.

    Raises:
        ValueError: unknown `kind` or `support`, `js_mix` or `kd_temperature` out of range, shapes that differ.
    """
    check_divergence_options(kind, support, js_mix, kd_temperature)
    for name, given, needed in (
        ("teacher_topk", teacher_topk, student_topk.shape),
        ("student_tail", student_tail, student_topk.shape[:-1]),
        ("teacher_tail", teacher_tail, student_topk.shape[:-1]),
    ):
        if given.shape != needed:
            raise ValueError(
                f"{name} has shape {list(given.shape)}, {list(needed)} is needed: "
                f"student_topk has {list(student_topk.shape)}, ids in its last dimension"
            )
    wide = torch.promote_types(student_topk.dtype, torch.float32)
    q, p = student_topk.to(wide), teacher_topk.to(wide)
    if support == "tail":
        q = torch.cat([q, student_tail.to(wide)[..., None]], dim=-1)
        p = torch.cat([p, teacher_tail.to(wide)[..., None]], dim=-1)
    elif support == "renormalized":
        q, p = (q / kd_temperature).log_softmax(-1), (p / kd_temperature).log_softmax(-1)
    if kind == "forward_kl":
        return _kl(p, q)
    if kind == "reverse_kl":
        return _kl(q, p)
    # Where neither side has mass every derivative is 0, but logaddexp(-inf, -inf) has none: put any number there.
    nowhere = (p == -torch.inf) & (q == -torch.inf)
    mix = torch.logaddexp(
        p.masked_fill(nowhere, 0) + math.log(js_mix), q.masked_fill(nowhere, 0) + math.log1p(-js_mix)
    )
    return js_mix * _kl(p, mix) + (1 - js_mix) * _kl(q, mix)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`Σ p (log p - log q)` over the last dimension, terms with `p = 0` taken as 0 together with their gradients."""
    impossible = log_p == -torch.inf  # their terms would be 0 * inf, and so would their derivatives
    log_p, log_q = log_p.masked_fill(impossible, 0), log_q.masked_fill(impossible, 0)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def check_divergence_options(kind: str, support: str, js_mix: float, kd_temperature: float) -> None:
    """Raise ValueError unless `topk_divergence` knows these options and they go together."""
    if kind not in get_args(DivergenceKind):
        raise ValueError(f"unknown divergence {kind!r}: choose one of {', '.join(get_args(DivergenceKind))}")
    if support not in get_args(Support):
        raise ValueError(f"unknown support {support!r}: choose one of {', '.join(get_args(Support))}")
    if not 0 < js_mix < 1:
        raise ValueError(
            f"js_mix must be between 0 and 1, exclusive, got {js_mix}: its two ends are 'forward_kl' and 'reverse_kl'"
        )
    if not 0 < kd_temperature < math.inf:
        raise ValueError(f"kd_temperature must be positive and finite, got {kd_temperature}")
    if kd_temperature != 1 and support != "renormalized":
        raise ValueError(
            f"kd_temperature={kd_temperature} needs support='renormalized', got {support!r}: "
            "the mass outside the top-k is known at temperature 1 only"
        )

"""daDPO and the other preference losses, on the log-probabilities of whole answers."""

import math
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import require
from .options import LossType

LENGTH_NORMALIZED = ("sigmoid_norm", "ipo")
SMOOTHABLE = ("sigmoid", "sigmoid_norm", "robust")


class PreferenceLoss(NamedTuple):
    """Per pair: `losses [B]` with gradients, and the implicit rewards `chosen_rewards`, `rejected_rewards` without."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dadpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    teacher_chosen_logps: Tensor | None,
    teacher_rejected_logps: Tensor | None,
    *,
    beta_ref: float,
    beta_teacher: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> PreferenceLoss:
    """Distribution-aware DPO (arXiv 2506.15717): DPO with a reference and a teacher, each with its own weight.

    The reward of an answer is `r = beta_ref (logp - ref) + beta_teacher (logp - teacher)`, and with the margin
    `Δ = r_chosen - r_rejected`, `ε = label_smoothing` and `β = beta_ref + beta_teacher` the loss of a pair is

    | `loss_type`    | loss                                                 | source                               |
    |----------------|------------------------------------------------------|--------------------------------------|
    | `sigmoid`      | `-(1-ε) log σ(Δ) - ε log σ(-Δ)`                      | DPO 2305.18290; ε > 0: conservative  |
    | `sigmoid_norm` | the same, each reward divided by its answer's length | TRL                                  |
    | `robust`       | `(-(1-ε) log σ(Δ) + ε log σ(-Δ)) / (1 - 2ε)`         | 2403.00409                           |
    | `hinge`        | `max(0, 1 - Δ)`                                      | SLiC 2305.10425                      |
    | `ipo`          | `(Δ/β - 1/(2β))²`, each reward divided by its length | 2310.12036, per token as TRL does it |

    This is DPO with `β` and the reference log-probabilities `(beta_ref ref + beta_teacher teacher) / β`, and names
    and formulas are those of TRL 1.16's `DPOTrainer` under that substitution (whose `sigmoid`, however, ignores the
    smoothing). `beta_teacher = 0` is DPO against the reference, `beta_ref = 0` DPO against the teacher.

    Args:
        chosen_logps, rejected_logps: `[B]` float32 or float64, the policy's `log π(answer)`, summed over its tokens.
        ref_chosen_logps, ref_rejected_logps: `[B]`, the frozen reference's. Not read if beta_ref is 0.
        teacher_chosen_logps, teacher_rejected_logps: `[B]`, the teacher's. Not read if beta_teacher is 0.
        beta_ref, beta_teacher: weights of the two KL terms, not negative, not both 0.
        loss_type: see above.
        label_smoothing: assumed probability that a label is flipped, in [0, 0.5); `sigmoid`, `sigmoid_norm`, `robust`.
        chosen_lengths, rejected_lengths: `[B]`, tokens of the answers, at least 1. Read by `sigmoid_norm` and `ipo`.

    Returns:
        PreferenceLoss of `[B]` tensors in the dtype of the inputs; nothing is averaged. The rewards are those
        above, never divided by lengths, as TRL reports them.

    Raises:
        ValueError: an argument that the options ask for is None, shapes differ, or an option is out of range.
        TypeError: a log-probability in half precision, which cannot hold the sum over an answer.
    """
    check_preference_options(beta_ref, beta_teacher, loss_type, label_smoothing)
    beta = beta_ref + beta_teacher
    if beta == 0:
        raise ValueError("beta_ref and beta_teacher are both 0, which leaves a constant: make one of them positive")
    _check_logps("chosen_logps", chosen_logps, chosen_logps)
    _check_logps("rejected_logps", rejected_logps, chosen_logps)
    chosen = rejected = torch.zeros_like(chosen_logps)
    # Rewards: what the policy's log-probability exceeds each of the others by, weighted.
    for weight, name, other_chosen, other_rejected in (
        (beta_ref, "ref", ref_chosen_logps, ref_rejected_logps),
        (beta_teacher, "teacher", teacher_chosen_logps, teacher_rejected_logps),
    ):
        if weight == 0:
            continue
        if other_chosen is None or other_rejected is None:
            raise ValueError(f"beta_{name}={weight} needs {name}_chosen_logps and {name}_rejected_logps, got None")
        _check_logps(f"{name}_chosen_logps", other_chosen, chosen_logps)
        _check_logps(f"{name}_rejected_logps", other_rejected, chosen_logps)
        chosen = chosen + weight * (chosen_logps - other_chosen)
        rejected = rejected + weight * (rejected_logps - other_rejected)
    # The margin, per token where the loss is.
    margin = chosen - rejected
    if loss_type in LENGTH_NORMALIZED:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"loss_type={loss_type!r} needs chosen_lengths and rejected_lengths, got None")
        _check_lengths("chosen_lengths", chosen_lengths, chosen_logps)
        _check_lengths("rejected_lengths", rejected_lengths, chosen_logps)
        margin = chosen / chosen_lengths - rejected / rejected_lengths
    return PreferenceLoss(_pair_loss(margin, beta, loss_type, label_smoothing), chosen.detach(), rejected.detach())


def _pair_loss(margin: Tensor, beta: float, loss_type: LossType, label_smoothing: float) -> Tensor:
    if loss_type == "hinge":
        return torch.relu(1 - margin)
    if loss_type == "ipo":
        return ((margin - 0.5) / beta) ** 2
    kept, flipped = (1 - label_smoothing) * F.logsigmoid(margin), label_smoothing * F.logsigmoid(-margin)
    if loss_type == "robust":
        return (flipped - kept) / (1 - 2 * label_smoothing)
    return -kept - flipped


def _check_logps(name: str, logps: Tensor, like: Tensor) -> None:
    check_sum_dtype(name, logps)
    if logps.dim() != 1 or logps.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(logps.shape)}: one number per pair is needed, as many as chosen_logps has "
            f"({list(like.shape)})"
        )


def _check_lengths(name: str, lengths: Tensor, like: Tensor) -> None:
    if lengths.shape != like.shape:
        raise ValueError(f"{name} has shape {list(lengths.shape)}, one length per pair is needed, {list(like.shape)}")
    require(lengths > 0, lengths, name, "a reward per token needs at least one token")


def check_sum_dtype(name: str, logps: Tensor) -> None:
    """Raise TypeError unless `logps`, sums over whole answers, are float32 or float64."""
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} is {logps.dtype}: a sum over an answer needs float32 or float64, "
            "or its rounding is as large as the margins between answers"
        )


def check_preference_options(beta_ref: float, beta_teacher: float, loss_type: str, label_smoothing: float) -> None:
    """Raise ValueError unless `dadpo_loss` knows these options and they go together."""
    for name, beta in (("beta_ref", beta_ref), ("beta_teacher", beta_teacher)):
        if not 0 <= beta < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {beta}: 0 switches its term off")
    if loss_type not in get_args(LossType):
        raise ValueError(f"unknown loss_type {loss_type!r}: choose one of {', '.join(get_args(LossType))}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}: it is the probability of a flipped label"
        )
    if label_smoothing and loss_type not in SMOOTHABLE:
        raise ValueError(
            f"loss_type={loss_type!r} has no label smoothing, got {label_smoothing}: "
            f"leave it at 0 or choose one of {', '.join(SMOOTHABLE)}"
        )

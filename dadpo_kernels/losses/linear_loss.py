"""From hidden states to the loss: one call of the primitive, then the objective on `[2B]` and `[2B, T, K]` numbers."""

import math
from typing import Any, NamedTuple, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..ops.checks import is_logp, require
from ..ops.head import Head, HeadOptions
from ..ops.run import Run
from ..ops.selected_logps import SelectedLogps, selected_logps_of
from .divergence import check_divergence_options, topk_divergence
from .options import DivergenceKind, LossType, Sides, Support
from .preference import check_preference_options, check_sum_dtype, dadpo_loss
from .targets import TeacherTargets


class DaDPOOutput(NamedTuple):
    """`loss`, a scalar with gradients, and `metrics`, detached scalars (on the loss's device) by TRL's names."""

    loss: Tensor
    metrics: dict[str, Tensor]


def pair_counts(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """What the terms of `linear_dadpo_loss` are means over: `[pairs, chosen tokens, rejected tokens]`, int64 `[3]`.

    Counts of several batches add up, across micro-batches and across ranks (one `all_reduce`).

    Args:
        labels: `[2B, T]`, chosen rows first; tokens are the positions that differ from `ignore_index`. A pair counts
            if both its answers have a token.

    Raises:
        ValueError: labels that are not the rows of pairs.
    """
    _check_labels(labels)
    lengths = (labels != ignore_index).sum(-1)
    chosen, rejected = lengths.chunk(2)
    return torch.stack([((chosen > 0) & (rejected > 0)).sum(), chosen.sum(), rejected.sum()])


def linear_dadpo_loss(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    *,
    ref_logps: Tensor | None = None,
    teacher: TeacherTargets | None = None,
    beta_ref: float,
    beta_teacher: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    kl_weight: float = 0.0,
    kl_on: Sides = "both",
    divergence: DivergenceKind = "forward_kl",
    support: Support = "tail",
    js_mix: float = 0.5,
    kd_temperature: float = 1.0,
    counts: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    grad_tolerance: float | None = None,
    vocab_group: ProcessGroup | None = None,
    **head_options: Unpack[HeadOptions],
) -> DaDPOOutput:
    """Preference loss, token-level distillation and SFT on a batch of pairs, without `[tokens, vocabulary]` logits.

        loss = mean over pairs of dadpo_loss                                            unless both betas are 0
             + kl_weight  * mean over the answer tokens of `kl_on` of topk_divergence   unless kl_weight is 0
             + sft_weight * mean over the chosen answers' tokens of -log π(token)       (TRL's `sft`)

    A term whose weight is 0 costs nothing and its metrics are absent. With both betas 0 this is plain distillation.

    *Masks.* A position counts where its label is not `ignore_index`; nothing is read anywhere else. The preference
    term is the mean over the pairs whose answers both have a token: against an empty answer there is no preference,
    only a push of the other one up or down. The tokens of such a pair still count in the other two terms. A term
    with nothing to average is 0, with zero gradients.

    *Gradient accumulation.* By default the means are over this batch. To make the gradients of micro-batches add up to
    the gradient of the whole batch exactly, pass the whole batch's counts to each of them, and sum the losses:

        counts = sum(pair_counts(batch.labels) for batch in micro_batches)
        for batch in micro_batches:
            linear_dadpo_loss(..., counts=counts).loss.backward()

    Over ranks whose gradients are averaged, all-reduce the counts and divide them by the number of ranks. The metrics
    are divided by the same counts, so they add up as the loss does (`counts = ones(3)` gives plain sums).

    Args:
        hidden: `[2B, T, H]`, last hidden states of the policy, chosen rows first, rejected rows second.
        weight: `[V, H]`, weight of its LM head; or a `Head`, such as `lm_head(model)` gives.
        labels: `[2B, T]` integers, aligned: `hidden[i, t]` predicts `labels[i, t]`.
        ref_logps: `[2B]` float32 or float64, the frozen reference's log-probability of each whole answer. Needed if
            beta_ref is positive, else not read.
        teacher: TeacherTargets of the same rows. Needed if beta_teacher (its `label_logps`) or kl_weight (its
            `topk_*`) is positive, else not read.
        beta_ref, beta_teacher, loss_type, label_smoothing: see `dadpo_loss`; both betas may be 0 here.
        sft_weight: weight of the chosen answers' negative log-likelihood, not negative.
        kl_weight: weight of the token-level divergence from the teacher, not negative; an extension beyond the paper.
        kl_on: whose answer tokens it is taken on, `both`, `chosen` or `rejected`.
        divergence, support, js_mix, kd_temperature: see `topk_divergence` (`divergence` is its `kind`).
        ignore_index, backend, memory_budget, grad_tolerance: see `linear_selected_logps`.
        head_options: `bias`, `logit_scale`, `softcap`, `temperature`; see `Head`.
        counts: `[3]`, see above; None means `pair_counts(labels)`.
        vocab_group: the ranks over which the vocabulary is sharded: weight and bias are then this rank's rows, or
            DTensors, all else is the same on all of them, and so is the loss; see `vocab_parallel_selected_logps`.

    Returns:
        DaDPOOutput(loss, metrics). Metrics are means over pairs (`rewards/chosen`, `rewards/rejected`,
        `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`) and over the tokens of `kl_on`
        (`distill/kl`, `distill/teacher_mass`, `distill/student_mass`: the last two are the masses of the top-k).

    Raises:
        ValueError: rows that are not pairs, shapes that differ, an option unknown or out of range, a missing ref_logps
            or teacher, log-probabilities at answer tokens that are NaN, positive, or (where they enter a reward)
            infinite, teacher ids outside the student's vocabulary. On a GPU the checks of values do not wait for the
            device: they stop the program a little later, by an assertion with the same message.
        TypeError: ref_logps in half precision.
    """
    _check_options(
        beta_ref, beta_teacher, loss_type, label_smoothing, sft_weight, kl_weight, kl_on, divergence, support, js_mix,
        kd_temperature,
    )  # fmt: skip
    _check_labels(labels)
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)} and labels {list(labels.shape)}: "
            "[2B, T, H] and [2B, T] are needed, aligned so that hidden[i, t] predicts labels[i, t]"
        )
    counts = _checked_counts(counts, labels, ignore_index)
    valid = labels != ignore_index
    ref_sums = _reference_sums(ref_logps, labels).chunk(2) if beta_ref else (None, None)
    teacher_sums = _present(teacher, "beta_teacher").answer_logps(valid).chunk(2) if beta_teacher else (None, None)
    topk = _present(teacher, "kl_weight").checked_topk(valid) if kl_weight else None

    selected = _selected_logps(
        hidden, Head.of(weight, head_options), labels, None if topk is None else topk.topk_ids, ignore_index,
        Run(backend, memory_budget, grad_tolerance), vocab_group,
    )  # fmt: skip

    n_pairs, n_chosen, n_rejected = counts.unbind()
    chosen_lengths, rejected_lengths = valid.sum(-1).chunk(2)
    incomplete = (chosen_lengths == 0) | (rejected_lengths == 0)

    def pair_mean(values: Tensor) -> Tensor:
        return _ratio(values.masked_fill(incomplete, 0).sum(), n_pairs)

    # The preference term.
    chosen_logps, rejected_logps = selected.label.sum(-1).chunk(2)
    loss = chosen_logps.new_zeros(())
    metrics = {"logps/chosen": pair_mean(chosen_logps), "logps/rejected": pair_mean(rejected_logps)}
    if beta_ref or beta_teacher:
        losses, chosen_rewards, rejected_rewards = dadpo_loss(
            chosen_logps, rejected_logps, *ref_sums, *teacher_sums, beta_ref=beta_ref, beta_teacher=beta_teacher,
            loss_type=loss_type, label_smoothing=label_smoothing,
            chosen_lengths=chosen_lengths.clamp(min=1), rejected_lengths=rejected_lengths.clamp(min=1),
        )  # fmt: skip
        loss = loss + pair_mean(losses)
        metrics |= {
            "rewards/chosen": pair_mean(chosen_rewards),
            "rewards/rejected": pair_mean(rejected_rewards),
            "rewards/accuracies": pair_mean((chosen_rewards > rejected_rewards).to(losses.dtype)),
            "rewards/margins": pair_mean(chosen_rewards - rejected_rewards),
        }
    # The token-level divergence from the teacher.
    if topk is not None:
        pairs = len(labels) // 2
        rows, n_tokens = {
            "both": (slice(None), n_chosen + n_rejected),
            "chosen": (slice(pairs), n_chosen),
            "rejected": (slice(pairs, None), n_rejected),
        }[kl_on]
        masked = ~valid[rows]

        def token_mean(values: Tensor) -> Tensor:
            return _ratio(values.masked_fill(masked, 0).sum(), n_tokens)

        student, student_tail = selected.topk[rows], selected.tail[rows]
        teacher_topk, teacher_tail = topk.topk_logps[rows], topk.topk_tail[rows]
        per_token = topk_divergence(
            student, student_tail, teacher_topk, teacher_tail,
            kind=divergence, support=support, js_mix=js_mix, kd_temperature=kd_temperature,
        )  # fmt: skip
        kl = token_mean(per_token)
        loss = loss + kl_weight * kl
        metrics |= {
            "distill/kl": kl,
            "distill/teacher_mass": token_mean(teacher_topk.exp().sum(-1)),
            "distill/student_mass": token_mean(student.detach().exp().sum(-1)),
        }
    if sft_weight:
        loss = loss + sft_weight * _ratio(-chosen_logps.sum(), n_chosen)
    return DaDPOOutput(loss, {name: value.detach() for name, value in metrics.items()})


class LinearDaDPOLoss(nn.Module):
    """`linear_dadpo_loss` with its options fixed at construction, where they are checked. It has no parameters.

    The arguments are those of `linear_dadpo_loss`; the head and its options come with each call.

    Raises:
        ValueError: an option that is unknown or out of range, or options that contradict each other.
    """

    def __init__(
        self,
        beta_ref: float,
        beta_teacher: float,
        *,
        loss_type: LossType = "sigmoid",
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        kl_weight: float = 0.0,
        kl_on: Sides = "both",
        divergence: DivergenceKind = "forward_kl",
        support: Support = "tail",
        js_mix: float = 0.5,
        kd_temperature: float = 1.0,
        ignore_index: int = -100,
        backend: str = "auto",
        memory_budget: int | None = None,
        grad_tolerance: float | None = None,
    ) -> None:
        super().__init__()
        objective: dict[str, Any] = {
            "beta_ref": beta_ref,
            "beta_teacher": beta_teacher,
            "loss_type": loss_type,
            "label_smoothing": label_smoothing,
            "sft_weight": sft_weight,
            "kl_weight": kl_weight,
            "kl_on": kl_on,
            "divergence": divergence,
            "support": support,
            "js_mix": js_mix,
            "kd_temperature": kd_temperature,
        }
        _check_options(**objective)
        run = Run(backend, memory_budget, grad_tolerance)
        self.options = {**objective, "ignore_index": ignore_index, **vars(run)}

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | Head,
        labels: Tensor,
        *,
        ref_logps: Tensor | None = None,
        teacher: TeacherTargets | None = None,
        counts: Tensor | None = None,
        vocab_group: ProcessGroup | None = None,
        **head_options: Unpack[HeadOptions],
    ) -> DaDPOOutput:
        return linear_dadpo_loss(
            hidden, weight, labels, ref_logps=ref_logps, teacher=teacher, counts=counts, vocab_group=vocab_group,
            **self.options, **head_options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _selected_logps(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    topk_ids: Tensor | None,
    ignore_index: int,
    run: Run,
    vocab_group: ProcessGroup | None,
) -> SelectedLogps:
    if vocab_group is None:
        return selected_logps_of(hidden, head, labels, topk_ids, ignore_index, run)
    from ..ops.vocab_parallel import vocab_parallel_of  # here: DTensor takes as long to import as torch

    return vocab_parallel_of(hidden, head, labels, topk_ids, ignore_index, run, vocab_group)


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """A mean from its sum; the mean of nothing is 0."""
    return total / count.masked_fill(count == 0, 1)


def _check_options(
    beta_ref: float,
    beta_teacher: float,
    loss_type: str,
    label_smoothing: float,
    sft_weight: float,
    kl_weight: float,
    kl_on: str,
    divergence: str,
    support: str,
    js_mix: float,
    kd_temperature: float,
) -> None:
    check_preference_options(beta_ref, beta_teacher, loss_type, label_smoothing)
    check_divergence_options(divergence, support, js_mix, kd_temperature)
    for name, value in (("sft_weight", sft_weight), ("kl_weight", kl_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}: 0 switches its term off")
    if kl_on not in get_args(Sides):
        raise ValueError(f"unknown kl_on {kl_on!r}: choose one of {', '.join(get_args(Sides))}")
    if beta_ref == beta_teacher == sft_weight == kl_weight == 0:
        raise ValueError(
            "beta_ref, beta_teacher, sft_weight and kl_weight are all 0, which leaves no loss: "
            "make one of them positive"
        )


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 2 or len(labels) % 2:
        raise ValueError(
            f"labels has shape {list(labels.shape)}: [2B, T] is needed, the rows of B chosen answers and then those "
            "of the B rejected ones, in the same order"
        )


def _checked_counts(counts: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
    if counts is None:
        return pair_counts(labels, ignore_index)
    if counts.shape != (3,):
        raise ValueError(f"counts has shape {list(counts.shape)}: pass a sum of pair_counts(labels), shape [3]")
    return counts.to(labels.device)


def _reference_sums(ref_logps: Tensor | None, labels: Tensor) -> Tensor:
    if ref_logps is None:
        raise ValueError("beta_ref > 0 needs ref_logps, got None: capture the reference's, or set beta_ref=0")
    check_sum_dtype("ref_logps", ref_logps)
    if ref_logps.shape != labels.shape[:1]:
        raise ValueError(f"ref_logps has shape {list(ref_logps.shape)}: one sum per row of labels, [{len(labels)}]")
    ok = is_logp(ref_logps) & (ref_logps > -torch.inf)
    require(ok, ref_logps, "ref_logps", "a finite log-probability is needed for every answer, 0 for an empty one")
    return ref_logps


def _present(teacher: TeacherTargets | None, asked_by: str) -> TeacherTargets:
    if teacher is None:
        raise ValueError(f"{asked_by} > 0 needs teacher, got None: pass TeacherTargets, or set {asked_by}=0")
    return teacher

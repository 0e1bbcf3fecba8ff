"""TRL's own DPO loss, run on given per-token log-probabilities instead of a model's."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor
from trl import DPOTrainer


def trl_dpo(
    token_logps: Tensor,
    mask: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_types: list[str],
    loss_weights: list[float] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """`(loss, metrics)` of `trl.DPOTrainer._compute_loss` (TRL 1.16) with precomputed reference log-probabilities.

    `token_logps` and `mask` are `[2B, T]`, chosen rows first, the former 0 where the mask is; `ref_logps` is `[2B]`.
    """
    zeros = torch.zeros_like(token_logps)
    outputs = SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        beta=beta,
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    completion_mask = torch.cat([mask.new_zeros(len(mask), 1), mask], dim=1).long()  # TRL shifts it by one
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}

"""Options of the trainer: transformers' TrainingArguments and the loss's own."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..losses.linear_loss import LinearDaDPOLoss


@dataclass
class DaDPOConfig(TrainingArguments):
    """TrainingArguments with the loss's options; a batch size counts pairs.

    With both betas 0 there is no preference term: `sft_weight` and `kl_weight` then make a distilled-SFT stage.
    The options mean what they mean in `linear_dadpo_loss`, which also checks them.
    """

    beta_ref: float = field(
        default=0.0, metadata={"help": "Strength of the log-ratio to the frozen reference; 0 leaves it out."}
    )
    beta_teacher: float = field(
        default=0.0, metadata={"help": "Strength of the log-ratio to the teacher; 0 leaves it out."}
    )
    loss_type: str = field(
        default="sigmoid", metadata={"help": "Preference loss: sigmoid, sigmoid_norm, robust, hinge or ipo."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of flipped preferences, for sigmoid and robust."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of the chosen answers, per token."}
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence from the teacher's top-k and tail, per token."}
    )
    kl_on: str = field(
        default="both", metadata={"help": "Answers the divergence is taken on: both, chosen or rejected."}
    )
    divergence: str = field(default="forward_kl", metadata={"help": "forward_kl, reverse_kl or js."})
    support: str = field(
        default="tail",
        metadata={"help": "Outcomes compared: tail (top-k and the rest as one), renormalized or truncated."},
    )
    js_mix: float = field(default=0.5, metadata={"help": "The teacher's weight in the mixture of js, in (0, 1)."})
    kd_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both sides in the divergence; needs support=renormalized."}
    )
    backend: str = field(default="auto", metadata={"help": "Kernels of the LM head; see `dadpo doctor`."})
    memory_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes kept between forward and backward of the head to save work; default 256 MiB."},
    )
    grad_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Relative error allowed in the gradient of the logits, for about half the work; default exact. "
            "1e-3 is about bfloat16's. The error and the cost are logged as live/*."
        },
    )

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # the columns are the collator's, not the model's
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 asks for it by name
        super().__post_init__()

    def loss(self, logit_scale: float, softcap: float | None) -> LinearDaDPOLoss:
        """The loss these options describe, for a head with this scale and softcap."""
        return LinearDaDPOLoss(
            self.beta_ref,
            self.beta_teacher,
            loss_type=self.loss_type,  # type: ignore[arg-type]  # strings from a file: the loss checks them
            label_smoothing=self.label_smoothing,
            sft_weight=self.sft_weight,
            kl_weight=self.kl_weight,
            kl_on=self.kl_on,  # type: ignore[arg-type]
            divergence=self.divergence,  # type: ignore[arg-type]
            support=self.support,  # type: ignore[arg-type]
            js_mix=self.js_mix,
            kd_temperature=self.kd_temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            backend=self.backend,
            memory_budget=self.memory_budget,
            grad_tolerance=self.grad_tolerance,
        )

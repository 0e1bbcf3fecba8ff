"""Options of the losses as fields of the trainers' configurations, stated once.

Imports nothing heavy, so that `dadpo train --help` can list them at once. Types are `Literal` where there is a choice:
the parser refuses other values and the help lists them. The losses check them again, and which go together.
"""

from dataclasses import dataclass, field

from ..losses.options import DivergenceKind, LossType, Sides, Support


@dataclass
class TeacherOptions:
    """The teacher's terms, and how the LM head runs. The options mean what they mean in `linear_dadpo_loss`."""

    beta_teacher: float = field(
        default=0.0, metadata={"help": "Strength of the log-ratio to the teacher; 0 leaves it out."}
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence from the teacher's top-k and tail, per token."}
    )
    kl_on: Sides = field(default="both", metadata={"help": "Answers that the divergence is taken on."})
    divergence: DivergenceKind = field(default="forward_kl", metadata={"help": "Divergence from the teacher."})
    support: Support = field(
        default="tail",
        metadata={
            "help": "Outcomes that the divergence compares: top-k and the rest as one (tail), the top-k scaled to sum "
            "to one (renormalized), or the top-k as they are (truncated)."
        },
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


@dataclass
class LossOptions(TeacherOptions):
    """All options of `linear_dadpo_loss`, by the names of its arguments."""

    beta_ref: float = field(
        default=0.0, metadata={"help": "Strength of the log-ratio to the frozen reference; 0 leaves it out."}
    )
    loss_type: LossType = field(default="sigmoid", metadata={"help": "Preference loss."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of flipped preferences, for sigmoid, sigmoid_norm and robust."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of the chosen answers, per token."}
    )

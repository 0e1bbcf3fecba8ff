"""Fused LM-head losses for distillation: daDPO, DPO and top-k KL without holding `[tokens, vocabulary]` logits."""

from typing import TYPE_CHECKING, Any

from .divergence import topk_divergence
from .linear_loss import DaDPOOutput, LinearDaDPOLoss, linear_dadpo_loss, pair_counts
from .live_diagnostics import LiveDiagnostics, live_diagnostics
from .objective import PreferenceLoss, dadpo_loss
from .selected_logps import SelectedLogps, linear_selected_logps
from .teacher.targets import TeacherTargets
from .topk_logps import TopkLogps, linear_topk_logps

if TYPE_CHECKING:
    from .trainer import DaDPOConfig as DaDPOConfig
    from .trainer import DaDPOTrainer as DaDPOTrainer

__all__ = [
    "DaDPOOutput",
    "LinearDaDPOLoss",
    "LiveDiagnostics",
    "PreferenceLoss",
    "SelectedLogps",
    "TeacherTargets",
    "TopkLogps",
    "dadpo_loss",
    "linear_dadpo_loss",
    "linear_selected_logps",
    "linear_topk_logps",
    "live_diagnostics",
    "pair_counts",
    "topk_divergence",
]


def __getattr__(name: str) -> Any:
    """`DaDPOConfig` and `DaDPOTrainer` on first use: they need transformers, which the package must not pull in.

    For the same reason they are not in `__all__`.
    """
    if name in ("DaDPOConfig", "DaDPOTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

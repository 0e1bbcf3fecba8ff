"""Fused LM-head losses for distillation: daDPO, DPO and top-k KL without ever holding `[tokens, vocabulary]` logits."""

from .selected_logps import SelectedLogps, linear_selected_logps
from .topk_logps import TopkLogps, linear_topk_logps

__all__ = ["SelectedLogps", "TopkLogps", "linear_selected_logps", "linear_topk_logps"]

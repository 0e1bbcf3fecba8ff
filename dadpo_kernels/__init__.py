"""Fused LM-head losses for distillation: daDPO, DPO and top-k KL without holding `[tokens, vocabulary]` logits.

Every public name is here and is imported on first use, so that `import dadpo_kernels` costs nothing and what needs
torch alone never imports transformers, pyarrow or TRL.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.dataset import PairCollator as PairCollator
    from .cache.dataset import PairDataset as PairDataset
    from .cache.errors import CacheError as CacheError
    from .capture.local import capture_reference as capture_reference
    from .capture.local import capture_teacher as capture_teacher
    from .capture.pairs import read_pairs as read_pairs
    from .capture.pairs import tokenize_pairs as tokenize_pairs
    from .capture.remote import capture_from_server as capture_from_server
    from .capture.remote import capture_from_vllm as capture_from_vllm
    from .losses.divergence import topk_divergence as topk_divergence
    from .losses.linear_loss import DaDPOOutput as DaDPOOutput
    from .losses.linear_loss import LinearDaDPOLoss as LinearDaDPOLoss
    from .losses.linear_loss import linear_dadpo_loss as linear_dadpo_loss
    from .losses.linear_loss import pair_counts as pair_counts
    from .losses.preference import PreferenceLoss as PreferenceLoss
    from .losses.preference import dadpo_loss as dadpo_loss
    from .losses.targets import TeacherTargets as TeacherTargets
    from .models.forward import hidden_states as hidden_states
    from .models.lm_head import lm_head as lm_head
    from .models.packing import unpack as unpack
    from .models.patch import SelectedLogpsOutput as SelectedLogpsOutput
    from .models.patch import patch as patch
    from .ops.head import Head as Head
    from .ops.live.diagnostics import LiveDiagnostics as LiveDiagnostics
    from .ops.live.diagnostics import live_diagnostics as live_diagnostics
    from .ops.memory import MemoryEstimate as MemoryEstimate
    from .ops.memory import estimate_memory as estimate_memory
    from .ops.run import Run as Run
    from .ops.run import plan_for as plan_for
    from .ops.selected_logps import SelectedLogps as SelectedLogps
    from .ops.selected_logps import linear_selected_logps as linear_selected_logps
    from .ops.token_statistics import TokenStatistics as TokenStatistics
    from .ops.token_statistics import linear_token_statistics as linear_token_statistics
    from .ops.topk_logps import TopkLogps as TopkLogps
    from .ops.topk_logps import linear_topk_logps as linear_topk_logps
    from .ops.vocab_parallel import vocab_parallel_selected_logps as vocab_parallel_selected_logps
    from .train.config import DaDPOConfig as DaDPOConfig
    from .train.trainer import DaDPOTrainer as DaDPOTrainer
    from .train.trl.trainer import TRLDaDPOConfig as TRLDaDPOConfig
    from .train.trl.trainer import TRLDaDPOTrainer as TRLDaDPOTrainer

_MODULES = {
    "cache.dataset": ("PairCollator", "PairDataset"),
    "cache.errors": ("CacheError",),
    "capture.local": ("capture_reference", "capture_teacher"),
    "capture.pairs": ("read_pairs", "tokenize_pairs"),
    "capture.remote": ("capture_from_server", "capture_from_vllm"),
    "losses.divergence": ("topk_divergence",),
    "losses.linear_loss": ("DaDPOOutput", "LinearDaDPOLoss", "linear_dadpo_loss", "pair_counts"),
    "losses.preference": ("PreferenceLoss", "dadpo_loss"),
    "losses.targets": ("TeacherTargets",),
    "models.forward": ("hidden_states",),
    "models.lm_head": ("lm_head",),
    "models.packing": ("unpack",),
    "models.patch": ("SelectedLogpsOutput", "patch"),
    "ops.head": ("Head",),
    "ops.live.diagnostics": ("LiveDiagnostics", "live_diagnostics"),
    "ops.memory": ("MemoryEstimate", "estimate_memory"),
    "ops.run": ("Run", "plan_for"),
    "ops.selected_logps": ("SelectedLogps", "linear_selected_logps"),
    "ops.token_statistics": ("TokenStatistics", "linear_token_statistics"),
    "ops.topk_logps": ("TopkLogps", "linear_topk_logps"),
    "ops.vocab_parallel": ("vocab_parallel_selected_logps",),
    "train.config": ("DaDPOConfig",),
    "train.trainer": ("DaDPOTrainer",),
    "train.trl.trainer": ("TRLDaDPOConfig", "TRLDaDPOTrainer"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(["__version__", *_MODULE_OF])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("dadpo-kernels")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

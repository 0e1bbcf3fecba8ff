"""TRL's fused LM head, `model(..., labels=labels, fused_lm_head=True)`, on our primitive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from ...models.distributed import check_on_first_rank, unrounded
from ...models.lm_head import check_lm_head, head_module, unwrap
from ...models.patch import replace_forward, selected_forward
from ...ops.head import Head
from ...ops.run import Run
from ...ops.selected_logps import SelectedLogps
from ...ops.token_statistics import linear_token_statistics

# TRL's per-token outputs, by our names of them.
_STATISTICS = {
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "log_sum_sq_probs": "log_sum_sq",
    "is_top1": "is_top1",
}
_EXACT = "_fused_output"  # attribute of a model: the last output, as no engine has seen it


@dataclass
class FusedSelectedOutput(FusedCausalLMOutput):
    """TRL's output of a fused head, with all selected log-probabilities (`[2B, S]`, the last position 0)."""

    selected_logps: Any = None


def add_fused_lm_head(
    model: nn.Module,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    token_metrics: bool,
    run: Run,
) -> None:
    """TRL's function of this name on our primitive: `model(..., labels=labels, fused_lm_head=True)`.

    Args:
        model: a causal LM of transformers.
        outputs: fields of TRL's FusedCausalLMOutput that are wanted.
        token_metrics: compute those that are for logging only; else they hold zeros.
        run: backend, memory budget and gradient tolerance of the head.
    """
    head_module(model)  # every rank refuses what it can see
    check_on_first_rank(model, check_lm_head)
    computed = {
        name: field
        for name, field in _STATISTICS.items()
        if name in outputs and (token_metrics or name == "log_sum_sq_probs")
    }

    def fused(self: Any, forward: Any, kwargs: dict[str, Any]) -> FusedSelectedOutput:
        seen: dict[str, Tensor] = {}

        def observe(hidden: Tensor, head: Head, labels: Tensor) -> None:
            statistics = linear_token_statistics(hidden, head, labels)
            seen.update({name: getattr(statistics, field) for name, field in computed.items()})

        del kwargs["fused_lm_head"]
        out = selected_forward(self, forward, kwargs, run, observe if computed else None)
        logps = out.selected_logps.label
        for name in outputs:
            if name in _STATISTICS and name not in seen:
                seen[name] = torch.zeros_like(logps, dtype=torch.bool if name == "is_top1" else logps.dtype)
        output = FusedSelectedOutput(
            loss=out.loss,
            log_probs=logps[:, :-1],
            aux_loss=out.aux_loss,
            selected_logps=out.selected_logps,
            **{name: values[:, :-1] for name, values in seen.items()},
        )
        vars(self)[_EXACT] = output
        return output

    replace_forward(model, lambda kwargs: kwargs.get("fused_lm_head", False), fused)


def run_fused(model: nn.Module, **kwargs: Any) -> FusedSelectedOutput:
    """`model(**kwargs)`, whose log-probabilities mixed precision of FSDP2 would round on their way out.

    Args:
        model: what an engine made of a model with our fused head, or the model.
    """
    out = model(**kwargs)
    exact = vars(unwrap(model)).pop(_EXACT)
    selected = SelectedLogps(*map(unrounded, out.selected_logps, exact.selected_logps))
    return replace(out, log_probs=selected.label[:, :-1], selected_logps=selected)


@contextmanager
def instead_of_trls(**ours: Callable[..., Any]) -> Iterator[None]:
    """DPOTrainer.__init__ calls functions of its module by these names: for its duration, ours."""
    theirs = {name: getattr(dpo_trainer, name) for name in ours}
    vars(dpo_trainer).update(ours)
    try:
        yield
    finally:
        vars(dpo_trainer).update(theirs)

"""TRL's fused LM head, `model(..., labels=labels, fused_lm_head=True)`, on our primitive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from ...models.distributed import check_head
from ...models.forward import unrounded
from ...models.lm_head import unwrap
from ...models.override import override_forward
from ...models.patch import selecting_logps, shifted
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
_EXACT = "_fused_output"  # attribute of a model: the last output, as no wrapper has seen it


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
    check_head(model)
    override_forward(model, _FusedHead(tuple(outputs), token_metrics, run))


@dataclass(frozen=True)
class _FusedHead:
    """Of calls with `fused_lm_head=True`: what TRL asks for. The model computes no loss, so its loss may be any."""

    outputs: tuple[str, ...]
    token_metrics: bool
    run: Run

    def wants(self, kwargs: dict[str, Any]) -> bool:
        return kwargs.get("fused_lm_head", False)

    @torch.compiler.disable(recursive=False)  # compiled is the model's body
    def __call__(self, causal: Any, forward: Callable[..., Any], kwargs: dict[str, Any]) -> FusedSelectedOutput:
        kwargs = {name: value for name, value in kwargs.items() if name != "fused_lm_head"}
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        num_items, topk_ids = kwargs.pop("num_items_in_batch", None), kwargs.pop("topk_ids", None)
        aligned = shifted(labels) if shift_labels is None else shift_labels
        seen: dict[str, Tensor] = {}
        computed = {
            name: field
            for name, field in _STATISTICS.items()
            if name in self.outputs and (self.token_metrics or name == "log_sum_sq_probs")
        }

        def observe(hidden: Tensor, head: Head, labels: Tensor) -> None:
            statistics = linear_token_statistics(hidden, head, labels)
            seen.update({name: getattr(statistics, field) for name, field in computed.items()})

        kwargs |= {"return_dict": True}
        kwargs.setdefault("use_cache", False)
        with selecting_logps(causal, aligned, topk_ids, -100, self.run, observe if computed else None) as call:
            model_output = forward(**kwargs)
        call.check(model_output.logits)
        selected = SelectedLogps(*call.values)
        logps = selected.label
        for name in self.outputs:
            if name in _STATISTICS and name not in seen:
                seen[name] = torch.zeros_like(logps, dtype=torch.bool if name == "is_top1" else logps.dtype)
        count = (aligned != -100).sum().clamp(min=1) if num_items is None else num_items
        output = FusedSelectedOutput(
            loss=-logps.sum() / count,
            log_probs=logps[:, :-1],
            aux_loss=model_output.get("aux_loss"),
            selected_logps=selected,
            **{name: values[:, :-1] for name, values in seen.items()},
        )
        vars(causal)[_EXACT] = output
        return output


def run_fused(model: nn.Module, **kwargs: Any) -> FusedSelectedOutput:
    """`model(**kwargs)`, whose log-probabilities mixed precision of FSDP2 would round on their way out.

    Args:
        model: what a parallel wrapper made of a model with our fused head, or the model.
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

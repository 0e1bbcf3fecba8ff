"""One line that takes the logits out of a model's loss: `patch(model)`.

The model's own forward runs, with all it does before its head and after its loss (positions of images, router
losses). For the duration of that call its head computes the few log-probabilities that are asked for, and its loss
function makes them the loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..ops.head import Head
from ..ops.run import Run
from ..ops.selected_logps import SelectedLogps, selected_logps_of
from .distributed import check_head
from .forward import HeadCall, attribute, replaced_head
from .lm_head import unwrap
from .override import override_forward, source

IGNORE_INDEX = -100
FUSED_LOSSES = ("liger_kernel", "cut_cross_entropy")  # packages whose forwards compute the loss without the head
Observer = Callable[[Tensor, Head, Tensor], None]  # hidden [B, S, H], head, aligned labels [B, S]


@dataclass
class SelectedLogpsOutput(ModelOutput):
    """What a patched model returns when it is given labels.

    Attributes:
        loss: scalar, see `patch`.
        label_logps: `[B, S]`: position t holds the log-probability of the label t + 1 (of `shift_labels[t]` if these
            were given); 0 where there is none, so at the end.
        topk_logps, topk_tail: `[B, S, K]` and `[B, S]`, of `topk_ids` if these were given.
        aux_loss: the load-balancing loss of a mixture of experts, if the model returns one.
        router_logits, hidden_states, attentions: the model's own, if asked for.
    """

    loss: Any = None
    label_logps: Any = None
    topk_logps: Any = None
    topk_tail: Any = None
    aux_loss: Any = None
    router_logits: Any = None
    hidden_states: Any = None
    attentions: Any = None

    @property
    def selected_logps(self) -> SelectedLogps:
        """The three as one value; without `topk_ids` `[B, S, 0]` and zeros take the places of the last two.

        Not a field: transformers gathers predictions by `type(x)(...)`, which named tuples refuse.
        """
        label = self.label_logps
        if self.topk_logps is None:
            return SelectedLogps(label, label.new_zeros(*label.shape, 0), torch.zeros_like(label))
        return SelectedLogps(label, self.topk_logps, self.topk_tail)


def patch(
    model: nn.Module,
    *,
    backend: str = "auto",
    memory_budget: int | None = None,
    grad_tolerance: float | None = None,
) -> nn.Module:
    """Make `model(..., labels=labels)` compute its loss from the fused primitive, without `[B, S, V]` logits.

        loss = -Σ log π(labels[:, 1:]) / (number of these labels, or num_items_in_batch)    + the model's router loss

    Called with `labels` (or `shift_labels`, already aligned), the model returns a `SelectedLogpsOutput`, which has no
    logits; `topk_ids [B, S, K]` (aligned as the output is) adds the log-probabilities of these ids and of the mass
    outside them, for distillation. Called without, it is the model it was, so generation is unchanged. Only this
    instance is patched, not its class; PEFT may wrap it before or after; a later patch replaces an earlier one. Where
    no label counts, the loss is 0 with zero gradients (transformers gives NaN). `torch.compile` compiles what comes
    before the head and what comes behind the loss.

    Args:
        model: a causal LM of transformers, or one in a wrapper (PEFT, `torch.compile`, data parallelism).
        backend, memory_budget, grad_tolerance: see `linear_selected_logps`.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: a head, a loss function or a forward that is not understood, with the reason. What shows
            only while the model runs is checked in every forward, and raises ValueError in the first one: what it does
            to its logits, whether it calls its loss function and with which labels.
    """
    causal = unwrap(model)
    override = _LossOfLabels(Run(backend, memory_budget, grad_tolerance))
    package = source(causal).partition(".")[0]
    if package in FUSED_LOSSES:
        raise ValueError(
            f"{package} has replaced the forward of {type(causal).__name__} and computes the loss without the head: "
            "use one of the two (do not apply its kernels for the loss: fused_linear_cross_entropy=False)"
        )
    check_head(model)
    _check_loss_function(causal)
    override_forward(causal, override)
    return model


@dataclass(frozen=True)
class _LossOfLabels:
    """Of calls with labels: the loss and log-probabilities, no logits."""

    run: Run

    def wants(self, kwargs: dict[str, Any]) -> bool:
        return _labels(kwargs) is not None or kwargs.get("topk_ids") is not None

    @torch.compiler.disable(recursive=False)  # compiled is the model's body
    def __call__(self, causal: Any, forward: Callable[..., Any], kwargs: dict[str, Any]) -> SelectedLogpsOutput:
        kwargs = dict(kwargs)
        labels, topk_ids = _labels(kwargs), kwargs.pop("topk_ids", None)
        num_items, ignore_index = kwargs.pop("num_items_in_batch", None), kwargs.pop("ignore_index", IGNORE_INDEX)
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is None:
            raise ValueError("topk_ids without labels: pass labels, which say at which positions they are wanted")
        aligned = shifted(labels, ignore_index) if shift_labels is None else shift_labels
        name = type(causal).__name__
        losses: list[Tensor] = []

        def loss_instead(logits: Any = None, labels: Any = None, *args: Any, **given: Any) -> Tensor:
            call.check(logits)
            _check_loss_call(name, labels, kwargs["labels"], given.get("ignore_index", ignore_index), ignore_index)
            logps = call.values[0]
            count = (aligned != ignore_index).sum().clamp(min=1) if num_items is None else num_items
            losses.append(-logps.sum() / (count.to(logps.device) if isinstance(count, Tensor) else count))
            return losses[0]

        kwargs |= {"labels": labels, "return_dict": True}
        kwargs.setdefault("use_cache", False)
        selecting = selecting_logps(causal, aligned, topk_ids, ignore_index, self.run)
        with selecting as call, attribute(causal, "_loss_function", loss_instead):
            output = forward(**kwargs)
        if output.logits is not None or not losses:  # the loss has checked them
            call.check(output.logits)
        if not losses:
            raise ValueError(
                f"{name} computes its loss itself instead of calling its loss_function: compute the loss from "
                "hidden_states(model) and lm_head(model) with the functions of dadpo_kernels"
            )
        label, topk, tail = call.values
        logps = {"label_logps": label} | ({} if topk_ids is None else {"topk_logps": topk, "topk_tail": tail})
        others = {name: output.get(name) for name in ("aux_loss", "router_logits", "hidden_states", "attentions")}
        return SelectedLogpsOutput(loss=output.loss, **logps, **others)


@contextmanager
def selecting_logps(
    causal: Any,
    aligned: Tensor,
    topk_ids: Tensor | None,
    ignore_index: int,
    run: Run,
    observe: Observer | None = None,
) -> Iterator[HeadCall]:
    """Inside, forwards of `causal` compute the selected log-probabilities instead of logits: `values` of the result.

    Args:
        aligned: `[B, S]` labels: position t predicts `aligned[t]`.
        topk_ids: `[B, S, K]` or None.
        observe: called with what the head is applied to, for statistics of one's own.
    """

    def of_head(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        if hidden.shape[:-1] != aligned.shape:
            raise ValueError(
                f"labels have shape {list(aligned.shape)} and the head is applied to {list(hidden.shape)}: labels are "
                "needed for every position (leave logits_to_keep at 0; prompt-learning adapters are not supported)"
            )
        labels = aligned.to(hidden.device)
        ids = None if topk_ids is None else topk_ids.to(hidden.device)
        logps = selected_logps_of(hidden, head, labels, ids, ignore_index, run)
        if observe is not None:
            observe(hidden, head, labels)
        return tuple(values.clone() for values in logps)  # FSDP2 warns of views

    with replaced_head(causal, of_head) as call:
        yield call


def shifted(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels `[B, S]` of the tokens as labels of the positions that predict them."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _labels(kwargs: dict[str, Any]) -> Any:
    labels = kwargs.get("labels")
    return kwargs.get("shift_labels") if labels is None else labels


def _check_loss_call(name: str, labels: Any, given: Tensor, ignore_index: int, wanted: int) -> None:
    """The model must pass on the labels and the ignore_index that it was called with."""
    if labels is not given and not (isinstance(labels, Tensor) and torch.equal(labels.to(given.device), given)):
        raise ValueError(f"{name} changes the labels before its loss: not supported")
    if ignore_index != wanted:
        raise ValueError(f"{name} calls its loss with ignore_index={ignore_index}: pass ignore_index={ignore_index}")


@torch.no_grad()
def _check_loss_function(causal: Any) -> None:
    """Compare the model's loss function with that of the patch on made-up logits."""
    name = type(causal).__name__
    logits = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 1, -100, 6, 2, 0]])
    logps = F.cross_entropy(logits[0], shifted(labels)[0], reduction="sum")
    for count, options in ((4, {}), (3, {"num_items_in_batch": 3})):
        try:
            loss = float(causal.loss_function(logits=logits, labels=labels, vocab_size=7, **options))
        except Exception as error:
            raise ValueError(f"the loss function of {name} cannot be called as transformers does: {error}") from error
        if not abs(loss - logps.item() / count) <= 1e-4:
            raise ValueError(
                f"the loss of {name} is {loss:.6g} for logits of which the cross-entropy of the next token is "
                f"{logps.item() / count:.6g}: only this loss is supported"
            )

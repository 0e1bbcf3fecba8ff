"""One line that takes the logits out of a model's loss: `patch(model)`.

The model's own forward runs, with all it does before its head and after its loss (positions of images, router
losses). For the duration of that call its head and its loss function are replaced: the head's stand-in turns the
hidden states it is given into the few log-probabilities that are asked for, the other one makes them the loss.
Engines that shard the head (FSDP2, ZeRO-3) gather it when it runs, and again for the backward of what it returns: so
the log-probabilities are what their hooks see it return, and behind these a stand-in for logits takes their place.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..ops.head import Head
from ..ops.run import Run
from ..ops.selected_logps import SelectedLogps, selected_logps_of
from .distributed import check_on_first_rank, unrounded
from .lm_head import check_lm_head, head_module, lm_head, unwrap

IGNORE_INDEX = -100
Observer = Callable[[Tensor, Head, Tensor], None]  # hidden [B, S, H], head, aligned labels [B, S]


@dataclass
class SelectedLogpsOutput(ModelOutput):
    """What a patched model returns when it is given labels.

    Attributes:
        loss: scalar, see `patch`.
        selected_logps: SelectedLogps of `[B, S]`, `[B, S, K]`, `[B, S]`: position t holds the log-probability of the
            label t + 1 (of `shift_labels[t]` if these were given); 0 where there is none, so at the end.
        aux_loss: the load-balancing loss of a mixture of experts, if the model returns one.
        router_logits, hidden_states, attentions: the model's own, if asked for.
    """

    loss: Any = None
    selected_logps: Any = None
    aux_loss: Tensor | None = None
    router_logits: Any = None
    hidden_states: Any = None
    attentions: Any = None


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
    no label counts, the loss is 0 with zero gradients (transformers gives NaN). Under `torch.compile`, a call with
    labels runs uncompiled.

    Args:
        model: a causal LM of transformers, or one in a wrapper (PEFT, `torch.compile`, data parallelism).
        backend, memory_budget, grad_tolerance: see `linear_selected_logps`.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: a head or a loss that is not understood, with the reason. Two tiny forwards compare the
            model's own logits and loss with the patched ones, so call it before the model is sharded.
    """
    causal = unwrap(model)
    run = Run(backend, memory_budget, grad_tolerance)
    head_module(causal)  # every rank refuses what it can see

    def with_labels(self: Any, forward: Callable[..., Any], kwargs: dict[str, Any]) -> SelectedLogpsOutput:
        return selected_forward(self, forward, kwargs, run)

    def check(causal: nn.Module) -> None:
        check_lm_head(causal)
        _check_loss(causal, with_labels)

    check_on_first_rank(causal, check)
    replace_forward(causal, lambda kwargs: _labels(kwargs) is not None, with_labels)
    return model


def replace_forward(
    causal: Any,
    wanted: Callable[[dict[str, Any]], bool],
    instead: Callable[[Any, Callable[..., Any], dict[str, Any]], Any],
) -> None:
    """Give the instance a forward that is `instead(self, its own forward, kwargs)` for the calls that are `wanted`."""
    earlier = _instance_forward(causal)

    @functools.wraps(type(causal).forward)  # trainers and `generate` read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The class's forward is bound here, not outside, so that a deep copy of the model runs its own layers.
        original = earlier or types.MethodType(type(self).forward, self)
        if wanted(kwargs):
            return instead(self, functools.partial(original, *args), kwargs)
        return original(*args, **kwargs)

    forward.behind = earlier  # type: ignore[attr-defined]
    causal.forward = types.MethodType(forward, causal)


def _instance_forward(causal: Any) -> Callable[..., Any] | None:
    """A forward that somebody gave the instance (accelerate's hooks do), or what was there before we did."""
    forward = vars(causal).get("forward")
    return getattr(forward, "behind", forward)


@torch.compiler.disable  # Dynamo does not follow attributes that come and go
def selected_forward(
    causal: Any,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    run: Run,
    observe: Observer | None = None,
) -> SelectedLogpsOutput:
    """`forward(**kwargs)` of `causal`, with labels, on the fused primitive instead of head and loss function.

    `observe` is called with what the head is applied to, for statistics of one's own.
    """
    kwargs = dict(kwargs)
    labels = _labels(kwargs)
    shift_labels, topk_ids = kwargs.pop("shift_labels", None), kwargs.pop("topk_ids", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    selected: list[SelectedLogps] = []
    losses: list[Tensor] = []

    def head_instead(hidden: Tensor) -> tuple[Tensor, ...]:
        _check_hidden(causal, hidden, shift_labels, again=bool(selected))
        head = lm_head(causal)
        device = head.weight.device  # with a device map, the layers may end on another one
        hidden, aligned = hidden.to(device), shift_labels.to(device)
        ids = None if topk_ids is None else topk_ids.to(device)
        logps = selected_logps_of(hidden, head, aligned, ids, IGNORE_INDEX, run)
        selected.append(SelectedLogps(*(values.clone() for values in logps)))  # FSDP2 warns of views
        if observe is not None:
            observe(hidden, head, aligned)
        return tuple(selected[0])

    def behind_other_hooks(head: nn.Module, inputs: tuple[Tensor], hooked: tuple[Tensor, ...]) -> Tensor:
        selected[0] = SelectedLogps(*map(unrounded, hooked, selected[0]))
        return inputs[0][..., :1]  # stands for the logits: whatever the model does to them, nobody reads it

    def loss_instead(*args: Any, **kwargs: Any) -> Tensor:
        logps = selected[0].label
        count = (shift_labels != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items
        losses.append(-logps.sum() / (count.to(logps.device) if isinstance(count, Tensor) else count))
        return losses[0]

    head = head_module(causal)
    with ExitStack() as stack:
        stack.enter_context(_attribute(head, "forward", head_instead))
        stack.callback(head.register_forward_hook(behind_other_hooks).remove)  # the last one, so it runs last
        stack.enter_context(_attribute(causal, "_loss_function", loss_instead))
        output = forward(**{"use_cache": False, **kwargs, "labels": labels, "return_dict": True})
    if not losses:
        raise ValueError(
            f"{type(causal).__name__} computes its loss itself instead of calling its loss_function: compute the loss "
            "from hidden_states(model) and lm_head(model) with the functions of dadpo_kernels"
        )
    others = {name: output.get(name) for name in ("aux_loss", "router_logits", "hidden_states", "attentions")}
    return SelectedLogpsOutput(loss=output.loss, selected_logps=selected[0], **others)


def _labels(kwargs: dict[str, Any]) -> Any:
    labels = kwargs.get("labels")
    return kwargs.get("shift_labels") if labels is None else labels


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance for a while; then what was there before, or nothing."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _check_hidden(causal: Any, hidden: Tensor, labels: Tensor, again: bool) -> None:
    if again:
        raise ValueError(f"{type(causal).__name__} applies its head more than once in a forward: not supported")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)} and the head is applied to {list(hidden.shape)}: labels are "
            "needed for every position (leave logits_to_keep at 0; prompt-learning adapters are not supported)"
        )


@torch.no_grad()
def _check_loss(causal: Any, with_labels: Callable[..., SelectedLogpsOutput]) -> None:
    """Compare the loss of the patch with the model's own for a few tokens."""
    embedding = causal.get_input_embeddings().weight
    ids = torch.arange(1, 9, device=embedding.device)[None] % len(embedding)
    call = {"input_ids": ids, "labels": ids}
    training = causal.training
    causal.eval()
    try:
        with torch.autocast(embedding.device.type, enabled=False):
            forward = _instance_forward(causal) or types.MethodType(type(causal).forward, causal)
            theirs, ours = forward(**call).loss.item(), with_labels(causal, forward, call).loss.item()
    finally:
        causal.train(training)
    allowed = max(8 * torch.finfo(embedding.dtype).eps, 1e-5) * max(1.0, abs(theirs))
    if not abs(theirs - ours) <= allowed:
        raise ValueError(
            f"the loss of {type(causal).__name__} is {theirs:.6g}, that of its labels under its head {ours:.6g}: it "
            "is not the cross-entropy of the next token"
        )

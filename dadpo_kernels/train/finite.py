"""Stops a run before a loss, a gradient or a parameter that is not finite reaches a file."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import Trainer

_SHOWN = 20  # pairs in a message


class NonFiniteError(ValueError):
    """A training step's loss or gradient, or a parameter that is to be saved, is infinite or not a number."""


class FiniteSteps:
    """What a trainer's steps computed, on all ranks, checked before the optimizer uses it.

    The losses stay on their device until the step ends. They are read, together with the gradient, by a hook that runs
    when the optimizer is about to change parameters: one wait for the device and one sum over ranks in each step. The
    hook is the optimizer's own, since DeepSpeed steps inside its backward.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._losses: list[tuple[Tensor, Callable[[], list[str]]]] = []
        self._hook: RemovableHandle | None = None

    def watch(self, optimizer: Any) -> None:
        """Check before each step of an optimizer, which accelerate or DeepSpeed may have wrapped."""
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self._losses = []
        if self._hook is not None:
            self._hook.remove()
        self._hook = optimizer.register_step_pre_hook(lambda optimizer, *_: self._check(_gradients(optimizer)))

    def add(self, loss: Tensor, pairs: Callable[[], list[str]]) -> None:
        """Of a micro-batch: its loss, and a function that names its pairs."""
        self._losses.append((loss.detach(), pairs))

    def check_losses(self) -> None:
        """Check what no hook has seen: a scaler skips the optimizer's step where gradients are not finite.

        Raises:
            NonFiniteError: a loss of this step is not finite, on any rank.
        """
        if self._losses:
            self._check([])

    def _check(self, gradients: list[Tensor]) -> None:
        accelerator = self._trainer.accelerator
        losses, self._losses = self._losses, []
        values = [loss.float() for loss, _ in losses]
        # With a scaler, gradients that overflow are none of our business: it skips their step and scales less.
        if gradients and getattr(accelerator, "scaler", None) is None:
            values.append(torch.nn.utils.get_total_norm(gradients))
        finite = torch.tensor([], dtype=torch.bool, device=accelerator.device)
        finite = torch.cat([finite, *(value.isfinite()[None].to(finite.device) for value in values)])
        counts = torch.stack([(~finite[: len(losses)]).sum(), (~finite[len(losses) :]).sum()])
        of_losses, of_gradients = accelerator.reduce(counts, "sum").tolist()
        if not of_losses and not of_gradients:
            return
        # Which pairs, on which rank.
        concerned = [i for i in range(len(losses)) if not of_losses or not finite[i]]
        pairs = [name for i in concerned for name in losses[i][1]()]
        bad = {str(float(losses[i][0])) for i in concerned} if of_losses else set()
        pairs, bad = gather_object(pairs), set(gather_object(sorted(bad)))
        what = f"the loss is {' and '.join(sorted(bad))}" if of_losses else "the gradient is not finite"
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        raise NonFiniteError(
            f"{what} in step {self._trainer.state.global_step + 1}, with {', '.join(pairs[:_SHOWN])}{more}: training "
            "stopped before this step changed or saved a parameter. Check the cache with `dadpo cache verify`, the "
            "model's parameters and these pairs; else lower learning_rate, or train in float32 (bf16=False)"
        )


def pair_names(batch: Mapping[str, Tensor], tokenizer: Any) -> Callable[[], list[str]]:
    """A function that names a batch's pairs: by `index`, else by the ends of their chosen answers.

    It keeps no other tensor of the batch.
    """
    if (index := batch.get("index")) is not None:
        return lambda: [f"pair {number}" for number in index.tolist()]
    ids, mask = (batch[name].chunk(2)[0] for name in ("input_ids", "attention_mask"))

    def names() -> list[str]:
        rows = [row[kept > 0].tolist()[-16:] for row, kept in zip(ids, mask, strict=True)]
        texts = [row if tokenizer is None else tokenizer.decode(row) for row in rows]
        return [f"the pair whose chosen answer ends in {text!r}" for text in texts]

    return names


def check_parameters(model: nn.Module, trainer: Trainer) -> None:
    """Raise NonFiniteError if a parameter is not finite. All ranks call it if they share the parameters out."""
    parameters = dict(model.named_parameters())
    bad = [name for name, parameter in parameters.items() if not _is_finite(parameter)]
    if any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in parameters.values()):
        bad = sorted({*gather_object(bad)})
    if bad:
        others = f" and {len(bad) - 1} other parameters are" if len(bad) > 1 else " is"
        raise NonFiniteError(
            f"{bad[0]}{others} not finite after step {trainer.state.global_step}, and nothing is saved: lower "
            "learning_rate, or train in float32 (bf16=False)"
        )


def _is_finite(parameter: nn.Parameter) -> bool:
    local = _local(getattr(parameter, "ds_tensor", parameter).detach())  # ZeRO-3's share of a parameter
    return not local.is_floating_point() or bool(local.isfinite().all())


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters: Iterable[Any] = (p for group in optimizer.param_groups for p in group["params"])
    return [_local(p.grad) for p in parameters if p.grad is not None]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

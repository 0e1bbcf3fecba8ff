"""What both trainers do beyond transformers' Trainer so that no run goes wrong without a word."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from .finite import FiniteSteps, check_parameters, pair_names


class CheckedTrainer(Trainer):
    """A Trainer that stops where numbers are not finite (`NonFiniteError`), and saves none that are not.

    A subclass calls `_watch` with the loss of each micro-batch that it trains on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finite = FiniteSteps(self)
        self.add_callback(_Checks(self._finite))

    def _watch(self, loss: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """The loss of a micro-batch, before its backward."""
        self._finite.add(loss, pair_names(inputs, self.processing_class))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's.

        Raises:
            NonFiniteError: a parameter is not finite.
        """
        model: Any = self.model
        check_parameters(model, self)
        super().save_model(output_dir, _internal_call)


class _Checks(TrainerCallback):
    def __init__(self, finite: FiniteSteps) -> None:
        self._finite = finite

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finite.watch(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finite.check_losses()

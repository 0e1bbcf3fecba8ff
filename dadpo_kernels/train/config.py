"""Options of the trainer: transformers' TrainingArguments and the loss's own."""

from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments

from ..losses.linear_loss import LinearDaDPOLoss
from .options import LossOptions


@dataclass
class DaDPOConfig(LossOptions, TrainingArguments):
    """TrainingArguments with the loss's options; a batch size counts pairs.

    With both betas 0 there is no preference term: `sft_weight` and `kl_weight` then make a distilled-SFT stage.
    """

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # the columns are the collator's, not the model's
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 asks for it by name
        super().__post_init__()

    def loss(self) -> LinearDaDPOLoss:
        """The loss that these options describe. Raises ValueError if they contradict each other."""
        return LinearDaDPOLoss(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})

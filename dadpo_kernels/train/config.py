"""Options of the trainer: transformers' TrainingArguments and the loss's own."""

from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments

from ..losses.linear_loss import LinearDaDPOLoss
from .arguments import RANGES, REFUSED, Refused, check_options, check_ranges, defaults_of
from .options import LossOptions

_LENGTHS = "a cache does not list its pairs' lengths (a shard's are similar): leave it out, or choose 'sequential'"
_PREDICTIONS = "evaluate() keeps no predictions, only the sums of loss and metrics: leave it out"
# Of TrainingArguments.
REFUSED_OPTIONS = REFUSED | {
    "batch_eval_metrics": Refused(_PREDICTIONS),
    "bf16_full_eval": Refused("evaluation runs in the precision of training: set bf16"),
    "debug": Refused("TPUs are not supported", lambda options: "tpu_metrics_debug" not in options["debug"]),
    "eval_accumulation_steps": Refused(_PREDICTIONS),
    "eval_do_concat_batches": Refused(_PREDICTIONS),
    "eval_use_gather_object": Refused(_PREDICTIONS),
    "fp16_full_eval": Refused("evaluation runs in the precision of training: set fp16"),
    "include_for_metrics": Refused(_PREDICTIONS),
    "length_column_name": Refused(_LENGTHS),
    "prediction_loss_only": Refused(_PREDICTIONS),
    "train_sampling_strategy": Refused(
        _LENGTHS, lambda options: options["train_sampling_strategy"] in ("random", "sequential")
    ),
}


@dataclass
class DaDPOConfig(LossOptions, TrainingArguments):
    """TrainingArguments with the loss's options; a batch size counts pairs.

    With both betas 0 there is no preference term: `sft_weight` and `kl_weight` then make a distilled-SFT stage.

    Raises:
        ValueError: an option of TrainingArguments that would have no effect (`REFUSED_OPTIONS`), or a number that is
            out of range (`RANGES`).
    """

    def __post_init__(self) -> None:
        check_ranges(vars(self), defaults_of(DaDPOConfig), RANGES)
        self.remove_unused_columns = False  # the columns are the collator's, not the model's
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run, and is never logged as another
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 asks for it by name
        super().__post_init__()
        check_options(vars(self), defaults_of(DaDPOConfig), REFUSED_OPTIONS)

    def loss(self) -> LinearDaDPOLoss:
        """The loss that these options describe. Raises ValueError if they contradict each other."""
        return LinearDaDPOLoss(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})

"""What both trainers check of their arguments: options that would be accepted and ignored, and data sets."""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import torch


class Refused(NamedTuple):
    """An option that must keep its default.

    Attributes:
        remedy: what to do instead.
        unless: of all options by name, whether it does what it says after all.
    """

    remedy: str
    unless: Callable[[Mapping[str, Any]], bool] = lambda _: False


# Of TrainingArguments, for both trainers.
REFUSED = {
    "accelerator_config": Refused(
        "dispatch_batches deals out the rows of a batch, which tears pairs apart: leave it out",
        lambda options: not options["accelerator_config"].dispatch_batches,
    ),
    "average_tokens_across_devices": Refused("means are over the pairs and tokens of all processes: leave it out"),
    "fp16": Refused(
        "accelerate trains in float16 on GPUs only, and in float32 instead: set bf16",
        lambda options: torch.accelerator.is_available() and not options["use_cpu"],
    ),
    "label_names": Refused("the collator's columns have fixed names: leave it out"),
    "label_smoothing_factor": Refused("labels are not smoothed; label_smoothing is that of preferences"),
    "liger_kernel_config": Refused("Liger would replace the forward that holds the fused head: leave it out"),
    "use_liger_kernel": Refused("Liger would replace the forward that holds the fused head: set it to False"),
}


class Range(NamedTuple):
    """The numbers that an option may be: finite, at least `low` and at most `high`, without those that are open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'more than' if self.open_low else 'at least'} {self.low}, and finite"
        return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


_COUNT, _POSITIVE, _SHARE = Range(1), Range(0, open_low=True), Range(0, 1, open_high=True)
# Of TrainingArguments, for both trainers: it takes other numbers, and fails later or does something else. An option
# that is None is not set.
RANGES = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Range(0),
    "data_seed": Range(0, 2**32 - 1),
    "dataloader_num_workers": Range(0),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_timeout": _POSITIVE,
    "eval_delay": Range(0),
    "eval_steps": _POSITIVE,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": Range(0),
    "logging_steps": _POSITIVE,
    "max_grad_norm": Range(0),
    "max_steps": _COUNT,
    "neftune_noise_alpha": Range(0),
    "num_train_epochs": _POSITIVE,
    "per_device_eval_batch_size": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "save_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "seed": Range(0, 2**32 - 1),
    "warmup_steps": Range(0),
    "weight_decay": Range(0),
}


def check_ranges(values: Mapping[str, Any], defaults: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise ValueError for the first option that is set to a number outside its range."""
    for name, allowed in ranges.items():
        value, default = values[name], defaults[name]
        if value != default and isinstance(value, int | float) and value not in allowed:
            raise ValueError(f"{name}={value!r} is out of range: it must be {allowed}, or {default!r}, the default")


def check_options(values: Mapping[str, Any], defaults: Mapping[str, Any], refused: Mapping[str, Refused]) -> None:
    """Raise ValueError for the first option in `refused` that has another value than its default, with the remedy."""
    for name, (remedy, unless) in refused.items():
        value = values.get(name, defaults[name])
        if value != defaults[name] and not unless(values):
            raise ValueError(f"{name}={value!r} is not supported: {remedy}")


def defaults_of(config: type) -> dict[str, Any]:
    """The defaults of a dataclass, by field."""
    return {
        option.name: option.default if option.default_factory is MISSING else option.default_factory()
        for option in fields(config)
    }


def named_sets(**arguments: Any) -> dict[str, Any]:
    """The data sets among a trainer's arguments, also those in dictionaries, by what messages call them."""
    sets: dict[str, Any] = {}
    for argument, data in arguments.items():
        several = isinstance(data, dict)
        sets |= {f"{argument}[{name!r}]": part for name, part in data.items()} if several else {argument: data}
    return {name: data for name, data in sets.items() if data is not None}

"""What both trainers check of their arguments: options that would be accepted and ignored, and data sets."""

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

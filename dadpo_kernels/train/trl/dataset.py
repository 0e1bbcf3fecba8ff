"""Teacher caches as TRL wants its data: a `datasets.Dataset`, and batches with `completion_mask`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch.nn.functional as F
from torch import Tensor

from ...cache.dataset import PairCollator, PairDataset


class ReadPairs:
    """Transform of a data set of positions: the pairs of a cache, read when they are asked for."""

    def __init__(self, pairs: PairDataset) -> None:
        self.pairs = pairs

    def __call__(self, batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        items = [self.pairs[position] for position in batch["position"]]
        return {name: [item[name] for item in items] for name in items[0]}


def as_trl_dataset(data: Any) -> Any:
    """A `PairDataset` as a `datasets.Dataset` that reads it lazily; dicts by value; all else as it is.

    Raises:
        ValueError: the cache has no rejected answers.
    """
    if isinstance(data, dict):
        return {name: as_trl_dataset(value) for name, value in data.items()}
    if not isinstance(data, PairDataset):
        return data
    if not data.has_rejected:
        raise ValueError("the cache has no rejected answers, which DPO needs: train on pairs, or use DaDPOTrainer")
    return datasets.Dataset.from_dict({"position": range(len(data))}).with_transform(ReadPairs(data))


def cached_pairs(data: Any) -> PairDataset | None:
    """A cache, or the one behind a data set that `as_trl_dataset` made (or that was selected or shuffled from it)."""
    if isinstance(data, PairDataset):
        return data
    if not isinstance(data, datasets.Dataset):
        return None
    transform = data.format["format_kwargs"].get("transform")
    return transform.pairs if isinstance(transform, ReadPairs) else None


class PairPreferenceCollator:
    """Batches of cached pairs in TRL's columns, with the teacher's in addition; other examples go to TRL's collator.

    `input_ids`, `attention_mask`, `completion_mask` are `[2B, S]`, `ref_chosen_logps` and `ref_rejected_logps` `[B]`
    if the cache has them; the `teacher_*` columns are aligned as `PairCollator` does: position t is about token t + 1.

    Args:
        otherwise: TRL's DataCollatorForPreference; its padding applies to both.
    """

    def __init__(self, otherwise: Callable[[Any], dict[str, Any]]) -> None:
        self.otherwise = otherwise
        self.pad_token_id: int = otherwise.pad_token_id  # type: ignore[attr-defined]
        self.multiple: int = otherwise.pad_to_multiple_of or 1  # type: ignore[attr-defined]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "pair" not in examples[0]:
            return self.otherwise(examples)
        batch = PairCollator(self.pad_token_id)(examples)
        labels = batch.pop("labels")
        batch["completion_mask"] = F.pad(labels[:, :-1] != -100, (1, 0)).long()
        if (reference := batch.pop("ref_logps", None)) is not None:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference.chunk(2)
        missing = -labels.shape[1] % self.multiple
        return {name: self._pad(name, values, missing) for name, values in batch.items()}

    def _pad(self, name: str, values: Tensor, missing: int) -> Tensor:
        if values.dim() < 2 or not missing:
            return values
        sides = (0, 0) * (values.dim() - 2) + (0, missing)
        return F.pad(values, sides, value=self.pad_token_id if name == "input_ids" else 0)

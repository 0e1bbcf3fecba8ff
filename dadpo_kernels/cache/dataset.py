"""A teacher cache as a PyTorch data set, and the collator that makes batches for the loss from its pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import CacheFormatError, CacheReferenceError, CacheVocabularyError
from .format import REFERENCE_SCHEMA, SIDES, TEACHER_SCHEMA, read_pair, read_targets
from .pairs import Pair, pad_pairs
from .reader import RowReader
from .shards import MANIFEST, REFERENCE, read_complete
from .vocabulary import check_vocabulary


class PairDataset(Dataset[dict[str, Any]]):
    """Map-style data set over a teacher cache, in the order of the pairs' source.

    An item is a dictionary of `pair` (a `Pair`, token ids) and numpy arrays for both sides: `{side}_label_logps [T]`
    float32, `{side}_topk_ids [T, K]` int32, `{side}_topk_logps [T, K]` float16 and `{side}_topk_tail [T]` float32. If
    the cache has reference log-probabilities, it also holds `ref_chosen_logps` and `ref_rejected_logps`, floats, which
    are sums over the answers. All log-probabilities are in nats.

    A row is read and checked when its item is accessed, and nothing is kept in memory, so any number of data-loading
    workers can share a data set.

    Args:
        cache_dir: directory written by `dadpo teacher`.
        tokenizer: the student's, compared with the cache's vocabulary id by id; None skips the comparison.
        vocab_size: vocabulary size of the student's LM head; a cache with larger ids is refused. None takes the
            teacher's.
        reference_dir: directory written by `dadpo reference --out`; None takes `cache_dir/reference` if it exists.
        require_reference: refuse a cache without reference log-probabilities.
        verify: compare the SHA-256 of each shard, which reads the whole cache once. Sizes and page checksums are
            checked in any case.

    Raises:
        CacheError: one of its subclasses, which says what is wrong.
    """

    def __init__(
        self,
        cache_dir: str | Path,
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        reference_dir: str | Path | None = None,
        require_reference: bool = False,
        verify: bool = True,
    ) -> None:
        directory = Path(cache_dir)
        self.manifest = read_complete(directory, "teacher", verify=verify)
        settings = self.manifest.settings
        self.k: int = settings["k"]
        self.vocab_size: int = settings["vocab_size"] if vocab_size is None else vocab_size
        for shard in self.manifest.shards:
            if shard.max_id >= self.vocab_size:
                raise CacheVocabularyError(
                    f"{directory} holds id {shard.max_id}, the student's vocabulary has {self.vocab_size}: if teacher "
                    "and student are of one family and differ in padding only, move these ids to the tail with "
                    f"`dadpo cache convert {directory} --student-vocab-size {self.vocab_size} --out DIR`, or capture "
                    "with that option"
                )
        if tokenizer is not None:
            check_vocabulary(directory, self.manifest, tokenizer)
        self._reader = RowReader(directory, TEACHER_SCHEMA)
        self._places = sorted(
            (index, number, row)
            for number, shard in enumerate(self.manifest.shards)
            for row, index in enumerate(shard.index)
        )
        self._reference: dict[int, dict[str, Any]] | None = None
        if reference_dir is not None or (directory / REFERENCE / MANIFEST).exists():
            self._reference = self._read_reference(Path(reference_dir or directory / REFERENCE), verify)
        elif require_reference:
            raise CacheReferenceError(
                f"{directory} has no reference log-probabilities: run `dadpo reference --model STUDENT --cache "
                f"{directory}`, or train without a reference (beta_ref=0)"
            )

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    @property
    def has_rejected(self) -> bool:
        """Whether pairs have rejected answers; without them, their arrays are empty."""
        return "rejected" in self.manifest.sides

    def __len__(self) -> int:
        return len(self._places)

    def positions_by_shard(self) -> list[list[int]]:
        """For each shard, the positions of its pairs in this data set."""
        positions: list[list[int]] = [[] for _ in self.manifest.shards]
        for position, (_, number, _) in enumerate(self._places):
            positions[number].append(position)
        return positions

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, number, row = self._places[position]
        values = self._reader.read(self.manifest.shards[number], row)
        pair = read_pair(values, self.manifest.sides)
        item: dict[str, Any] = {"pair": pair, **read_targets(values, pair, self.k, self.vocab_size)}
        if self._reference is not None:
            reference = self._reference[index]
            for side, answer in zip(SIDES, pair.ids[1:], strict=True):
                if (scored := reference[f"{side}_tokens"]) != len(answer):
                    raise CacheReferenceError(
                        f"pair {index}: the reference scored {scored} tokens of the {side} answer, which has "
                        f"{len(answer)}: run `dadpo reference` again"
                    )
                item[f"ref_{side}_logps"] = reference[f"{side}_logps"]
        return item

    def _read_reference(self, directory: Path, verify: bool) -> dict[int, dict[str, Any]]:
        manifest = read_complete(directory, "reference", verify=verify)
        reader = RowReader(directory, REFERENCE_SCHEMA)
        rows = {r["index"]: r for s in manifest.shards for r in reader.read_columns(s, REFERENCE_SCHEMA.names)}
        same_tokens = manifest.settings["tokens_sha256"] == self.manifest.settings["tokens_sha256"]
        if not same_tokens or rows.keys() != self.manifest.index():
            raise CacheReferenceError(
                f"{directory} belongs to other pairs than the cache: run `dadpo reference` again"
            )
        sums = np.array([[row[f"{side}_logps"] for side in SIDES] for row in rows.values()])
        if not (np.isfinite(sums) & (sums <= 1e-3)).all():
            raise CacheFormatError(
                f"{directory} holds values that are not log-probabilities: run `dadpo reference` again"
            )
        return rows


class PairCollator:
    """Makes a batch from items of `PairDataset`: all chosen sequences, then all rejected ones, padded on the right.

    The batch holds `index` (int64 `[B]`, the pairs' numbers in their source), `input_ids`, `attention_mask`, `labels`
    (int64 `[2B, S]`, labels aligned with the positions that predict them, -100 elsewhere), `teacher_label_logps`,
    `teacher_topk_tail` (float32 `[2B, S]`), `teacher_topk_ids` (int32 `[2B, S, K]`), `teacher_topk_logps` (float32
    `[2B, S, K]`), and `ref_logps` (float32 `[2B]`) if the items have reference log-probabilities. At positions without
    a label, the teacher's tensors hold 0.

    Args:
        pad_token_id: value of `input_ids` outside the sequences, which the model does not attend to.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pairs: list[Pair] = [item["pair"] for item in items]
        input_ids, attention_mask, labels = pad_pairs(pairs, self.pad_token_id)
        index = torch.tensor([pair.index for pair in pairs])
        batch = {"index": index, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        valid = labels != -100
        for name, dtype in (
            ("label_logps", torch.float32),
            ("topk_ids", torch.int32),
            ("topk_logps", torch.float32),
            ("topk_tail", torch.float32),
        ):
            # In row-major order, the positions with a label are the answer tokens of the sides in this order.
            values = torch.from_numpy(np.concatenate([item[f"{side}_{name}"] for side in SIDES for item in items]))
            batch[f"teacher_{name}"] = values.new_zeros((*labels.shape, *values.shape[1:]), dtype=dtype)
            batch[f"teacher_{name}"][valid] = values.to(dtype)
        if "ref_chosen_logps" in items[0]:
            batch["ref_logps"] = torch.tensor([item[f"ref_{side}_logps"] for side in SIDES for item in items])
        return batch

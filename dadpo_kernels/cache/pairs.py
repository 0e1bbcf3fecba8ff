"""A preference pair as token ids, and several of them as one padded batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Pair:
    """Token ids, int32 `[...]` each. `index` is the pair's place in its source, counted from 0."""

    index: int
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray

    @property
    def ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def answer_tokens(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)


def pad_pairs(pairs: Sequence[Pair], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(input_ids, attention_mask, labels)`, int64 `[2B, S]` each: chosen rows first, rejected second, right-padded.

    `labels` are aligned: `labels[:, t]` is the token after `input_ids[:, t]` if that is an answer token, else -100.
    """
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(answer)
        input_ids[row, :start] = torch.tensor(prompt)
        input_ids[row, start:end] = torch.tensor(answer)
        attention_mask[row, :end] = 1
        labels[row, start - 1 : end - 1] = torch.tensor(answer)
    return input_ids, attention_mask, labels


def tokens_sha256(pairs: Sequence[Pair]) -> str:
    """SHA-256 over indices and token ids, in the order of the source."""
    digest = hashlib.sha256()
    for pair in pairs:
        lengths = [pair.index, *map(len, pair.ids)]
        for numbers in (lengths, *pair.ids):
            digest.update(np.asarray(numbers, dtype="<i8").tobytes())
    return digest.hexdigest()

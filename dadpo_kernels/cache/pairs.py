"""A preference pair as token ids, and several pairs as one padded batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, eq=False)
class Pair:
    """Token ids of the prompt and of both answers, one int32 array each. `index` is the pair's number in its source,
    counted from 0. In a set with one answer each, `rejected_ids` are empty."""

    index: int
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray

    @property
    def ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def length(self) -> int:
        """Number of tokens of the longer of the two sequences, prompt included."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def answer_tokens(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)


def pad_pairs(pairs: Sequence[Pair], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(input_ids, attention_mask, labels)`, int64 `[2B, S]` each: all chosen sequences, then all rejected ones,
    padded on the right.

    `labels` are aligned: `labels[:, t]` is the token after `input_ids[:, t]` if that is an answer token, else -100.
    """
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    shape = len(sequences), max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    for i, (prompt, answer) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(answer)
        input_ids[i, :start] = torch.tensor(prompt)
        input_ids[i, start:end] = torch.tensor(answer)
        attention_mask[i, :end] = 1
        labels[i, start - 1 : end - 1] = torch.tensor(answer)
    return input_ids, attention_mask, labels


def tokens_sha256(pairs: Sequence[Pair]) -> str:
    """SHA-256 over the indices and token ids of all pairs, which must be in the order of their source."""
    digest = hashlib.sha256()
    for pair in pairs:
        lengths = [pair.index, *map(len, pair.ids)]
        for numbers in (lengths, *pair.ids):
            digest.update(np.asarray(numbers, dtype="<i8").tobytes())
    return digest.hexdigest()

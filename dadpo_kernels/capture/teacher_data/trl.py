"""What TRL's `VLLMClient.get_sequence_logprobs` returns (trl/generation/vllm_client.py), with what it was asked.

A record is one call: the arguments `sequences` (prompt and completion) and `prompt_lengths`, and the returned
`logprobs`, `logprob_token_ids` `[B, T, k]` (padded with -inf and id 0), `actual_logprobs` and `actual_token_ids`
`[B, T, 1]`, all about the completion's tokens.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .scored import NO_ENTRY, Scored, TeacherDataError, columns, entries, integers, lists, matrix

LOST = (
    "the mass outside the top k is one minus the mass inside, as fine as the server's float32",
    "the temperature is not in the data: it must have been 1, or the server must report raw log-probabilities",
)
_RETURNED = ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")


def read(where: str, record: Any) -> Iterator[Scored]:
    sequences, lengths, *returned = columns(where, record, "sequences", "prompt_lengths", *_RETURNED)
    sequences, lengths = lists(where, "sequences", sequences), integers(where, "prompt_lengths", lengths)
    returned = [lists(where, name, value) for name, value in zip(_RETURNED, returned, strict=True)]
    if any(len(value) != len(sequences) for value in (lengths, *returned)):
        raise TeacherDataError(
            f"{where}: {len(sequences)} sequences, {len(lengths)} prompt_lengths and results for "
            f"{', '.join(str(len(value)) for value in returned)}: the numbers must be the same"
        )
    for number, (ids, start, *results) in enumerate(zip(sequences, lengths, *returned, strict=True)):
        yield _sequence(f"{where}, sequence {number}", integers(where, "sequences", ids), int(start), *results)


def _sequence(
    where: str, ids: np.ndarray, start: int, logps: Any, topk_ids: Any, actual_logps: Any, actual_ids: Any
) -> Scored:
    length = len(ids) - start
    if start < 1 or length < 1:
        raise TeacherDataError(
            f"{where}: {len(ids)} tokens and a prompt_length of {start}: both the prompt and the completion need one"
        )
    listed = entries(where, ("logprob_token_ids", topk_ids), ("logprobs", logps), length)
    labels = matrix(where, "actual_logprobs", actual_logps, length, kinds="fiu", fill=-np.inf)
    tokens = matrix(where, "actual_token_ids", actual_ids, length, kinds="iu", fill=-1)
    if labels.shape[1] != 1 or tokens.shape[1] != 1 or (tokens[:, 0] != ids[start:]).any():
        raise TeacherDataError(
            f"{where}: actual_logprobs and actual_token_ids must hold one value for each of the {length} tokens after "
            f"the prompt, and these tokens: the server scored others, or prompt_length is wrong"
        )
    known = np.where(labels[:, 0] > NO_ENTRY, labels[:, 0], np.nan)
    before = [(start, *values.shape[1:]) for values in listed]
    return Scored(
        ids,
        np.arange(len(ids)) >= start,
        np.concatenate([np.zeros(before[0], np.int64), listed[0]]),
        np.concatenate([np.full(before[1], -np.inf), listed[1]]),
        np.concatenate([np.full(start, np.nan), known]),
    )

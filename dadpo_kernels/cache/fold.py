"""Reduces the number of top-k entries or the vocabulary. The mass of what is left out is added to the tail."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import CacheVocabularyError
from .format import Targets

_MARGIN = 16  # additional entries to request, because some of them may be outside the student's vocabulary


def shared_vocabulary(teacher_vocab_size: int, student_vocab_size: int | None) -> int:
    """The number of ids that both have. Raises ValueError for a student without any."""
    if student_vocab_size is not None and student_vocab_size < 1:
        raise ValueError(f"student_vocab_size must be at least 1, got {student_vocab_size}")
    return min(teacher_vocab_size, student_vocab_size or teacher_vocab_size)


def entries_to_request(k: int, settings: Mapping[str, Any]) -> int:
    """Number of entries to request from a teacher so that k of them are in the student's vocabulary."""
    return k + min(_MARGIN, settings["teacher_vocab_size"] - settings["vocab_size"])


def fold(where: str, targets: Targets, k: int, vocab_size: int) -> Targets:
    """Keep the k most probable entries with ids below `vocab_size`; the mass of all other entries goes to the tail.

    This is exact: the log-probabilities are still those of the softmax over the teacher's whole vocabulary.

    Args:
        where: beginning of the error message.
        targets: of one answer of T tokens, with at least k entries per position.

    Returns:
        Targets with `topk_ids` and `topk_logps` of shape `[T, k]`.

    Raises:
        CacheVocabularyError: a position has fewer than k entries with ids below `vocab_size`.
    """
    ids, logps = targets["topk_ids"], targets["topk_logps"]
    inside = ids < vocab_size
    if ids.size and (fewest := int(inside.sum(1).min())) < k:
        raise CacheVocabularyError(
            f"{where}: at a position only {fewest} of the teacher's {ids.shape[1]} most probable ids are below "
            f"{vocab_size}, k={k} are needed: take a smaller k, or a teacher of the student's family"
        )
    selected = inside & (inside.cumsum(1) <= k)
    with np.errstate(divide="ignore"):
        left_out = np.log(np.where(selected, 0, np.exp(logps, dtype=np.float64)).sum(1))
    shape = len(ids), k
    return {
        "label_logps": targets["label_logps"],
        "topk_ids": ids[selected].reshape(shape),
        "topk_logps": logps[selected].reshape(shape),
        "topk_tail": np.logaddexp(targets["topk_tail"], left_out).astype(np.float32),
    }

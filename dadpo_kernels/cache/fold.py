"""Fewer top-k entries, or a smaller vocabulary: what is left out goes to the tail, so that no mass is lost."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import CacheVocabularyError
from .format import Targets

_MARGIN = 16  # more entries than asked for, where some may have to be left out


def asked_for(k: int, settings: Mapping[str, Any]) -> int:
    """Entries to ask a teacher for, so that k are left in the student's vocabulary."""
    return k + min(_MARGIN, settings["teacher_vocab_size"] - settings["vocab_size"])


def fold(where: str, targets: Targets, k: int, vocab_size: int) -> Targets:
    """The k most probable entries with ids below `vocab_size`; the mass of all others is added to the tail.

    Exact: log-probabilities are still those under the teacher's whole softmax.

    Raises:
        CacheVocabularyError: a position has fewer than k such entries; the message begins with `where`.
    """
    ids, logps = targets["topk_ids"], targets["topk_logps"]
    inside = ids < vocab_size
    if ids.size and (fewest := int(inside.sum(1).min())) < k:
        raise CacheVocabularyError(
            f"{where}: at a position only {fewest} of the teacher's {ids.shape[1]} most probable ids are below "
            f"{vocab_size}, k={k} are needed: take a smaller k, or a teacher of the student's family"
        )
    kept = inside & (inside.cumsum(1) <= k)
    with np.errstate(divide="ignore"):
        left_out = np.log(np.where(kept, 0, np.exp(logps, dtype=np.float64)).sum(1))
    shape = len(ids), k
    return {
        "label_logps": targets["label_logps"],
        "topk_ids": ids[kept].reshape(shape),
        "topk_logps": logps[kept].reshape(shape),
        "topk_tail": np.logaddexp(targets["topk_tail"], left_out).astype(np.float32),
    }

"""Sets that axolotl's KD plugin has prepared (axolotl/integrations/kd/chat_template.py).

A record is a tokenized conversation: `input_ids`, `labels` (-100 where nothing is learned), and for each token a row
of `target_token_ids`, `target_logprobs` and `target_mask` (one value for each entry). In sets of older versions, row j
is about token j and `target_mask` follows `labels[j]`; in those of newer ones, both are those of token j + 1.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .scored import Scored, TeacherDataError, columns, entries, integers, learned, matrix, one_later

LOST = (
    "axolotl scales the log-probabilities to its kd_temperature and renormalises them over the top k: the mass "
    "outside is not in the data",
    "a realised token outside the top k has no log-probability",
)


def read(where: str, record: Any) -> Iterator[Scored]:
    ids, _, *targets = columns(
        where, record, "input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask"
    )
    ids = integers(where, "input_ids", ids)
    is_learned = learned(where, record, ids)
    topk_ids, topk_logps = entries(where, ("target_token_ids", targets[0]), ("target_logprobs", targets[1]), len(ids))
    mask = matrix(where, "target_mask", targets[2], len(ids), kinds="iub", fill=0) != 0
    if mask.shape != topk_ids.shape or len(ids) < 2:
        raise TeacherDataError(
            f"{where}: {len(ids)} input_ids, {list(topk_ids.shape)} target_token_ids and {list(mask.shape)} values in "
            "target_mask do not belong together"
        )
    positions = record.get("position_ids")
    if positions is not None and (integers(where, "position_ids", positions) != np.arange(len(ids))).any():
        raise TeacherDataError(
            f"{where}: position_ids do not count from 0 to {len(ids) - 1}: several sequences are packed into one. "
            "Prepare the set without packing"
        )

    # Find the token that each row is about.
    topk_logps[~mask] = -np.inf
    has_row = mask.any(1)
    unknown = np.full(len(ids), np.nan)
    fitting = []
    if not (has_row & ~is_learned).any():
        fitting.append(Scored(ids, has_row, topk_ids, topk_logps, unknown))
    if not has_row[-1] and not (has_row[:-1] & ~is_learned[1:]).any():
        moved = (one_later(has_row, False), one_later(topk_ids, 0), one_later(topk_logps, -np.inf))
        fitting.append(Scored(ids, *moved, unknown))
    fitting.sort(key=Scored.hits)
    if not fitting or (len(fitting) == 2 and fitting[0].hits() == fitting[1].hits()):
        raise TeacherDataError(
            f"{where}: target_mask fits labels {'neither' if not fitting else 'both'} with row j about token j and "
            "with row j about token j + 1, so it is not known which token each row is about. Prepare the set again"
        )
    yield fitting[-1]

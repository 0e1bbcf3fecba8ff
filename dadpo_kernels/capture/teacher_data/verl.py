"""Batches of verl's on-policy distillation (verl/experimental/teacher_loop, verl/trainer/distillation).

A record is one sequence of a batch: `input_ids` and `attention_mask` `[S]`, padded on both sides or not;
`response_mask`, of the whole sequence or of its last tokens; and `teacher_ids`, `teacher_logprobs` `[S, k]` of vLLM's
`prompt_logprobs`, in which row j is about token j + 1 and the last row is a dummy. The recipe gkd calls the last two
`teacher_topk_indices` and `teacher_topk_logps`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .scored import Scored, TeacherDataError, columns, entries, integers, one_later

LOST = (
    "the mass outside the top k is one minus the mass inside, as fine as the server's float32",
    "verl drops the log-probability of a realised token outside the top k",
)


def read(where: str, record: Any) -> Iterator[Scored]:
    gkd = isinstance(record, dict) and "teacher_ids" not in record and "teacher_topk_indices" in record
    names = ("teacher_topk_indices", "teacher_topk_logps") if gkd else ("teacher_ids", "teacher_logprobs")
    values = columns(where, record, "input_ids", "attention_mask", "response_mask", *names)
    ids, attended, response = (
        integers(where, name, value)
        for name, value in zip(("input_ids", "attention_mask", "response_mask"), values[:3], strict=True)
    )
    topk_ids, topk_logps = entries(where, (names[0], values[3]), (names[1], values[4]), len(ids))
    if len(attended) != len(ids) or len(response) > len(ids):
        raise TeacherDataError(
            f"{where}: {len(ids)} input_ids, {len(attended)} values in attention_mask and {len(response)} in "
            "response_mask do not belong together"
        )

    # Take the padding away, which attention_mask tells from tokens.
    is_target = np.concatenate([np.zeros(len(ids) - len(response), bool), response != 0])
    kept = np.flatnonzero(attended)
    if (is_target & (attended == 0)).any() or len(kept) < 2 or kept[-1] - kept[0] != len(kept) - 1:
        raise TeacherDataError(
            f"{where}: attention_mask must be one run of at least two ones that response_mask is inside of"
        )
    ids, is_target, topk_ids, topk_logps = (values[kept] for values in (ids, is_target, topk_ids, topk_logps))
    topk_ids, topk_logps = one_later(topk_ids, 0), one_later(topk_logps, -np.inf)

    # With k = 1, the entries may be the realised tokens. Only one with more than half of the mass is surely the best.
    if topk_ids.shape[1] == 1 and (topk_ids[:, 0] == ids)[is_target].all() and (topk_logps[is_target] < -0.7).any():
        raise TeacherDataError(
            f"{where}: the only entry of each row is the realised token, as in verl's modes k1 to k3: there is no "
            "distribution to learn. Choose a loss_mode with top-k, such as forward_kl_topk"
        )
    yield Scored(ids, is_target, topk_ids, topk_logps, np.full(len(ids), np.nan))

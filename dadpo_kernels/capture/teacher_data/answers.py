"""Answers with their targets, from a sequence that a teacher has scored."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...cache.format import Targets
from ..errors import ResponseError
from ..prompt_logprobs import answer_targets
from .scored import NO_ENTRY, Scored, TeacherDataError

_UNKNOWN = -9000.0  # in place of a label's log-probability; so small that it does not change the tail


class Answer(NamedTuple):
    """Token ids, int32, and `targets` by the names in `ANSWER_COLUMNS`, of which `bounded` labels have a bound."""

    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    targets: Targets
    bounded: int


class _Flat(NamedTuple):
    """vLLM's `FlatLogprobs`: position t has the entries from `start_indices[t]` to `end_indices[t]`."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: np.ndarray
    logprobs: np.ndarray


def answers(where: str, scored: Scored, vocab_size: int, k: int | None, label_bound: bool) -> Iterator[Answer]:
    """An answer for each run of targets; the tokens before it are its prompt. The first token is nobody's target.

    Args:
        where: beginning of the error messages.
        vocab_size: of the teacher.
        k: entries that each position must have; None takes the largest number that all of this sequence's have.
        label_bound: see `import_teacher_data`.

    Raises:
        TeacherDataError: an id is outside the vocabulary, the values are not those of one softmax, a position has too
            few entries, or a label is unknown and `label_bound` is false.
    """
    rows = np.flatnonzero(scored.is_target)
    rows = rows[rows > 0]
    if not len(rows):
        return
    ids, logps = scored.topk_ids[rows], scored.topk_logps[rows]
    labels = scored.ids[rows]
    listed = ~(logps <= NO_ENTRY)  # NaN is not the absence of an entry
    _check(where, scored.ids, rows, ids, logps, listed, vocab_size)

    # As many entries as all positions have, most probable first.
    counts = listed.sum(1)
    if counts.min() < (1 if k is None else k):
        raise TeacherDataError(
            f"{where}: token {rows[counts.argmin()]} has {counts.min()} entries"
            + ("" if k is None else f", k={k} are needed: give a smaller --k")
        )
    k = int(counts.min()) if k is None else k
    order = np.lexsort((ids, np.where(listed, -logps, np.inf)))
    ids, logps, listed = (np.take_along_axis(values, order, 1) for values in (ids, logps, listed))

    # The labels' own log-probabilities.
    is_label = (ids == labels[:, None]) & listed
    label_logps = np.where(is_label.any(1), np.where(is_label, logps, -np.inf).max(1), scored.label_logps[rows])
    unknown = ~(label_logps > NO_ENTRY)
    if unknown.any() and not label_bound:
        shifted = max(scored.hits(-1), scored.hits(1)) > scored.hits()
        raise TeacherDataError(
            f"{where}: {int(unknown.sum())} of {len(rows)} tokens, first token {rows[unknown.argmax()]}, are not "
            "among the entries, so their log-probability is unknown; "
            + ("the rows seem to be shifted by one token" if shifted else "--label-bound stores a bound of it")
        )
    label_logps[unknown] = _UNKNOWN

    flat_ids = np.concatenate([labels[:, None], ids[:, :k]], 1)
    flat_logps = np.concatenate([label_logps[:, None], logps[:, :k]], 1)
    cuts = np.flatnonzero(np.diff(rows) > 1) + 1
    for run in np.split(np.arange(len(rows)), cuts):
        start, end = int(rows[run[0]]), int(rows[run[-1]]) + 1
        places = [0] * start + [number * (k + 1) for number in range(len(run) + 1)]
        flat = _Flat(places[:-1], places[1:], flat_ids[run].reshape(-1), flat_logps[run].reshape(-1))
        try:
            targets = answer_targets(flat, scored.ids[:end].tolist(), start, k, vocab_size)
        except ResponseError as error:
            raise TeacherDataError(f"{where}, tokens {start} to {end - 1}: {error}") from None
        bound = np.minimum(targets["topk_logps"][:, -1], targets["topk_tail"])
        targets["label_logps"] = np.where(unknown[run], bound, targets["label_logps"])
        tokens = scored.ids[:end].astype(np.int32)
        yield Answer(tokens[:start], tokens[start:], targets, int(unknown[run].sum()))


def _check(
    where: str, tokens: np.ndarray, rows: np.ndarray, ids: np.ndarray, logps: np.ndarray, listed: np.ndarray, size: int
) -> None:
    """What can be wrong with single entries; `answer_targets` checks the rest."""
    for name, wrong, values in (
        ("token", (tokens < 0) | (tokens >= size), tokens),
        ("an entry with id", listed & ((ids < 0) | (ids >= size)), ids),
    ):
        if wrong.any():
            raise TeacherDataError(
                f"{where}: {name} {values[wrong][0]} is outside the vocabulary of {size}: give the teacher's --model"
            )
    wrong = listed & ~(logps <= 1e-3)
    if wrong.any():
        raise TeacherDataError(
            f"{where}: token {rows[wrong.any(1).argmax()]} has an entry of {logps[wrong][0]:g}, which is not a "
            "log-probability"
        )
    by_id = np.sort(np.where(listed, ids, -1 - np.arange(ids.shape[1])), 1)
    twice = (by_id[:, 1:] == by_id[:, :-1]).any(1)
    if twice.any():
        raise TeacherDataError(f"{where}: token {rows[twice.argmax()]} has two entries with the same id")

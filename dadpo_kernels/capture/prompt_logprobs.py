"""vLLM's `prompt_logprobs`, as its Python API and its server give them, as targets of a cache; and SGLang's as vLLM's.

What vLLM answers for a sequence (vllm/logprobs.py, vllm/v1/engine/logprobs.py): one entry a token; the first is
None; each other one holds the k most probable ids and, if it is not among them, the realised one: k or k + 1 ids. In
`flat_logprobs` the realised one comes first and again in its place. The server writes -inf as -9999.0. Log-softmax is
taken over the whole vocabulary at temperature 1, and nothing here renormalises it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..cache.format import Targets
from .errors import AnswerError

_MINUS_INFINITY = -9999.0
_SLACK = 1e-3  # what float32 may add to probabilities that sum to one


def answer_targets(prompt_logprobs: Any, ids: Sequence[int], start: int, k: int, vocab_size: int) -> Targets:
    """Targets of the answer `ids[start:]`, by the names in `ANSWER_COLUMNS`.

    No engine gives the mass outside the top k, so it is one minus that inside, in float64, and no finer than the
    engine's float32. Bounds that hold in any case make up for that where the teacher is confident: the realised token
    if it is outside, and `vocab_size - k` times the k-th probability.

    Args:
        prompt_logprobs: of the whole sequence `ids`: a list of None and of `{id: Logprob}` (Python API) or
            `{"id": {"logprob": ...}}` (JSON), or vLLM's `FlatLogprobs`.
        k: as it was asked for.

    Raises:
        AnswerError: another number of tokens or of entries, another token, an id outside the vocabulary, values that
            are no log-probabilities, or probabilities that sum to more than one, or cannot sum to it.
    """
    positions = _positions(prompt_logprobs, len(ids))
    length = len(ids) - start
    topk_ids = np.empty((length, k), np.int64)
    topk = np.empty((length, k))
    label = np.empty(length)
    for row, at in enumerate(range(start, len(ids))):
        entries = _entries(positions, at)
        token = int(ids[at])
        if token not in entries or len(entries) not in (k, k + 1):
            raise AnswerError(
                f"position {at} has {len(entries)} log-probabilities, and that of token {token} is "
                f"{'one of them' if token in entries else 'missing'}; {k} were asked for, and this token's: the "
                "server scored another sequence, or limits prompt_logprobs"
            )
        label[row] = entries[token]
        if len(entries) > k:
            del entries[token]
        topk_ids[row] = list(entries)
        topk[row] = list(entries.values())
    label, topk = (np.where(values <= _MINUS_INFINITY, -np.inf, values) for values in (label, topk))
    if np.isnan(topk).any() or (topk > _SLACK).any() or not (np.isfinite(label) & (label <= _SLACK)).all():
        raise AnswerError("values that are no log-probabilities: NaN, positive, or a realised token of probability 0")
    if topk_ids.size and not (topk_ids.min() >= 0 and topk_ids.max() < vocab_size):
        raise AnswerError(f"ids outside the vocabulary of {vocab_size}: the server runs another model")
    order = np.lexsort((topk_ids, -topk))
    topk_ids, topk = np.take_along_axis(topk_ids, order, 1), np.take_along_axis(topk, order, 1)
    outside = (topk_ids != np.asarray(ids[start:])[:, None]).all(1)
    if k and (label > topk[:, -1])[outside].any():
        raise AnswerError("a realised token outside the top k is more probable than one inside")
    return {
        "label_logps": label.astype(np.float32),
        "topk_ids": topk_ids.astype(np.int32),
        "topk_logps": topk.astype(np.float32),
        "topk_tail": _tail(topk, np.where(outside, label, -np.inf), vocab_size).astype(np.float32),
    }


def from_sglang(meta_info: Any, ids: Sequence[int], start: int, k: int) -> list[dict[str, dict[str, Any]] | None]:
    """SGLang's `meta_info`, asked for from position `start - 1` on, as the list that vLLM's server gives for `ids`.

    `input_token_logprobs` holds `[logprob, id, text]` a position, the first without a value; `input_top_logprobs`, if
    `k > 0`, a list of k of them. JSON has no -inf: null stands for it (sglang/srt/managers, `tokenizer_manager.py` and
    the scheduler's output processor, which reports the last id of the vocabulary as 0).

    Raises:
        AnswerError: another structure, number of tokens, or token.
    """
    length = len(ids) - start + 1

    def column(name: str) -> list[Any]:
        values = meta_info.get(name) if isinstance(meta_info, Mapping) else None
        if not isinstance(values, list) or len(values) != length:
            count = len(values) if isinstance(values, list) else "no"
            raise AnswerError(f"{name} of {count} tokens, {length} were asked for: the server scored other tokens")
        return values

    realised = column("input_token_logprobs")
    best = column("input_top_logprobs") if k else [[]] * length
    found: list[dict[str, dict[str, Any]] | None] = [None] * start
    for at, entry, listed in zip(range(start, len(ids)), realised[1:], best[1:], strict=True):
        try:
            value, number, *_ = entry
            entries = {str(other): {"logprob": _number(x)} for x, other, *_ in listed}
        except (TypeError, ValueError):
            raise AnswerError(f"position {at} is malformed: {str(entry)[:80]}, {str(listed)[:80]}") from None
        if number not in (ids[at], 0):
            raise AnswerError(f"position {at} is token {ids[at]}, the server scored {str(number)[:20]}")
        found.append({**entries, str(ids[at]): {"logprob": _number(value)}})
    return found


def _number(value: Any) -> Any:
    return _MINUS_INFINITY if value is None else value


def _tail(topk: np.ndarray, outside: np.ndarray, vocab_size: int) -> np.ndarray:
    """Log of the mass outside: `topk [T, k]`, `outside [T]` of a token known to be there, or -inf.

    None of the `vocab_size - k` ids outside is more probable than the last one inside: where these cannot hold what is
    missing, the ids were not the top k.
    """
    length, k = topk.shape
    inside = np.exp(topk).sum(1)
    if (inside + np.exp(outside) > 1 + _SLACK).any():
        raise AnswerError(f"probabilities sum to {(inside + np.exp(outside)).max():.4f}: they are not of one softmax")
    with np.errstate(divide="ignore"):
        tail = np.log1p(-np.minimum(inside, 1))
        most = np.log(vocab_size - k) + (topk[:, -1] if k else np.zeros(length))
    lost = np.exp(tail) > np.exp(most) + _SLACK
    if lost.any():
        raise AnswerError(
            f"probabilities inside the top {k} sum to {inside[lost].min():.4f}, and the ids outside, none more "
            "probable than these, cannot make up for it: one of the top k is missing, or the vocabulary is larger"
        )
    return np.maximum(np.minimum(tail, most), outside)


def _positions(prompt_logprobs: Any, length: int) -> Any:
    listed = getattr(prompt_logprobs, "start_indices", prompt_logprobs)
    count = len(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else None
    if count != length:
        raise AnswerError(
            f"prompt_logprobs of {'no' if count is None else count} tokens, {length} were sent: the server cut the "
            "prompt, added a token, or does not support prompt_logprobs"
        )
    return prompt_logprobs


def _entries(positions: Any, at: int) -> dict[int, float]:
    """`{id: logprob}` at one position, in any of the three forms."""
    if hasattr(positions, "start_indices"):
        part = slice(positions.start_indices[at], positions.end_indices[at])
        return {int(i): float(x) for i, x in zip(positions.token_ids[part], positions.logprobs[part], strict=True)}
    entries = positions[at]
    if not isinstance(entries, Mapping):
        raise AnswerError(f"position {at} has no log-probabilities")
    found: dict[int, float] = {}
    for key, value in entries.items():
        number = value.get("logprob") if isinstance(value, Mapping) else getattr(value, "logprob", None)
        is_id = type(key) is int or (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12)
        if not is_id or not isinstance(number, int | float) or isinstance(number, bool):
            raise AnswerError(f"position {at} is malformed: {key!r} with {str(value)[:80]} is no id with a logprob")
        found[int(key)] = number if isinstance(number, float) or abs(number) < 2**31 else np.nan
    return found

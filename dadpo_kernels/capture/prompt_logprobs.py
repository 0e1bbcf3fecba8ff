"""Makes a cache's targets from the `prompt_logprobs` of vLLM's Python API and server, and from SGLang's responses.

vLLM returns one element per token of the sequence (vllm/logprobs.py, vllm/v1/engine/logprobs.py). The first is None.
Each other one holds the k most probable ids and, if it is not one of them, the label: k or k + 1 ids. In
`flat_logprobs` the label comes first, and again at its place among the k. The server writes -inf as -9999.0. The
log-probabilities are those of the softmax over the whole vocabulary at temperature 1; this module does not renormalise
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..cache.format import Targets
from .errors import ResponseError

_MINUS_INFINITY = -9999.0
_SLACK = 1e-3  # by how much probabilities that sum to one may exceed it in float32


def answer_targets(prompt_logprobs: Any, ids: Sequence[int], start: int, k: int, vocab_size: int) -> Targets:
    """Targets of the answer `ids[start:]`, by the names in `ANSWER_COLUMNS`.

    Inference engines do not return the mass outside the top k. It is one minus the mass inside, in float64, as far as
    the engine's float32 shows it: a log-softmax that is rounded to float32 moves the mass by at most

        r = 2^-23 (1 + sum_i p_i |log p_i|)          over the k entries; 1.2e-7 for a confident teacher

    Below r the difference says nothing, so that r stands for it. Two bounds are known besides: none of the
    `vocab_size - k` ids outside is more probable than the k-th entry, and a label outside has its own probability:

        tail = log max(p_label outside, min(max(1 - sum_i p_i, r), (vocab_size - k) p_k))

    So `exp(tail)` differs from the true mass by at most r, and the tail is finite unless k = vocab_size. A p_k of zero
    counts as exp(-9999), the smallest that vLLM writes.

    Args:
        prompt_logprobs: of the whole sequence `ids`: a list of None and of `{id: Logprob}` (Python API) or
            `{"id": {"logprob": ...}}` (JSON), or vLLM's `FlatLogprobs`.
        start: position of the answer's first token.
        k: the number of entries that was requested.
        vocab_size: of the teacher.

    Raises:
        ResponseError: a wrong number of tokens or of entries, another label, an id outside the vocabulary, values that
            are not log-probabilities, or probabilities whose sum with the tail cannot be one.
    """
    # Read the label and the k entries of each position.
    positions = _positions(prompt_logprobs, len(ids))
    length = len(ids) - start
    topk_ids = np.empty((length, k), np.int64)
    topk = np.empty((length, k))
    label = np.empty(length)
    for row, at in enumerate(range(start, len(ids))):
        entries = _entries(positions, at)
        token = int(ids[at])
        if token not in entries or len(entries) not in (k, k + 1):
            raise ResponseError(
                f"position {at} has {len(entries)} log-probabilities, and that of token {token} is "
                f"{'one of them' if token in entries else 'missing'}; {k} were requested in addition to this token's: "
                "the server scored another sequence, or limits prompt_logprobs"
            )
        label[row] = entries[token]
        if len(entries) > k:
            del entries[token]
        topk_ids[row] = list(entries)
        topk[row] = list(entries.values())

    # Check the values.
    label, topk = (np.where(values <= _MINUS_INFINITY, -np.inf, values) for values in (label, topk))
    if np.isnan(topk).any() or (topk > _SLACK).any() or not (np.isfinite(label) & (label <= _SLACK)).all():
        raise ResponseError("some values are not log-probabilities: NaN, positive, or a label of probability 0")
    if topk_ids.size and not (topk_ids.min() >= 0 and topk_ids.max() < vocab_size):
        raise ResponseError(f"ids outside the vocabulary of {vocab_size}: the server runs another model")

    # Sort by falling probability, equal ones by id.
    order = np.lexsort((topk_ids, -topk))
    topk_ids, topk = np.take_along_axis(topk_ids, order, 1), np.take_along_axis(topk, order, 1)
    outside = (topk_ids != np.asarray(ids[start:])[:, None]).all(1)
    if k and (label > topk[:, -1])[outside].any():
        raise ResponseError("a label outside the top k is more probable than an entry inside")
    return {
        "label_logps": label.astype(np.float32),
        "topk_ids": topk_ids.astype(np.int32),
        "topk_logps": topk.astype(np.float32),
        "topk_tail": _tail(topk, np.where(outside, label, -np.inf), vocab_size).astype(np.float32),
    }


def from_sglang(meta_info: Any, ids: Sequence[int], start: int, k: int) -> list[dict[str, dict[str, Any]] | None]:
    """Convert SGLang's `meta_info`, requested from position `start - 1` on, to the list that vLLM's server returns.

    `input_token_logprobs` holds `[logprob, id, text]` for each position, the first without a value, and
    `input_top_logprobs`, if `k > 0`, a list of k of them. JSON does not have -inf, so SGLang writes null for it
    (sglang/srt/managers, `tokenizer_manager.py`). Its scheduler's output processor reports the vocabulary's last id as
    0.

    Raises:
        ResponseError: another structure, number of tokens, or label.
    """
    length = len(ids) - start + 1

    def column(name: str) -> list[Any]:
        values = meta_info.get(name) if isinstance(meta_info, Mapping) else None
        if not isinstance(values, list) or len(values) != length:
            count = len(values) if isinstance(values, list) else "no"
            raise ResponseError(f"{name} of {count} tokens, {length} were requested: the server scored other tokens")
        return values

    labels = column("input_token_logprobs")
    best = column("input_top_logprobs") if k else [[]] * length
    converted: list[dict[str, dict[str, Any]] | None] = [None] * start
    for at, label, listed in zip(range(start, len(ids)), labels[1:], best[1:], strict=True):
        try:
            value, number, *_ = label
            entries = {str(other): {"logprob": _number(x)} for x, other, *_ in listed}
        except (TypeError, ValueError):
            raise ResponseError(f"position {at} is malformed: {str(label)[:80]}, {str(listed)[:80]}") from None
        if number not in (ids[at], 0):
            raise ResponseError(f"position {at} is token {ids[at]}, the server scored {str(number)[:20]}")
        converted.append({**entries, str(ids[at]): {"logprob": _number(value)}})
    return converted


def _number(value: Any) -> Any:
    return _MINUS_INFINITY if value is None else value


def _tail(topk: np.ndarray, outside: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tail of `answer_targets`, float64 `[T]`, from `topk [T, k]`, most probable first, and `outside [T]`: the
    log-probability of a label outside the top k, or -inf.

    If the ids outside, none of which is more probable than the last entry inside, cannot have the missing mass
    together, the entries were not the top k.
    """
    length, k = topk.shape
    p = np.exp(topk)
    inside = p.sum(1)
    if (inside + np.exp(outside) > 1 + _SLACK).any():
        total = (inside + np.exp(outside)).max()
        raise ResponseError(f"probabilities sum to {total:.4f}: they are not those of one softmax")
    finite = np.maximum(topk, _MINUS_INFINITY)
    hidden = np.finfo(np.float32).eps * (1 + (p * np.abs(finite)).sum(1))
    tail = np.log(np.maximum(1 - inside, hidden))
    with np.errstate(divide="ignore"):  # k = vocab_size
        most = np.log(vocab_size - k) + (finite[:, -1] if k else np.zeros(length))
    lost = np.exp(tail) > np.exp(most) + _SLACK
    if lost.any():
        raise ResponseError(
            f"probabilities inside the top {k} sum to {inside[lost].min():.4f}, and the ids outside, none of which is "
            "more probable, cannot have the rest: one of the top k is missing, or the vocabulary is larger"
        )
    return np.maximum(np.minimum(tail, most), outside)


def _positions(prompt_logprobs: Any, length: int) -> Any:
    listed = getattr(prompt_logprobs, "start_indices", prompt_logprobs)
    count = len(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else None
    if count != length:
        raise ResponseError(
            f"prompt_logprobs of {'no' if count is None else count} tokens, {length} were sent: the server cut the "
            "prompt, added a token, or does not support prompt_logprobs"
        )
    return prompt_logprobs


def _entries(positions: Any, at: int) -> dict[int, float]:
    """`{id: logprob}` at one position, from any of the three forms."""
    if hasattr(positions, "start_indices"):
        part = slice(positions.start_indices[at], positions.end_indices[at])
        return {int(i): float(x) for i, x in zip(positions.token_ids[part], positions.logprobs[part], strict=True)}
    listed = positions[at]
    if not isinstance(listed, Mapping):
        raise ResponseError(f"position {at} does not have log-probabilities")
    entries: dict[int, float] = {}
    for key, value in listed.items():
        number = value.get("logprob") if isinstance(value, Mapping) else getattr(value, "logprob", None)
        is_id = type(key) is int or (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12)
        if not is_id or not isinstance(number, int | float) or isinstance(number, bool):
            raise ResponseError(
                f"position {at} is malformed: {key!r} with {str(value)[:80]} is not an id with a logprob"
            )
        entries[int(key)] = number if isinstance(number, float) or abs(number) < 2**31 else np.nan
    return entries

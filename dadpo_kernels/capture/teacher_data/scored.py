"""A sequence with a teacher's log-probabilities, and the columns of a record from which one is made."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

NO_ENTRY = (
    -9999.0
)  # a log-probability up to here marks a place without an entry: padding, or what vLLM writes for -inf


class TeacherDataError(ValueError):
    """A record of teacher data cannot be used."""


class Scored(NamedTuple):
    """S tokens as a teacher scored them. Row t of each array is about token t, predicted from those before it.

    Attributes:
        ids: int64 `[S]`.
        is_target: bool `[S]`, the tokens that a student is to learn; the other rows are not looked at.
        topk_ids: int64 `[S, K]`, in any order.
        topk_logps: float64 `[S, K]`, at most `NO_ENTRY` where there is no entry.
        label_logps: float64 `[S]`, of `ids[t]` itself where it may be outside the top k; NaN where it is not known.
    """

    ids: np.ndarray
    is_target: np.ndarray
    topk_ids: np.ndarray
    topk_logps: np.ndarray
    label_logps: np.ndarray

    def hits(self, offset: int = 0) -> int:
        """How many targets' rows list token `t + offset`, not counting the sequence's first and last tokens."""
        rows = np.flatnonzero(self.is_target[1:-1]) + 1
        listed = (self.topk_ids[rows] == self.ids[rows + offset, None]) & (self.topk_logps[rows] > NO_ENTRY)
        return int(listed.any(1).sum())


# Takes a record's place, for error messages, and the record; gives the sequences in it.
Reader = Callable[[str, Any], Iterator[Scored]]


def columns(where: str, record: Any, *names: str) -> list[Any]:
    """The values of columns that a record must have. Raises TeacherDataError."""
    missing = [name for name in names if not isinstance(record, Mapping) or record.get(name) is None]
    if missing:
        given = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise TeacherDataError(
            f"{where}: missing or null: {', '.join(missing)}; the record has: {given[:200] or 'nothing'}"
        )
    return [record[name] for name in names]


def integers(where: str, name: str, value: Any) -> np.ndarray:
    """A list of integers or booleans as int64 `[N]`. Raises TeacherDataError."""
    array = _array(value)
    if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise TeacherDataError(f"{where}: {name} must be a list of integers")
    return array.astype(np.int64)


def learned(where: str, record: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """Which tokens the column `labels` asks to learn, bool `[S]`; all of them without that column.

    Raises:
        TeacherDataError: the labels are other tokens than `ids`, or `attention_mask` tells of padding.
    """
    attended = record.get("attention_mask")
    if attended is not None and not integers(where, "attention_mask", attended).all():
        raise TeacherDataError(f"{where}: attention_mask has zeros: take the padding away from all columns")
    if record.get("labels") is None:
        return np.full(len(ids), True)
    labels = integers(where, "labels", record["labels"])
    if len(labels) != len(ids) or (labels != ids)[labels >= 0].any():
        raise TeacherDataError(f"{where}: labels must be the {len(ids)} tokens of input_ids, or -100")
    return labels >= 0


def lists(where: str, name: str, value: Any, length: int | None = None) -> list[Any]:
    """A list of lists, in which null stands for an empty one. Raises TeacherDataError, also for another length."""
    if not isinstance(value, list) or not all(row is None or isinstance(row, list) for row in value):
        raise TeacherDataError(f"{where}: {name} must be a list of lists")
    if length is not None and len(value) != length:
        raise TeacherDataError(f"{where}: {name} has {len(value)} rows, {length} are needed: one for each token")
    return [row or [] for row in value]


def matrix(where: str, name: str, value: Any, length: int, *, kinds: str, fill: float) -> np.ndarray:
    """A list of `length` lists of numbers, padded to the longest with `fill`; `kinds` are those of numpy's dtypes.

    Raises:
        TeacherDataError: it is something else.
    """
    rows = lists(where, name, value, length)
    width = max(map(len, rows), default=0)
    array = _array([row + [fill] * (width - len(row)) for row in rows])
    if array is None or array.size != length * width or (array.size and array.dtype.kind not in kinds):
        raise TeacherDataError(f"{where}: {name} must hold lists of {'numbers' if 'f' in kinds else 'integers'}")
    return array.reshape(length, width)


def entries(where: str, ids: tuple[str, Any], logps: tuple[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """`(topk_ids, topk_logps)` from two columns, `(name, value)` each, with `length` rows of equal widths.

    Raises:
        TeacherDataError: a column is malformed, or the widths differ.
    """
    topk_ids = matrix(where, *ids, length, kinds="iu", fill=0)
    topk_logps = matrix(where, *logps, length, kinds="fiu", fill=-np.inf)
    widths = [[len(row or []) for row in value] for _, value in (ids, logps)]
    if widths[0] != widths[1]:
        row = next(t for t, (a, b) in enumerate(zip(*widths, strict=True)) if a != b)
        raise TeacherDataError(
            f"{where}: row {row} has {widths[0][row]} {ids[0]} and {widths[1][row]} {logps[0]}: each id needs one"
        )
    return topk_ids.astype(np.int64), topk_logps.astype(np.float64)


def one_later(rows: np.ndarray, first: Any) -> np.ndarray:
    """Rows that are about the next token each, moved to the token that they are about; the last one is dropped."""
    return np.concatenate([np.full_like(rows[:1], first), rows[:-1]])


def _array(value: Any) -> np.ndarray | None:
    """A numpy array from lists of numbers, or None if they are ragged, or an integer is too large."""
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):
        return None

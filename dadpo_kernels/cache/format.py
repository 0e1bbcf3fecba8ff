"""One pair as a row of the cache: binary columns of fixed-width little-endian numbers, checked when they are read.

The bytes of a column are grouped by significance (all lowest bytes, then all second ones, ...; Parquet calls this
BYTE_STREAM_SPLIT, but has it for no type that reads as fast as binary). zstd then makes top-64 targets about 15%
smaller: 201 instead of 237 bytes a token on SmolLM2's.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from .errors import CacheFormatError, CacheVocabularyError
from .pairs import Pair

ANSWERS = ("chosen", "rejected")
Targets = dict[str, np.ndarray]  # of one answer of a pair, by the names in ANSWER_COLUMNS
# Per answer of T tokens, `{chosen,rejected}_{name}`. float16 loses less of a log-probability than bfloat16 would
# (at most 0.008 nats against 0.06), and binary reads far faster than nested lists.
ANSWER_COLUMNS: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<i4"),  # [T]
    "label_logps": np.dtype("<f4"),  # [T]
    "topk_ids": np.dtype("<i4"),  # [T, K], most probable first
    "topk_logps": np.dtype("<f2"),  # [T, K]
    "topk_tail": np.dtype("<f4"),  # [T]
}
TOKEN_COLUMNS = ("index", "prompt_ids", *(f"{side}_ids" for side in ANSWERS))
TEACHER_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.binary(), nullable=False),
        *(pa.field(f"{side}_{name}", pa.binary(), nullable=False) for side in ANSWERS for name in ANSWER_COLUMNS),
    ]
)
# Sums over an answer, and the number of its tokens, by which a mix-up with other pairs is noticed.
REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        *(pa.field(f"{side}_logps", pa.float64(), nullable=False) for side in ANSWERS),
        *(pa.field(f"{side}_tokens", pa.int64(), nullable=False) for side in ANSWERS),
    ]
)


def teacher_row(pair: Pair, chosen: dict[str, np.ndarray], rejected: dict[str, np.ndarray]) -> dict[str, Any]:
    """A row of `TEACHER_SCHEMA`; `chosen` and `rejected` hold the arrays that `ANSWER_COLUMNS` names, but the ids."""
    row: dict[str, Any] = {"index": pair.index, "prompt_ids": pack(pair.prompt_ids, "ids")}
    for side, ids, targets in (("chosen", pair.chosen_ids, chosen), ("rejected", pair.rejected_ids, rejected)):
        row[f"{side}_ids"] = pack(ids, "ids")
        row |= {f"{side}_{name}": pack(values, name) for name, values in targets.items()}
    return row


def reference_row(pair: Pair, chosen: dict[str, np.ndarray], rejected: dict[str, np.ndarray]) -> dict[str, Any]:
    """A row of `REFERENCE_SCHEMA`, from the reference's `label_logps` of each token."""
    row: dict[str, Any] = {"index": pair.index}
    for side, targets in (("chosen", chosen), ("rejected", rejected)):
        row[f"{side}_logps"] = float(targets["label_logps"].sum(dtype=np.float64))
        row[f"{side}_tokens"] = len(targets["label_logps"])
    return row


def read_pair(row: dict[str, Any]) -> Pair:
    """The token ids of a row that has `TOKEN_COLUMNS` at least."""
    where = f"pair {row['index']}"
    ids = (unpack(row[name], "ids", f"{where}, {name}") for name in TOKEN_COLUMNS[1:])
    pair = Pair(row["index"], *ids)
    for name in TOKEN_COLUMNS[1:]:
        if not len(getattr(pair, name)):
            raise CacheFormatError(f"{where}: {name} is empty")
    return pair


def read_targets(row: dict[str, Any], pair: Pair, k: int, vocab_size: int) -> dict[str, np.ndarray]:
    """The targets of both answers, `{side}_{name}`, of shapes `[T]` and `[T, K]`.

    Raises:
        CacheFormatError: a column has another length than the answer asks for, or holds NaN or positive values.
        CacheVocabularyError: an id is not in `[0, vocab_size)`.
    """
    where = f"pair {row['index']}"
    targets = {}
    for side, answer in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        for name in ("label_logps", "topk_ids", "topk_logps", "topk_tail"):
            column = f"{side}_{name}"
            shape = (len(answer), k) if name in ("topk_ids", "topk_logps") else (len(answer),)
            values = unpack(row[column], name, f"{where}, {column}")
            if values.size != np.prod(shape):
                raise CacheFormatError(f"{where}: {column} holds {values.size} values, {list(shape)} are needed")
            if values.dtype.kind == "f" and not (values <= 1e-3).all():  # a log-probability, up to rounding
                raise CacheFormatError(
                    f"{where}: {column} holds values that are no log-probabilities (NaN or positive)"
                )
            targets[column] = values.reshape(shape)
        check_ids(where, targets[f"{side}_topk_ids"], vocab_size)
    for ids in pair.ids:
        check_ids(where, ids, vocab_size)
    return targets


def check_ids(where: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raise CacheVocabularyError unless all ids are in `[0, vocab_size)`."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= vocab_size:
        raise CacheVocabularyError(
            f"{where}: id {low if low < 0 else high} is outside the vocabulary of {vocab_size}: the teacher's and the "
            "student's must agree. Resize the student's embeddings, or capture from a teacher of its family"
        )


def pack(values: np.ndarray, name: str) -> bytes:
    """An array as the content of a binary column of the type that `ANSWER_COLUMNS` gives for `name`."""
    dtype = ANSWER_COLUMNS[name]
    return values.astype(dtype).reshape(-1, 1).view(np.uint8).T.tobytes()


def unpack(content: bytes, name: str, where: str = "") -> np.ndarray:
    """The array, flat. Raises CacheFormatError if the content is no whole number of values."""
    dtype = ANSWER_COLUMNS[name]
    if len(content) % dtype.itemsize:
        raise CacheFormatError(f"{where}: {len(content)} bytes are no whole number of {dtype.name}")
    planes = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)

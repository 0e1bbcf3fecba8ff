"""One pair as a Parquet row: binary columns of fixed-width little-endian numbers, checked when they are read.

The bytes of a column are grouped by significance: first all lowest bytes, then all second bytes, and so on. Parquet
calls this BYTE_STREAM_SPLIT, but does not define it for binary columns, and its other types read more slowly. The
grouping makes zstd's output for top-64 targets about 15% smaller: 201 instead of 237 bytes per token on SmolLM2's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import CacheFormatError, CacheVocabularyError
from .pairs import SIDES, Pair

Targets = dict[str, np.ndarray]  # of one answer of a pair, by the names in ANSWER_COLUMNS
# For an answer of T tokens; the columns are named `{side}_{name}`. float16 loses less of a log-probability than
# bfloat16 would (at most 0.008 nats against 0.06), and binary columns read far faster than nested lists.
ANSWER_COLUMNS: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<i4"),  # [T]
    "label_logps": np.dtype("<f4"),  # [T]
    "topk_ids": np.dtype("<i4"),  # [T, K], most probable first
    "topk_logps": np.dtype("<f2"),  # [T, K]
    "topk_tail": np.dtype("<f4"),  # [T]
}
TOKEN_COLUMNS = ("index", "prompt_ids", *(f"{side}_ids" for side in SIDES))
TEACHER_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.binary(), nullable=False),
        *(pa.field(f"{side}_{name}", pa.binary(), nullable=False) for side in SIDES for name in ANSWER_COLUMNS),
    ]
)
# Sums over an answer, and its number of tokens: a wrong number shows that the reference belongs to other pairs.
REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        *(pa.field(f"{side}_logps", pa.float64(), nullable=False) for side in SIDES),
        *(pa.field(f"{side}_tokens", pa.int64(), nullable=False) for side in SIDES),
    ]
)


def teacher_row(pair: Pair, chosen: Targets, rejected: Targets) -> dict[str, Any]:
    """A row of `TEACHER_SCHEMA`. `chosen` and `rejected` hold all arrays of `ANSWER_COLUMNS` except the ids."""
    row: dict[str, Any] = {"index": pair.index, "prompt_ids": pack(pair.prompt_ids, "ids")}
    for side, ids, targets in (("chosen", pair.chosen_ids, chosen), ("rejected", pair.rejected_ids, rejected)):
        row[f"{side}_ids"] = pack(ids, "ids")
        row |= {f"{side}_{name}": pack(values, name) for name, values in targets.items()}
    return row


def reference_row(pair: Pair, chosen: Targets, rejected: Targets) -> dict[str, Any]:
    """A row of `REFERENCE_SCHEMA`, from the reference's `label_logps [T]` of both answers."""
    row: dict[str, Any] = {"index": pair.index}
    for side, targets in (("chosen", chosen), ("rejected", rejected)):
        row[f"{side}_logps"] = float(targets["label_logps"].sum(dtype=np.float64))
        row[f"{side}_tokens"] = len(targets["label_logps"])
    return row


def read_pair(row: dict[str, Any], sides: Sequence[str] = SIDES) -> Pair:
    """The token ids of a row that has at least the `TOKEN_COLUMNS`.

    Args:
        sides: the answers that the cache's pairs have (`Manifest.sides`).

    Raises:
        CacheFormatError: a column is malformed, empty, or not empty though its side is none of `sides`.
    """
    where = f"pair {row['index']}"
    ids = (unpack(row[name], "ids", f"{where}, {name}") for name in TOKEN_COLUMNS[1:])
    pair = Pair(row["index"], *ids)
    for name in TOKEN_COLUMNS[1:]:
        wanted = name == "prompt_ids" or name.removesuffix("_ids") in sides
        if (len(getattr(pair, name)) > 0) != wanted:
            raise CacheFormatError(
                f"{where}: {name} is {'empty' if wanted else 'not empty, and settings.sides lacks it'}"
            )
    return pair


def read_targets(row: dict[str, Any], pair: Pair, k: int, vocab_size: int) -> dict[str, np.ndarray]:
    """The targets of both answers, `{side}_{name}`, of shapes `[T]` and `[T, K]`.

    Raises:
        CacheFormatError: the length of a column does not fit the answer, or it holds NaN or positive values.
        CacheVocabularyError: an id is not in `[0, vocab_size)`.
    """
    where = f"pair {row['index']}"
    targets = {}
    for side, answer_ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        for name in ("label_logps", "topk_ids", "topk_logps", "topk_tail"):
            column = f"{side}_{name}"
            shape = (len(answer_ids), k) if name in ("topk_ids", "topk_logps") else (len(answer_ids),)
            values = unpack(row[column], name, f"{where}, {column}")
            if values.size != np.prod(shape):
                raise CacheFormatError(f"{where}: {column} holds {values.size} values, {list(shape)} are needed")
            if values.dtype.kind == "f" and not (values <= 1e-3).all():  # a log-probability, up to rounding
                raise CacheFormatError(
                    f"{where}: {column} holds values that are not log-probabilities (NaN or positive)"
                )
            targets[column] = values.reshape(shape)
        check_ids(where, targets[f"{side}_topk_ids"], vocab_size)
    for ids in pair.ids:
        check_ids(where, ids, vocab_size)
    return targets


def empty_targets(k: int) -> Targets:
    """The targets of an answer without tokens."""
    shapes = {name: (0, k) if name in ("topk_ids", "topk_logps") else (0,) for name in ANSWER_COLUMNS if name != "ids"}
    return {name: np.empty(shape, ANSWER_COLUMNS[name]) for name, shape in shapes.items()}


def check_pair_ids(pairs: Iterable[Pair], vocab_size: int) -> None:
    """Raise CacheVocabularyError unless all token ids of all pairs are in `[0, vocab_size)`."""
    for pair in pairs:
        for ids in pair.ids:
            check_ids(f"pair {pair.index}", ids, vocab_size)


def check_ids(where: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raise CacheVocabularyError unless all ids are in `[0, vocab_size)`; the message begins with `where`."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= vocab_size:
        raise CacheVocabularyError(
            f"{where}: id {low if low < 0 else high} is outside the vocabulary of {vocab_size}: the vocabularies of "
            "teacher and student must agree. Resize the student's embeddings, or capture from a teacher of its family"
        )


def pack(values: np.ndarray, name: str) -> bytes:
    """An array as the content of a binary column, in the dtype that `ANSWER_COLUMNS` gives for `name`."""
    dtype = ANSWER_COLUMNS[name]
    return values.astype(dtype).reshape(-1, 1).view(np.uint8).T.tobytes()


def unpack(content: bytes, name: str, where: str = "") -> np.ndarray:
    """The array in a binary column, flattened.

    Raises:
        CacheFormatError: the number of bytes is not a multiple of the dtype's size.
    """
    dtype = ANSWER_COLUMNS[name]
    if len(content) % dtype.itemsize:
        raise CacheFormatError(f"{where}: {len(content)} bytes are not a whole number of {dtype.name} values")
    planes = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)

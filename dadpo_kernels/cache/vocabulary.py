"""The token of each id, stored with a cache, so that another tokenizer is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CacheFormatError, CacheTokenizerError
from .format import TEACHER_SCHEMA, unpack
from .reader import RowReader
from .shards import Manifest, check_sha256
from .storage import parse

VOCABULARY = "vocabulary.json"


def vocabulary(tokenizer: Any) -> list[str | None]:
    """The token of each id, added tokens included; None where the tokenizer does not have a token with this id."""
    by_id: dict[int, str] = {}
    for token, number in sorted(tokenizer.get_vocab().items()):
        by_id.setdefault(number, token)
    return [by_id.get(number) for number in range(max(by_id, default=-1) + 1)]


def vocabulary_file(tokens: list[str | None]) -> bytes:
    """The content of a cache's `vocabulary.json`; its SHA-256 is the tokenizer's fingerprint."""
    return (json.dumps(tokens, ensure_ascii=True, indent=0) + "\n").encode()


def check_vocabulary(directory: Path, manifest: Manifest, tokenizer: Any) -> None:
    """Compare the vocabulary stored in a teacher cache with a tokenizer's, id by id.

    An id that only one of them has is allowed, because models of one family pad or extend their vocabularies, and so
    is an id that occurs nowhere in the cache, as a reserved token that was renamed.

    Raises:
        CacheTokenizerError: an id that occurs stands for different tokens in the two.
        CacheChecksumError, CacheFormatError: the stored vocabulary is damaged or missing.
    """
    stored, given = read_vocabulary(directory, manifest), vocabulary(tokenizer)
    both = enumerate(zip(stored, given, strict=False))
    different = [number for number, (a, b) in both if a != b and a is not None and b is not None]
    if different and (place := _occurrence(directory, manifest, different)) is not None:
        pair, number = place
        raise CacheTokenizerError(
            f"{directory} was captured with another tokenizer: id {number}, which occurs in pair {pair}, is "
            f"{stored[number]!r} in the cache and {given[number]!r} in the given tokenizer. Teacher and student must "
            "share their tokenizer"
        )


def _occurrence(directory: Path, manifest: Manifest, numbers: list[int]) -> tuple[int, int] | None:
    """A pair that has one of the ids, as a token or in a top k, and that id."""
    reader = RowReader(directory, TEACHER_SCHEMA)
    columns = [name for name in TEACHER_SCHEMA.names if name == "index" or name.endswith("_ids")]
    for shard in manifest.shards:
        for row in reader.read_columns(shard, columns):
            for name in columns[1:]:
                ids = unpack(row[name], "ids", f"pair {row['index']}, {name}")
                if (occurs := np.isin(ids, numbers)).any():
                    return row["index"], int(ids[occurs][0])
    return None


def read_vocabulary(directory: Path, manifest: Manifest) -> list[str | None]:
    """The token of each id, as a teacher cache stores it. Raises CacheChecksumError or CacheFormatError."""
    path = directory / VOCABULARY
    if not path.is_file():
        raise CacheFormatError(f"{path} is missing: copy it again or capture again")
    content = check_sha256(path, manifest.settings["tokenizer_sha256"])
    stored = parse(path, content, "capture again")
    if not isinstance(stored, list) or not all(token is None or isinstance(token, str) for token in stored):
        raise CacheFormatError(f"{path} is malformed: a list of strings and nulls is needed")
    return stored

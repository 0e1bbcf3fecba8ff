"""The token of each id, stored with a cache, so that another tokenizer is refused with the reason."""

import json
from pathlib import Path
from typing import Any

from .errors import CacheFormatError, CacheTokenizerError
from .shards import Manifest, check_sha256

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

    An id that only one of them has is allowed, because models of one family pad or extend their vocabularies.

    Raises:
        CacheTokenizerError: an id stands for different tokens in the two.
        CacheChecksumError, CacheFormatError: the stored vocabulary is damaged or missing.
    """
    stored = read_vocabulary(directory, manifest)
    for number, (cached, given) in enumerate(zip(stored, vocabulary(tokenizer), strict=False)):
        if cached != given and cached is not None and given is not None:
            raise CacheTokenizerError(
                f"{directory} was captured with another tokenizer: id {number} is {cached!r} in the cache and "
                f"{given!r} in the given tokenizer. Teacher and student must share their tokenizer"
            )


def read_vocabulary(directory: Path, manifest: Manifest) -> list[str | None]:
    """The token of each id, as a teacher cache stores it. Raises CacheChecksumError or CacheFormatError."""
    path = directory / VOCABULARY
    if not path.is_file():
        raise CacheFormatError(f"{path} is missing: copy it again or capture again")
    content = check_sha256(path, manifest.settings["tokenizer_sha256"])
    try:
        stored = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{path} is not JSON ({error}): capture again") from error
    if not isinstance(stored, list) or not all(token is None or isinstance(token, str) for token in stored):
        raise CacheFormatError(f"{path} is malformed: a list of strings and nulls is needed")
    return stored

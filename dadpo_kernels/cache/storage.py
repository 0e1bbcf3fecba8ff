"""Reads files, and says what is wrong with a file or a disk as a CacheError."""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CacheError, CacheFormatError

_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again, it continues where it stopped",
    errno.EDQUOT: "free some space and run the same command again, it continues where it stopped",
    errno.EISDIR: "move this directory, a file with its name is needed",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "create its directory",
    errno.ENOTDIR: "choose another directory",
}


@contextlib.contextmanager
def storage_errors(path: Path, let_through: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Raise an OSError of the block, unless let through, as a CacheError that names the file and the remedy."""
    try:
        yield
    except let_through:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "make it and its directory readable and writable")
        raise CacheError(f"{path}: {error.strerror}: {remedy}") from None


def parse(path: Path, content: bytes, remedy: str) -> Any:
    """The JSON value of a file's content. Raises CacheFormatError with the remedy if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python converts
        raise CacheFormatError(f"{path} is not JSON ({error}): {remedy}") from None

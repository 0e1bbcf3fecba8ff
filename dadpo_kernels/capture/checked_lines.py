"""A file of JSON lines that only grows, in which an unfinished run keeps its results, each with a checksum."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cache.errors import CacheSettingsError
from ..cache.lock import lock
from ..cache.storage import storage_errors

logger = logging.getLogger("dadpo_kernels")


class CheckedLines:
    """Records in a file, for one process at a time. A record is on the disk when `append` returns.

        SHA-256 of the rest of the line           {"settings": ...}
        SHA-256 of settings and rest of the line  a record
        ...

    A line is read if its checksum is right, so it was written by a run with these settings and has not changed. Other
    lines are removed, with a warning, and `records` lacks what they held. The end of a file that a kill cut is removed
    silently.

    Attributes:
        records: what the file held when it was opened.

    Raises:
        CacheSettingsError: the file was written with other settings, or is another kind of file.
        CacheBusyError: another process has opened it.
        CacheError: it cannot be read or written; `append` raises this too.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._header = _checked(b"", json.dumps({"settings": settings}).encode())
        with storage_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._file = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115  # closed by close()
            try:
                lock(self._file, path)
                self.records: list[Any] = self._read()
            except BaseException:
                self._file.close()
                raise

    def append(self, record: Any) -> None:
        with storage_errors(self._path):
            self._write(_checked(self._header, json.dumps(record).encode()) + b"\n")

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[Any]:
        content = self._file.read()
        begun = content.startswith(self._header)
        end = len(self._header) if begun else content.find(b"\n")
        *lines, _ = content[end + 1 :].split(b"\n")
        intact = [line for line in lines if _is_intact(self._header, line)]
        if not begun and not intact and not self._header.startswith(content):
            raise CacheSettingsError(self._refusal(content[: max(end, 0)]))

        # Remove the other lines. In the usual case they are a part of one at the end.
        if damaged := len(lines) - len(intact):
            logger.warning("%s: %d damaged lines are removed, what they held is computed again", self._path, damaged)
        whole = b"".join(line + b"\n" for line in (self._header, *intact))
        if content != whole:
            kept = content.startswith(whole)
            self._file.truncate(len(whole) if kept else 0)
            self._write(b"" if kept else whole)
        return [json.loads(line.partition(b" ")[2]) for line in intact]

    def _write(self, content: bytes) -> None:
        """Append the content as a whole or, where that fails, not at all."""
        end = os.fstat(self._file.fileno()).st_size
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def _refusal(self, first: bytes) -> str:
        if not _is_intact(b"", first):
            return f"{self._path} is not a file of answers, or its beginning is damaged: move it"
        previous, settings = (json.loads(line.partition(b" ")[2])["settings"] for line in (first, self._header))
        names = [name for name in (*previous, *settings) if previous.get(name) != settings.get(name)]
        return f"{self._path} holds answers of another run ({', '.join(dict.fromkeys(names))} differ): move it"


def settings_of(path: Path) -> dict[str, Any]:
    """The settings with which a file was written; none if there is no such file, or its first line is damaged."""
    if not path.is_file():
        return {}
    with storage_errors(path), path.open("rb") as file:
        first = file.readline().removesuffix(b"\n")
    return json.loads(first.partition(b" ")[2])["settings"] if _is_intact(b"", first) else {}


def _checked(settings: bytes, content: bytes) -> bytes:
    return hashlib.sha256(settings + content).hexdigest().encode() + b" " + content


def _is_intact(settings: bytes, line: bytes) -> bool:
    return line == _checked(settings, line.partition(b" ")[2])

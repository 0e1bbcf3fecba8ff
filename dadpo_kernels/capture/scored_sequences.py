"""Stores the scored sequences of an unfinished shard, so that a server does not have to score them again."""

import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import CacheSettingsError
from ..cache.format import ANSWER_COLUMNS, Targets, pack, unpack
from .checked_lines import CheckedLines

logger = logging.getLogger("dadpo_kernels")

_COLUMNS = tuple(name for name in ANSWER_COLUMNS if name != "ids")


class ScoredSequences:
    """Targets by sequence number in a file of `CheckedLines`. Each write survives a kill at any moment.

    A damaged sequence, or one with other token ids, counts as not stored. A file that is damaged at its beginning is
    deleted. Use an object from one thread only.

    Args:
        path: the file.
        settings: those of the capture, by which the targets are known.

    Raises:
        CacheError: the file cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        try:
            self._lines = CheckedLines(path, settings)
        except CacheSettingsError as error:
            logger.warning("%s. It is deleted, its sequences are scored again", error)
            path.unlink()
            self._lines = CheckedLines(path, settings)
        self._stored = {record["number"]: record for record in self._lines.records}

    def read(self, number: int, ids: Sequence[int], start: int) -> Targets | None:
        """Targets of sequence `number`, the answer `ids[start:]` after its prompt; None if they are not stored."""
        record = self._stored.get(number)
        if record is None or record["sequence"] != _fingerprint(ids, start):
            return None
        flat = {name: unpack(base64.b64decode(record[name]), name) for name in _COLUMNS}
        two_dimensional = ("topk_ids", "topk_logps")
        return {name: v.reshape(len(ids) - start, -1) if name in two_dimensional else v for name, v in flat.items()}

    def write(self, number: int, ids: Sequence[int], start: int, targets: Targets) -> None:
        columns = {name: base64.b64encode(pack(targets[name], name)).decode() for name in _COLUMNS}
        self._lines.append({"number": number, "sequence": _fingerprint(ids, start), **columns})

    def close(self) -> None:
        self._lines.close()


def _fingerprint(ids: Sequence[int], start: int) -> str:
    return hashlib.sha256(np.array([start, *ids], dtype="<i8").tobytes()).hexdigest()

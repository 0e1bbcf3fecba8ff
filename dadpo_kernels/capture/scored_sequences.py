"""Stores the scored sequences of an unfinished shard, so that a server does not have to score them again."""

import logging
import sqlite3
from pathlib import Path

from ..cache.format import ANSWER_COLUMNS, Targets, pack, unpack

logger = logging.getLogger("dadpo_kernels")

_COLUMNS = tuple(name for name in ANSWER_COLUMNS if name != "ids")


class ScoredSequences:
    """Targets by sequence number in an SQLite file. Each write is a commit, which survives a kill at any moment.

    A damaged file is deleted, and its sequences are scored again. Use an object from one thread only.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._database = self._open(path)
        except sqlite3.DatabaseError as error:
            logger.debug("%s is deleted, its sequences are scored again: %s", path, error)
            path.unlink()
            self._database = self._open(path)

    def read(self, number: int, tokens: int) -> Targets | None:
        """Targets of sequence `number`, whose answer has `tokens` tokens; None if they are not stored."""
        row = self._database.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM answers WHERE number = ?", (number,)
        ).fetchone()
        if row is None:
            return None
        flat = {name: unpack(content, name) for name, content in zip(_COLUMNS, row, strict=True)}
        two_dimensional = ("topk_ids", "topk_logps")
        return {name: v.reshape(tokens, -1) if name in two_dimensional else v for name, v in flat.items()}

    def write(self, number: int, targets: Targets) -> None:
        row = (number, *(pack(targets[name], name) for name in _COLUMNS))
        self._database.execute(f"INSERT INTO answers VALUES ({', '.join('?' * len(row))})", row)

    def close(self) -> None:
        self._database.close()

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, isolation_level=None)
        try:
            columns = ", ".join(f"{name} BLOB NOT NULL" for name in _COLUMNS)
            database.execute(f"CREATE TABLE IF NOT EXISTS answers (number INTEGER PRIMARY KEY, {columns})")
            if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("the integrity check failed")
        except BaseException:
            database.close()
            raise
        return database

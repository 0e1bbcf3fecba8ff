"""One writer at a time: a lock on an open file, which the kernel releases when the process closes it or dies."""

from pathlib import Path
from typing import IO, Any

from .errors import CacheBusyError


def lock(file: IO[Any], what: Path) -> None:
    """Lock an open file until it is closed.

    Args:
        what: the directory or file that the lock protects, for the message.

    Raises:
        CacheBusyError: another process has locked it.
    """
    import fcntl  # Unix only; reading a cache does not need it

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CacheBusyError(f"another process is writing to {what}: wait for it or stop it") from None

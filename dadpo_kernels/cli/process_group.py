"""Ends the process group of a command, whether the command succeeds, fails or is interrupted."""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

_SECONDS = 10.0  # to wait for the end of the group after an error


@contextlib.contextmanager
def ending_process_group() -> Iterator[None]:
    """End the process group of `torch.distributed` that is initialised inside the block, if there is one.

    A thread of the group that still runs while Python exits can kill the process with `terminate called without an
    active exception`: gloo's threads release the tensors of a finished operation, for which they need the interpreter
    (https://github.com/pytorch/pytorch/pull/179291). The process then reports failure although its work is done. The
    threads end with the group's last reference, not with `destroy_process_group`, and a trainer that is done but not
    yet collected holds some: so the block is followed by a collection. The last reference is then ours. Python's own
    release of a group lets the threads have the interpreter while it waits for them; that of DDP's `Reducer`, which a
    collection may come to last, does not, and both would wait for ever. A group that exists before the block belongs
    to the caller, and stays.

    After an error, destroying the group can block, because it waits for operations in which the other processes may
    never take part. But this process must exit, so that the launcher notices the failure and stops the others. So
    another thread destroys the group, and is left alone after 10 seconds.
    """
    existed = _is_initialized()
    try:
        yield
    except BaseException:
        if _is_initialized() and not existed:
            thread = threading.Thread(target=_destroy, daemon=True)
            thread.start()
            thread.join(_SECONDS)
        raise
    if _is_initialized() and not existed:
        group = sys.modules["torch.distributed"].group.WORLD
        _destroy()
        gc.collect()
        del group


def _is_initialized() -> bool:
    """Looks for the module first: a command that never imported torch does not pay for it here."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _destroy() -> None:
    sys.modules["torch.distributed"].destroy_process_group()

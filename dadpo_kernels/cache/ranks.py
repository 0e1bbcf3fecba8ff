"""Several processes that work on one data set, started by `torchrun` or `accelerate launch` on one node or on many."""

import os
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from .errors import CacheError


class Ranks(NamedTuple):
    """The number of this process, `rank`, and the number of all processes, `size`."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Wait until all processes have reached this point. Raises CacheError if one of them has ended."""
        if self.size == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise CacheError(f"another process has ended before this one: see what it says ({error})") from None


def ranks() -> Ranks:
    """Read this process's rank from the launcher's environment, and initialise a process group if there is none.

    The group uses gloo, because it only serves barriers. Its timeout is 7 days, because at a barrier the fast
    processes wait for the slowest one. The commands end the group; a script that calls a capture function itself calls
    `torch.distributed.destroy_process_group()` at its end.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(0, 1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Ranks(dist.get_rank(), dist.get_world_size())

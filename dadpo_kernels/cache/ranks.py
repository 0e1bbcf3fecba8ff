"""Several processes over one data set, as `torchrun` and `accelerate launch` start them on one node or many."""

import os
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist


class Ranks(NamedTuple):
    """This process's number among all of them."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def ranks() -> Ranks:
    """From the environment that the launchers set; joins the processes into a group if nobody has yet.

    gloo, since nothing but barriers goes through it; and days of patience, since the others wait at one while the
    slowest works.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(0, 1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Ranks(dist.get_rank(), dist.get_world_size())

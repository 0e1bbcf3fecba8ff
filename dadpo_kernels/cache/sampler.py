"""A random order that reads few files at a time and gives each process the same number of pairs."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from .dataset import PairDataset


class ShardSampler(Sampler[int]):
    """Positions of a `PairDataset`, shuffled within a few shards at a time.

    The shards are put in random order and taken in groups of `shards`; the pairs of a group are shuffled together.
    Only the files of one group are read at a time, so that a cache on a slow or remote file system is read about once
    per epoch, and its pages need not all stay in memory. The pairs of one shard have similar lengths, so more shards
    per group give better mixed batches.

    All processes draw the same order, and each takes every `num_replicas`-th position of it. If the number of pairs
    is not a multiple of `num_replicas`, the last few are left out; they are other pairs in each epoch. Call
    `set_epoch` before each epoch.

    Args:
        shards: number of shards per group.
        seed: of the random order.
        num_replicas, rank: number of processes, and of this process; None takes them from `torch.distributed` if it
            is initialised, else one process.

    Raises:
        ValueError: `rank` or `shards` is out of range.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        shards: int = 8,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if running else 1
        self.rank = rank if rank is not None else dist.get_rank() if running else 0
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank={self.rank} is outside [0, {self.num_replicas})")
        if shards < 1:
            raise ValueError(f"shards must be at least 1, got {shards}")
        self._by_shard = dataset.positions_by_shard()
        self._shards, self._seed, self._epoch = shards, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self._by_shard)) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + 2**20 * self._epoch)
        files = torch.randperm(len(self._by_shard), generator=generator).tolist()
        order: list[int] = []
        for at in range(0, len(files), self._shards):
            group = [position for file in files[at : at + self._shards] for position in self._by_shard[file]]
            order += [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        return iter(order[: len(self) * self.num_replicas][self.rank :: self.num_replicas])

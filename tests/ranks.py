"""Runs a function on several processes that talk through gloo, and gives back what each returned."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Children are forked from one process that has imported what takes seconds to import, and nothing else.
mp.set_forkserver_preload(["dadpo_kernels.vocab_parallel"])


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`, tensors and plain containers of them; functions of a module."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (size, Path(directory), function, args)
        mp.start_processes(_rank, arguments, nprocs=size, start_method="forkserver")
        return [torch.load(Path(directory) / f"{rank}.pt") for rank in range(size)]


def _rank(rank: int, size: int, directory: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # A rank that waits for one that is gone fails soon, not after half an hour.
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=size, timeout=limit)
    torch.save(function(*args), directory / f"{rank}.pt")
    dist.destroy_process_group()

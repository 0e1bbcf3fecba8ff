"""Runs a function on several processes that talk through gloo, and gives back what each returned."""

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Children are forked from one process that has imported what takes seconds to import, and has done nothing else.
mp.set_forkserver_preload(
    ["dadpo_kernels.ops.vocab_parallel", "dadpo_kernels.train.trainer", "transformers.models.llama.modeling_llama"]
)

# The engine itself is no part of the tests' extra; a stand-in for its protocol is tested everywhere.
needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="pip install 'dadpo-kernels[deepspeed]'")


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`: a module's function, plain containers of tensors and numbers."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (size, free_port(), Path(directory), function, args)
        mp.start_processes(_rank, arguments, nprocs=size, start_method="forkserver")
        return [torch.load(Path(directory) / f"{rank}.pt") for rank in range(size)]


def _rank(rank: int, size: int, port: int, directory: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    # A rank that waits for one that is gone fails soon, not after half an hour.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.save(function(*args), directory / f"{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Traffic(TorchDispatchMode):
    """Lists the collectives that run inside, `(name, elements, bytes)`, and the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0]
            self.calls.append((name, max(t.numel() for t in tensors), sum(t.nbytes for t in tensors)))
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out

    def bytes(self) -> dict[str, int]:
        """Bytes handed to collectives, by name."""
        names = {name for name, _, _ in self.calls}
        return {name: sum(b for n, _, b in self.calls if n == name) for name in names}

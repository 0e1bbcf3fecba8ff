"""The CPU kernels run on PyTorch's own threads where they can, else on others, with the same result."""

import os
import subprocess
import sys

import pytest
import torch

from dadpo_kernels.ops.backends.cpu import _cpu

PROGRAM = """
import os
import torch
from dadpo_kernels import linear_selected_logps

torch.set_num_threads(3)
torch.ones(1 << 20).mul_(2).exp_()  # PyTorch's threads are up

def gradients():
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 64, generator=g, requires_grad=True) for n in (400, 9000)]
    out = linear_selected_logps(*leaves, torch.arange(400), torch.arange(1200).view(400, 3), backend="cpu")
    grads = torch.autograd.grad(out.label.sum() + out.tail.sum(), leaves)
    return [grad.view(torch.int32).long().sum().item() for grad in grads]  # of the bits: in any order the same

print(gradients(), flush=True)
"""
FORK = """
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a data loader's worker does
    print(gradients(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
WATCH = """
import threading, time
tasks = set(os.listdir("/proc/self/task"))
seen = set()

def watch():
    end = time.monotonic() + 3  # a kernel's thread lives for milliseconds
    while time.monotonic() < end:
        seen.update(os.listdir("/proc/self/task"))

watcher = threading.Thread(target=watch)
watcher.start()
while watcher.is_alive():
    gradients()
print(len(seen - tasks))
"""


def run(program: str, **environment: str) -> list[str]:
    command, env = [sys.executable, "-c", program], os.environ | environment
    done = subprocess.run(command, env=env, timeout=120, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(_cpu is None or sys.platform != "linux", reason="needs the extension, on Linux")
class TestThreads:
    def test_they_are_pytorchs(self):
        backend = torch.__config__.parallel_info().split("ATen parallel backend:")[1]
        assert _cpu.shares_threads() == ("OpenMP" in backend)

    def test_none_is_started(self):
        assert run(PROGRAM + WATCH)[1] == "1"  # the watcher itself

    def test_a_forked_process(self):
        parent, forked = run(PROGRAM + FORK)
        assert parent == forked

    def test_fewer_threads_than_asked_for(self):
        allowed, limited = run(PROGRAM), run(PROGRAM + WATCH, OMP_THREAD_LIMIT="2")
        assert limited[0] == allowed[0]
        assert int(limited[1]) > 1

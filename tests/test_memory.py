"""Nothing holds `[tokens, V]`: peak memory of a fresh process, forward and backward, as the tokens grow 16-fold."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from dadpo_kernels import linear_selected_logps, linear_topk_logps
rows, what, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
V, H, K = 60_000, 16, 4
hidden = torch.randn(rows, H, requires_grad=True)
weight = torch.randn(V, H, requires_grad=True)
labels, ids = torch.randint(V, (rows,)), torch.randint(V, (rows, K))
hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
torch.mm(hidden.detach()[:64], weight.detach()[:64].T)

def peak():  # of this process alone: getrusage's ru_maxrss is inherited from the parent that forked it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

before = peak()
if what == "topk":
    assert linear_topk_logps(hidden, weight, K, backend=backend).logps.abs().sum() > 0
else:
    options = {"grad_tolerance": 1e-2, "memory_budget": 0} if what == "live" else {"memory_budget": int(what)}
    out = linear_selected_logps(hidden, weight, labels, ids, backend=backend, **options)
    (out.label.sum() + out.topk.sum() + out.tail.sum()).backward()
    assert hidden.grad.abs().sum() > 0
print(peak() - before)
"""
FULL_LOGITS_MIB = 4096 * 60_000 * 4 / 2**20  # 938 in float32


def peak_mib(rows: int, what: str, backend: str) -> float:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rows), what, backend], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


@pytest.mark.parametrize("what", ["0", "topk", "live"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_peak_does_not_grow_with_tokens(backend, what):
    few, many = peak_mib(256, what, backend), peak_mib(4096, what, backend)
    # The workspace is a fixed number of bytes, reached from about a thousand tokens on; the torch backend has a few of
    # them. Beside it there are copies of hidden and [N, K]: a few MiB at 4096 tokens.
    assert 0 < few < many < few + 128, (few, many)
    assert many < FULL_LOGITS_MIB / 2


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_budget_bounds_what_is_retained(backend):
    budget = 200 * 2**20
    without, with_budget = peak_mib(2048, "0", backend), peak_mib(2048, str(budget), backend)
    assert without + 100 < with_budget < without + 200 + 32, (without, with_budget)

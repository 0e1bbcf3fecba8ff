"""Nothing holds `[tokens, V]`: peak memory of a fresh process, forward and backward, as the tokens grow 16-fold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_suite.settings import PLANS, TOKENS
from dadpo_kernels.cli.main import main
from dadpo_kernels.ops.memory import estimate_memory

SCRIPT = """
import sys, torch
from benchmarks.measure import reset_high_water_mark, resident_mib
from dadpo_kernels import linear_selected_logps, linear_topk_logps
rows, what, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
V, H, K, masked = map(int, sys.argv[4:])
hidden = torch.randn(rows, H, requires_grad=True)
weight = torch.randn(V, H, requires_grad=what != "frozen")
labels, ids = torch.randint(V, (rows,)), torch.randint(V, (rows, K))
labels[:masked] = -100
hidden.grad = torch.zeros_like(hidden)
if weight.requires_grad:
    weight.grad = torch.zeros_like(weight)
torch.mm(hidden.detach()[:64], weight.detach()[:64].T)

def step(hidden, labels, ids):
    if what == "topk":
        assert linear_topk_logps(hidden, weight, K, backend=backend).logps.abs().sum() > 0
    else:
        budget, tolerance = int(what) if what.isdigit() else 0, 1e-2 if what == "live" else None
        options = {"memory_budget": budget, "grad_tolerance": tolerance}
        out = linear_selected_logps(hidden, weight, labels, ids, backend=backend, **options)
        (out.label.sum() + out.topk.sum() + out.tail.sum()).backward()

step(hidden[-1:], labels[-1:], ids[-1:])  # what is imported or set up only once
before = reset_high_water_mark()
step(hidden, labels, ids)
assert what == "topk" or hidden.grad.abs().sum() > 0
print(resident_mib("VmHWM") - before)
"""
SHAPE = {"vocab": 60_000, "width": 16, "k": 4}
FULL_LOGITS_MIB = 4096 * 60_000 * 4 / 2**20  # 938 in float32


def peak_mib(
    rows: int, what: str, backend: str, shape: dict[str, int] = SHAPE, masked: int = 0, **environment: str
) -> float:
    sizes = [str(size) for size in (*shape.values(), masked)]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rows), what, backend, *sizes],
        env=os.environ | environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(run.stdout)


@pytest.mark.parametrize("what", ["0", "topk", "live"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_peak_does_not_grow_with_tokens(backend, what):
    few, many = peak_mib(256, what, backend), peak_mib(4096, what, backend)
    # The workspace is a fixed number of bytes, reached from about a thousand tokens on (the live plan's by 256: there
    # either may be the larger); the torch backend has a few of them. Beside it there are copies of hidden and [N, K]:
    # a few MiB at 4096 tokens.
    assert few > 0, few
    assert 0 < many < few + 128, (few, many)
    assert many < FULL_LOGITS_MIB / 2


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_budget_bounds_what_is_retained(backend):
    budget = 200 * 2**20
    without, with_budget = peak_mib(2048, "0", backend), peak_mib(2048, str(budget), backend)
    assert without + 100 < with_budget < without + 200 + 32, (without, with_budget)


@pytest.mark.parametrize("what", ["0", str(2**40), "frozen"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_estimate_is_what_is_measured(backend, what):
    frozen, budget = what == "frozen", int(what) if what.isdigit() else 0
    estimate = estimate_memory(
        2048, **SHAPE, dtype=torch.float32, backend=backend, memory_budget=budget, frozen_head=frozen
    )
    # Every freed tile is handed back at once, so that the peak is of what is held and not of what malloc sits on.
    measured = peak_mib(2048, what, backend, MALLOC_MMAP_THRESHOLD_="65536")
    assert measured == pytest.approx(estimate.total / 2**20, rel=0.1, abs=8)
    assert estimate.plan.units == (3 if budget or frozen else 4)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_estimate_of_the_live_plan_is_an_upper_bound(backend):
    """How many columns are live, and with them what is retained, depends on the data."""
    estimate = estimate_memory(
        2048, **SHAPE, dtype=torch.float32, backend=backend, memory_budget=0, grad_tolerance=1e-2
    )
    assert estimate.plan.name == "live"
    measured = peak_mib(2048, "live", backend, MALLOC_MMAP_THRESHOLD_="65536")
    assert 0.5 * estimate.total / 2**20 < measured < 1.1 * estimate.total / 2**20 + 8


def test_copies_of_hidden_make_room_for_the_gradient_of_all_tokens():
    shape = {"vocab": 4096, "width": 512, "k": 4}
    measured = peak_mib(16_384, "0", "cpu", shape, masked=8_192, MALLOC_MMAP_THRESHOLD_="65536")
    estimate = estimate_memory(8_192, **shape, tokens=16_384, dtype=torch.float32, backend="cpu", memory_budget=0)
    assert measured == pytest.approx(estimate.total / 2**20, rel=0.1)


def test_memory_command(capsys):
    shape = ["--vocab", "49152", "--hidden", "576", "--tokens", "1024", "--dtype", "float32", "--backend", "cpu"]
    assert main(["memory", *shape, "--memory", "300MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fits = {line.split()[0]: line.split()[-1] for line in lines[3:]}
    assert fits["0"] == "yes"
    assert fits["everything"] == "no"
    budget = next(name for name in fits if name not in ("0", "default", "everything"))
    assert fits[budget] == "yes"
    assert int(budget) > 2**20

    assert main(["memory", *shape, "--grad-tolerance", "1e-3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines[3:]} == {"live"}
    assert main(["memory", *shape, "--grad-tolerance", "2"]) == 2
    assert "grad_tolerance=2.0 must lie in (0, 1)" in capsys.readouterr().err

    assert main(["memory", *shape, "--memory", "1MiB"]) == 1
    assert "Nothing fits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["memory", *shape, "--memory", "lots"])
    assert "is not a size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": 0}, "rows=0"), ({"k": -1}, "k=-1"), ({"tokens": 5}, "tokens=5"), ({"backend": "x"}, "is unknown")],
)
def test_estimate_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(**({"rows": 9, **SHAPE, "dtype": torch.float32} | change))


def test_the_estimate_is_what_an_h100_took():
    """Every step of the committed results, masked tokens included, whose part of the buffer is allocated there."""
    results = json.loads((Path(__file__).parents[2] / "benchmarks/results/gpu-h100-first.json").read_text())
    rows = results["stages"]["table"]["rows"]
    heads = {row["shape"]: (row["vocab"], row["width"]) for row in rows if "width" in row}
    steps = [row for row in rows if "peak_bytes_above_gradients" in row]
    assert any(row["masked"] for row in steps)
    for row in steps:
        (vocab, width), tokens = heads[row["shape"]], TOKENS * (1 + row["masked"])
        backend, plan = row["name"].removeprefix("dadpo-kernels ").split(", ")
        estimate = estimate_memory(
            TOKENS, vocab, width, torch.bfloat16, k=row["top_k"], tokens=tokens, backend=backend,
            memory_budget=PLANS[plan],
        )  # fmt: skip
        measured = row["peak_bytes_above_gradients"] + 2 * (tokens + vocab) * width
        assert measured == pytest.approx(estimate.total, rel=0.1), row

"""Every Triton kernel executed without a GPU, under Triton's interpreter, through the public functions.

Triton decides when it is imported whether it interprets, and other tests compile the same kernels: so the tests of
this file run in a process of their own, started by the only test that the ordinary run sees.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from benchmarks.gpu_suite import row_passes
from benchmarks.gpu_suite.kernels import row_passes_and_sweep
from benchmarks.gpu_suite.settings import Settings
from dadpo_kernels import linear_topk_logps
from dadpo_kernels.ops import autograd
from dadpo_kernels.ops import selected_logps as module
from dadpo_kernels.ops.backends import triton_
from dadpo_kernels.ops.backends.base import Best, Coefficients, Entries, Grads, RetainedTile, State
from dadpo_kernels.ops.backends.registry import BACKENDS, resolve
from dadpo_kernels.ops.backends.tuning import CONFIGS
from dadpo_kernels.ops.head import Head
from dadpo_kernels.ops.run import plan_for
from tests.support.dense import IGNORE, assert_as_good_as_dense, random_problem, values_and_grads
from tests.support.far import far, linux
from tests.support.waiting import assert_no_waiting

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_interpreter starts")

NAMES = ["triton_rows", "triton"]
DTYPES = [torch.float32, torch.bfloat16]
BUDGETS = {"recompute": 0, "partial": 12_000, "retain": 2**31}
TILE = 128
ALL_OPTIONS = {"bias": True, "logit_scale": -0.5, "softcap": 6.0, "temperature": 0.7}


def test_interpreter():
    if INTERPRETING:
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Small tiles and blocks, so that small problems cross their boundaries."""
    for name in NAMES:
        monkeypatch.setattr(BACKENDS[name].tiles, "tile_columns", staticmethod(lambda *_: TILE))
    monkeypatch.setattr(triton_, "choose", lambda *_: triton_.Config(16, 64, 16, 1, 4, 2))


def small(backend="triton_rows", **kwargs):
    """Row kernels run a program per row, which the interpreter is slow at; fused ones need rows for two blocks."""
    rows = 9 if backend == "triton_rows" else 27
    return random_problem(**{"rows": rows, "vocab": 300, "width": 40, **kwargs})


@interpreted
@pytest.mark.parametrize("plan", BUDGETS)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all_options"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NAMES)
def test_random_inputs(backend, dtype, options, plan):
    assert_as_good_as_dense(small(backend, **options), dtype, backend, BUDGETS[plan])


@interpreted
@pytest.mark.parametrize(("rows", "vocab", "width", "k"), [(1, 1, 1, None), (2, 7, 3, 0), (3, 200, 17, 40)])
@pytest.mark.parametrize("budget", [0, 2**31])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NAMES)
def test_ragged_shapes(backend, dtype, budget, rows, vocab, width, k):
    assert_as_good_as_dense(random_problem(rows, vocab, width, k), dtype, backend, budget)


@interpreted
@pytest.mark.parametrize("budget", [0, 2**31])
@pytest.mark.parametrize("backend", NAMES)
class TestExtremes:
    def test_minus_infinity(self, backend, budget):
        """Forbidden tokens: -inf in the bias, among the ids, as a label, and a whole first tile of them."""
        p = small(backend, bias=True)
        p.bias[:150] = -torch.inf
        p.bias[200:250] = -torch.inf
        p.topk_ids[:, 1] = 220
        p.labels[0] = 10
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    def test_confident_student(self, backend, budget):
        """A tail of e^-60: its logarithm keeps its digits, and so does the gradient that it alone carries."""
        p = small(backend, k=3)
        p.topk_ids[:, 0] = p.labels.clamp(min=0)
        p.topk_ids[:, 1] = 5
        p.weight[5] = 0
        p.bias = torch.zeros(300)
        p.bias[5] = 80.0
        for dtype in DTYPES:
            assert_as_good_as_dense(p, dtype, backend, budget)
        assert values_and_grads(p, backend, budget)["tail"].min() < -50

    @pytest.mark.parametrize("offset", [-300.0, 60.0])
    def test_offset_logits(self, backend, budget, offset):
        p = small(backend)
        p.bias = torch.full((300,), offset)
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    @pytest.mark.parametrize("where", [slice(0, 128), slice(128, 256)])
    @pytest.mark.parametrize("height", [-200.0, 200.0])
    def test_far_apart_tiles(self, backend, budget, where, height):
        """Logits of one tile 200 away from the others': nothing overflows, underflow is exact zero."""
        p = small(backend)
        p.bias = torch.zeros(300)
        p.bias[where] = height
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    def test_topk_covers_vocabulary(self, backend, budget):
        p = random_problem(rows=9, vocab=6, k=6)
        p.topk_ids[:] = torch.arange(6)
        assert_as_good_as_dense(p, torch.float32, backend, budget)

    def test_no_valid_token(self, backend, budget):
        p = small(backend)
        p.labels[:] = IGNORE
        assert all(v.abs().sum() == 0 for v in values_and_grads(p, backend, budget).values())

    def test_bitwise_repeatable(self, backend, budget):
        p = small(backend, bias=True).to(torch.bfloat16)
        a, b = values_and_grads(p, backend, budget), values_and_grads(p, backend, budget)
        for name in a:
            assert torch.equal(a[name], b[name]), name
            assert a[name].abs().sum() > 0

    def test_gradient_of_the_tail_alone(self, backend, budget):
        """Incoming gradients that are zero but for one output, and zero altogether."""
        p = small(backend, bias=True)
        balanced = (float(p.topk_ids.shape[1]), -1.0, 0.0)  # cancel: the selected entries alone get any
        for weights in ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), balanced):
            grads = []
            for name in (backend, "reference"):
                hidden = p.hidden.clone().requires_grad_()
                out = module.linear_selected_logps(
                    hidden, p.weight, p.labels, p.topk_ids, backend=name, memory_budget=budget
                )
                loss = sum(w * o.sum() for w, o in zip(weights, out, strict=True))
                grads.append(torch.autograd.grad(loss, hidden)[0])
            torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
            assert (grads[0].abs().max() > 0) == (sum(weights) > 0)


@interpreted
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("retain", [False, True])
def test_opcheck(backend, retain):
    """Also that the backward leaves the retained buffer as it was: it writes to it and puts back what was there."""
    rows, vocab = 6, 200
    plan = plan_for(rows, vocab, 8, torch.float32, backend=backend, memory_budget=2**31)
    args = (
        torch.randn(rows, 8, requires_grad=True),
        torch.randn(vocab, 8, requires_grad=True),
        torch.randn(vocab, requires_grad=True),
        torch.randint(vocab, (rows,)),
        torch.randint(vocab, (rows, 3)),
        1.0, 30.0, 1.0, IGNORE, backend, None, plan.retained_bytes if retain else 0,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(autograd.selected_logps, args, test_utils=tests)


@interpreted
@pytest.mark.parametrize("plan", BUDGETS)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all_options"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_descriptors(monkeypatch, dtype, options, plan):
    """Blocks copied by TMA, whose borders lie beyond the operands' in every direction."""
    config = triton_.Config(16, 64, 16, 1, 4, 2, TMA=True)
    monkeypatch.setattr(triton_, "choose", lambda *_: config)
    assert_as_good_as_dense(small("triton", **options), dtype, "triton", BUDGETS[plan])


@interpreted
def test_sweep_of_configurations():
    """The GPU suite's: all of Hopper's, each held against the first."""
    dry = Settings(dry=True)
    tasks = [task for task in row_passes_and_sweep(dry, "all") if "config" in task.name]
    of_one_shape = [task for task in tasks if task.name["shape"] == tasks[0].name["shape"]]
    rows = [task.name | task.run() for task in of_one_shape]
    assert {row["kernel"] for row in rows} == set(CONFIGS)
    assert all(row["ok"] for row in rows), rows
    assert any(row["config"].endswith("TMA") for row in rows)


@interpreted
@pytest.mark.parametrize("name", row_passes.PASSES)
def test_row_passes_alone(monkeypatch, name):
    """The GPU suite's: on a GPU as CUDA graphs, here as the calls that these repeat."""
    monkeypatch.setattr(row_passes, "CALLS", 2)
    p = small("triton_rows").to(torch.bfloat16)
    row = row_passes.row_pass("triton_rows", name, p.hidden, p.weight, p.labels.clamp(min=0), p.topk_ids, 1e9, 1)
    assert row["ok"]
    assert row["of_copy"] > 0


@linux
@interpreted
@pytest.mark.parametrize("backend", NAMES)
def test_offsets_beyond_32_bits(monkeypatch, backend):
    """Products, their gradient and retained exponentials in rows far apart: all that is as large as N times V."""
    p = small(backend, rows=3, bias=True).to(torch.bfloat16)
    entries, head = Entries.merge(p.labels.clamp(min=0), p.topk_ids), Head(p.weight, p.bias, 1.0, 30.0, 1.0)
    product = p.hidden.float() @ p.weight[:TILE].float().T

    def run(place):
        kind = BACKENDS[backend].tiles
        monkeypatch.setattr(kind, "padded", lambda self, columns, dtype: place(3, columns, dtype))
        monkeypatch.setattr(kind, "products", lambda *_: place(3, TILE, torch.float32).copy_(product))
        tiles, state = kind(p.hidden, head, entries), State.new(3, entries.ids.shape[1], p.hidden)
        kept = RetainedTile(place(3, TILE, torch.bfloat16), torch.zeros(3, 4))
        tiles.forward(0, TILE, state, kept)
        results = [state.max, state.sum, state.selected, kept.exps.clone()]
        coefficients = Coefficients(torch.ones(3), state.max, torch.ones_like(state.selected))
        for stored in (None, kept):
            grads = Grads(torch.zeros(p.hidden.shape), torch.zeros_like(p.weight), torch.zeros(300))
            tiles.backward(0, TILE, coefficients, grads, stored)
            results += [grads.hidden, grads.weight, grads.bias]
        best = Best(torch.full((3, 11), -torch.inf), torch.zeros(3, 11, dtype=torch.int32), torch.zeros(3), 5)
        tiles.topk(0, TILE, state, best)
        return [*results, best.values, best.ids]

    # Less than 2^31, or the stride itself would make 64-bit products.
    def far_apart(rows, columns, dtype):
        return far(rows, columns, dtype, stride=2**30 + 8)

    near = run(lambda rows, columns, dtype: torch.zeros(rows, columns, dtype=dtype))
    for got, want in zip(run(far_apart), near, strict=True):
        assert torch.equal(got, want)
        assert got.isfinite().any()
        assert got.abs().sum() > 0


@interpreted
@pytest.mark.parametrize("budget", BUDGETS.values())
@pytest.mark.parametrize("backend", NAMES)
def test_nothing_waits_for_the_device(backend, budget):
    assert_no_waiting(BACKENDS[backend].tiles, small(backend, bias=True), budget, backend)


@interpreted
def test_second_backward_is_the_first_again():
    for backend in NAMES:
        p = small(backend)
        hidden = p.hidden.clone().requires_grad_()
        loss = module.linear_selected_logps(hidden, p.weight, p.labels, p.topk_ids, backend=backend).topk.sum()
        a, b = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(a, b)
        assert a.abs().max() > 0


@interpreted
@pytest.mark.parametrize("k", [0, 5, 200, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NAMES[:1])
def test_topk(backend, dtype, k):
    g = torch.Generator().manual_seed(k)
    hidden, weight = torch.randn(4, 24, generator=g).to(dtype), torch.randn(300, 24, generator=g).to(dtype)
    bias, labels = torch.randn(300, generator=g).to(dtype), torch.randint(300, (4,), generator=g)
    labels[2] = IGNORE
    got = linear_topk_logps(hidden, weight, k, labels=labels, bias=bias, softcap=9.0, backend=backend)
    wide = (t.double() for t in (hidden, weight))
    want = linear_topk_logps(*wide, k, labels=labels, bias=bias.double(), softcap=9.0, backend="reference")
    for name in ("logps", "tail", "label"):
        a, b = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert (got.ids == want.ids).float().mean() > 0.99 if k else True


@interpreted
@pytest.mark.parametrize("backend", NAMES[:1])
def test_topk_ties_go_to_the_lowest_id(backend):
    """Integer logits, so that equals are exact and everywhere, -0 among them, across tile borders."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-1, 2, (6, 3), generator=g).float()
    weight = torch.randint(-1, 2, (300, 3), generator=g).float()
    for k in (33, 150):
        got = linear_topk_logps(hidden, weight, k, backend=backend)
        want = linear_topk_logps(hidden.double(), weight.double(), k, backend="reference")
        assert torch.equal(got.ids, want.ids)


def test_reasons():
    with pytest.raises(ValueError, match=r"takes torch.float32 and torch.bfloat16, not torch.float64"):
        resolve("triton_rows", torch.device("cpu"), torch.float64)
    if not INTERPRETING:
        with pytest.raises(ValueError, match="tensors are on cpu"):
            resolve("triton_rows", torch.device("cpu"), torch.float32)


def test_package_does_not_import_triton():
    code = "import sys, dadpo_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

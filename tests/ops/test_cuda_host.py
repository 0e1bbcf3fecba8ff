"""The CUDA backend executed without a GPU: its kernels' source compiled by g++, its Python class on CPU tensors."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from benchmarks.gpu_suite import row_passes
from dadpo_kernels import linear_topk_logps
from dadpo_kernels.ops import autograd
from dadpo_kernels.ops import selected_logps as module
from dadpo_kernels.ops.backends.registry import BACKENDS, Backend
from dadpo_kernels.ops.run import plan_for
from tests.support import cuda_host
from tests.support.dense import IGNORE, assert_as_good_as_dense, random_problem, values_and_grads
from tests.support.waiting import assert_no_waiting

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BUDGETS = {"recompute": 0, "partial": 60_000, "retain": 2**31}
ALL_OPTIONS = {"bias": True, "logit_scale": -0.5, "softcap": 6.0, "temperature": 0.7}


@pytest.fixture(scope="session")
def host():
    return cuda_host.load(cuda_host.plain())


@pytest.fixture(autouse=True)
def backend(host, monkeypatch):
    """The backend as "host", with tiles so small that small problems cross their borders."""
    monkeypatch.setattr(cuda_host.HostTiles, "module", host)
    monkeypatch.setattr(cuda_host.HostTiles, "tile_columns", staticmethod(lambda *_: 300))
    monkeypatch.setitem(BACKENDS, "host", Backend(cuda_host.HostTiles, lambda *_: None, ()))


@pytest.fixture(params=[1, 1000], ids=["a_block_a_row", "several_blocks_a_row"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(cuda_host.HostTiles, "segments", lambda self, columns: min(4, request.param))


def small(**kwargs):
    return random_problem(**{"rows": 21, "vocab": 700, "width": 40, **kwargs})


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("plan", BUDGETS)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 4.0}, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_inputs(dtype, options, plan):
    assert_as_good_as_dense(small(**options), dtype, "host", BUDGETS[plan])


@pytest.mark.parametrize(("rows", "vocab", "width", "k"), [(1, 1, 1, None), (2, 7, 3, 0), (5, 333, 17, 40)])
@pytest.mark.parametrize("budget", [0, 2**31])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_shapes(dtype, budget, rows, vocab, width, k):
    assert_as_good_as_dense(random_problem(rows, vocab, width, k), dtype, "host", budget)


@given(
    rows=st.integers(1, 20),
    vocab=st.integers(1, 700),
    width=st.integers(1, 40),
    k=st.none() | st.integers(0, 9),
    masked=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    budget=st.sampled_from([0, 20_000, 2**31]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(rows, vocab, width, k, masked, dtype, budget, seed):
    p = random_problem(rows, vocab, width, k, seed=seed)
    p.labels[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < masked] = IGNORE
    assert_as_good_as_dense(p, dtype, "host", budget)


@pytest.mark.parametrize("budget", [0, 2**31])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_real_hidden_states(smollm2, host, dtype, budget, monkeypatch):
    monkeypatch.setattr(cuda_host.HostTiles, "tile_columns", staticmethod(lambda *_: host.COLUMNS))
    hidden, weight, labels = (t[:12] if i != 1 else t for i, t in enumerate(smollm2))
    ids = (hidden + 0.3 * torch.randn_like(hidden)) @ weight.T
    p = random_problem()
    p = type(p)(hidden, weight, labels, ids.topk(16).indices)
    assert_as_good_as_dense(p, dtype, "host", budget)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("budget", [0, 2**31])
class TestExtremes:
    def test_minus_infinity(self, budget):
        """Forbidden tokens: -inf in the bias, among the ids, as a label, and a whole first tile of them."""
        p = small(bias=True)
        p.bias[:310] = -torch.inf
        p.bias[500:550] = -torch.inf
        p.topk_ids[:, 1] = 520
        p.labels[0] = 10
        assert_as_good_as_dense(p, torch.float32, "host", budget)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_confident_student(self, budget, dtype):
        """A tail of e^-60: its logarithm keeps its digits, and so does the gradient that it alone carries."""
        p = small(k=3)
        p.topk_ids[:, 0] = p.labels.clamp(min=0)
        p.topk_ids[:, 1] = 5
        p.weight[5] = 0
        p.bias = torch.zeros(700)
        p.bias[5] = 80.0
        assert_as_good_as_dense(p, dtype, "host", budget)
        assert values_and_grads(p, "host", budget)["tail"].min() < -50

    @pytest.mark.parametrize("offset", [-300.0, -60.0, 60.0, 300.0])
    def test_offset_logits(self, budget, offset):
        p = small()
        p.bias = torch.full((700,), offset)
        assert_as_good_as_dense(p, torch.float32, "host", budget)

    @pytest.mark.parametrize("where", [slice(0, 300), slice(300, 600)])
    @pytest.mark.parametrize("height", [-200.0, 200.0])
    def test_far_apart_tiles(self, budget, where, height):
        """Logits of one tile 200 away from the others': nothing overflows, underflow is exact zero."""
        p = small()
        p.bias = torch.zeros(700)
        p.bias[where] = height
        assert_as_good_as_dense(p, torch.float32, "host", budget)

    def test_topk_covers_vocabulary(self, budget):
        p = random_problem(rows=9, vocab=6, k=6)
        p.topk_ids[:] = torch.arange(6)
        assert_as_good_as_dense(p, torch.float32, "host", budget)

    def test_masked_rows_hold_anything(self, budget):
        p = small()
        clean = values_and_grads(p, "host", budget)
        masked = p.labels == IGNORE
        p.hidden[masked] = torch.nan
        p.topk_ids[masked] = -(2**31)
        got = values_and_grads(p, "host", budget)
        for name in clean:
            assert torch.equal(got[name], clean[name]), name
        assert got["grad_hidden"][~masked].abs().min() > 0

    def test_no_valid_token(self, budget):
        p = small()
        p.labels[:] = IGNORE
        assert all(v.abs().sum() == 0 for v in values_and_grads(p, "host", budget).values())

    def test_nan_is_not_hidden(self, budget):
        p = small(k=2)
        p.hidden[0, 3] = torch.nan
        out = module.linear_selected_logps(
            p.hidden, p.weight, p.labels, p.topk_ids, backend="host", memory_budget=budget
        )
        assert out.label[0].isnan()
        assert out.label[2:].isfinite().all()

    def test_bitwise_repeatable(self, budget):
        p = small(bias=True).to(torch.bfloat16)
        a, b = values_and_grads(p, "host", budget), values_and_grads(p, "host", budget)
        for name in a:
            assert torch.equal(a[name], b[name]), name
            assert a[name].abs().sum() > 0

    def test_gradient_of_one_output_alone(self, budget):
        """Factors of 0 in the retained plan, and tiny ones beside large values."""
        p = small(bias=True)
        balanced = (float(p.topk_ids.shape[1]), -1.0, 0.0)  # cancel: the selected entries alone get any
        for weights in ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), balanced, (1e-18, 1e-18, 1e-30)):
            grads = []
            for name in ("host", "reference"):
                hidden = p.hidden.clone().requires_grad_()
                out = module.linear_selected_logps(
                    hidden, p.weight, p.labels, p.topk_ids, backend=name, memory_budget=budget
                )
                loss = sum(w * o.sum() for w, o in zip(weights, out, strict=True))
                grads.append(torch.autograd.grad(loss, hidden)[0] / max(*weights, 1e-38))
            torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
            assert (grads[0].abs().max() > 0) == (sum(weights) > 0)

    def test_frozen_head_and_frozen_body(self, budget):
        p = small(bias=True)
        full = values_and_grads(p, "host", budget)
        for trained in (["hidden"], ["weight"], ["bias"], ["hidden", "bias"]):
            leaves = {k: getattr(p, k).clone().requires_grad_(k in trained) for k in ("hidden", "weight", "bias")}
            out = module.linear_selected_logps(
                leaves["hidden"], leaves["weight"], p.labels, p.topk_ids, bias=leaves["bias"], backend="host",
                memory_budget=budget,
            )  # fmt: skip
            g = torch.Generator().manual_seed(1)
            sum((torch.randn(o.shape, generator=g, dtype=torch.float64) * o.double()).sum() for o in out).backward()
            for name in trained:
                torch.testing.assert_close(leaves[name].grad, full[f"grad_{name}"], rtol=1e-5, atol=1e-5)


def test_second_backward_is_the_first_again():
    """The backward writes to the retained exponentials and puts back what was there."""
    p = small()
    hidden = p.hidden.clone().requires_grad_()
    loss = module.linear_selected_logps(hidden, p.weight, p.labels, p.topk_ids, backend="host").topk.sum()
    a, b = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(a, b)
    assert a.abs().max() > 0


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("budget", BUDGETS.values())
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_device(dtype, budget):
    """So that a CUDA graph can capture the passes. The kernels' source asks CUDA for launches alone."""
    assert_no_waiting(cuda_host.HostTiles, small(bias=True).to(dtype), budget, "host")
    source = "".join(path.read_text() for path in cuda_host.CUDA.iterdir())
    called = set(re.findall(r"\bcuda[A-Z]\w+(?=\()", source))
    assert called == {"cudaSetDevice", "cudaLaunchKernelEx", "cudaGetLastError", "cudaGetErrorString"}


def test_row_passes_alone(monkeypatch):
    """The GPU suite's: on a GPU as CUDA graphs, here as the calls that these repeat."""
    monkeypatch.setattr(row_passes, "CALLS", 2)
    p = small(rows=5).to(torch.bfloat16)
    arguments = (p.hidden, p.weight, p.labels.clamp(min=0), p.topk_ids, 1e9, 1)
    for name in row_passes.PASSES:
        row = row_passes.row_pass("host", name, *arguments)
        assert row["ok"], name
        assert row["of_copy"] > 0

    monkeypatch.setattr(row_passes, "as_graph", lambda _, run: lambda: tuple(t * 0 for t in run()))
    assert not any(row_passes.row_pass("host", name, *arguments)["ok"] for name in row_passes.PASSES)


@pytest.mark.parametrize("retain", [False, True])
def test_opcheck(retain):
    rows, vocab = 16, 600
    plan = plan_for(rows, vocab, 8, torch.float32, backend="host", memory_budget=2**31)
    args = (
        torch.randn(rows, 8, requires_grad=True),
        torch.randn(vocab, 8, requires_grad=True),
        torch.randn(vocab, requires_grad=True),
        torch.randint(vocab, (rows,)),
        torch.randint(vocab, (rows, 3)),
        1.0, 30.0, 1.0, IGNORE, "host", None, plan.retained_bytes if retain else 0,
    )  # fmt: skip
    opcheck(autograd.selected_logps, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("k", [0, 1, 5, 64, 200, 256, 257, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk(dtype, k):
    """256 is the most that the kernel holds in blocks of 64 threads; beyond, PyTorch does the work."""
    g = torch.Generator().manual_seed(k)
    hidden, weight = torch.randn(7, 24, generator=g).to(dtype), torch.randn(700, 24, generator=g).to(dtype)
    bias, labels = torch.randn(700, generator=g).to(dtype), torch.randint(700, (7,), generator=g)
    labels[2] = IGNORE
    got = linear_topk_logps(hidden, weight, k, labels=labels, bias=bias, softcap=9.0, backend="host")
    wide = (t.double() for t in (hidden, weight))
    want = linear_topk_logps(*wide, k, labels=labels, bias=bias.double(), softcap=9.0, backend="reference")
    for name in ("logps", "tail", "label"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=1e-5)
    assert not k or (got.ids == want.ids).float().mean() > 0.99


def test_topk_ties_go_to_the_lowest_id():
    """Integer logits, so that equals are exact and everywhere, -0 among them, across tile borders."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-1, 2, (40, 3), generator=g).float()
    weight = torch.randint(-1, 2, (700, 3), generator=g).float()
    for k in (1, 33, 250):
        got = linear_topk_logps(hidden, weight, k, backend="host")
        want = linear_topk_logps(hidden.double(), weight.double(), k, backend="reference")
        assert torch.equal(got.ids, want.ids)


def test_topk_of_minus_infinity():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(4, 8, generator=g), torch.randn(700, 8, generator=g), torch.zeros(700)
    bias[:650] = -torch.inf
    got = linear_topk_logps(hidden, weight, 60, bias=bias, backend="host")
    assert (got.ids[:, :50] >= 650).all()
    assert got.ids[0, 50:].tolist() == list(range(10))
    assert (got.logps[:, 50:] == -torch.inf).all()
    assert (got.tail == -torch.inf).all()

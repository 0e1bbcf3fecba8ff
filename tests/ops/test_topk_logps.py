"""Top-k log-probabilities on every backend against a float64 sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import dadpo_kernels.ops.topk_logps as module
from dadpo_kernels import linear_selected_logps, linear_topk_logps
from dadpo_kernels.ops.backends import cpu, reference
from tests.support.dense import IGNORE, finite

BACKENDS = [("torch", d) for d in (torch.float32, torch.bfloat16, torch.float64)] + [
    ("cpu", d) for d in (torch.float32, torch.bfloat16)
]

TRANSFORM = (("logit_scale", 1.0), ("softcap", None), ("temperature", 1.0))


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setattr("dadpo_kernels.ops.backends.torch_.TorchTiles.tile_columns", staticmethod(lambda *_: 300))
    monkeypatch.setattr("dadpo_kernels.ops.backends.cpu.CpuTiles.tile_columns", staticmethod(lambda *_: 384))


def check(hidden, weight, k, dtype, backend, labels=None, **options):
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = options.pop("bias", None)
    bias = None if bias is None else bias.to(dtype)
    got = linear_topk_logps(hidden, weight, k, labels=labels, bias=bias, backend=backend, **options)
    wide = None if bias is None else bias.double()
    exact = linear_topk_logps(
        hidden.double(), weight.double(), weight.shape[0], labels=labels, bias=wide, backend="reference", **options
    )
    full = torch.zeros_like(exact.logps).scatter(-1, exact.ids, exact.logps)  # [.., V] log-probabilities by id
    valid = torch.ones(got.tail.shape, dtype=torch.bool) if labels is None else labels != IGNORE
    # As tests/dense.py: 3 times the error of dense logits in float32. Ids may differ from the exact ones within that.
    dense = reference.dense_logits(hidden, weight, bias, *(options.get(n, d) for n, d in TRANSFORM)).log_softmax(-1)
    tolerance = float(3 * finite(dense.double() - full).abs().max() + 16 * torch.finfo(dense.dtype).eps)
    assert_close = torch.testing.assert_close
    at_ids = full.gather(-1, got.ids)
    assert_close(got.logps[valid].double(), at_ids[valid], rtol=0, atol=tolerance)
    assert_close(got.logps[valid].double(), exact.logps[..., :k][valid], rtol=0, atol=tolerance)
    assert (got.logps[..., 1:] <= got.logps[..., :-1]).all()
    assert (got.ids[valid].sort(-1).values.diff(dim=-1) > 0).all()  # no id twice
    tail = full.scatter(-1, got.ids, -torch.inf).logsumexp(-1)
    assert_close(got.tail[valid].double(), tail[valid], rtol=tolerance, atol=tolerance)
    if labels is None:
        assert got.label is None
    else:
        assert_close(got.label[valid].double(), exact.label[valid], rtol=0, atol=tolerance)
        for out in got:
            assert out[~valid].abs().sum() == 0
    assert got.ids.dtype == torch.int64


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": -0.7}, {"temperature": 2.0}])
@pytest.mark.parametrize("k", [0, 1, 20, 256])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_random(backend, dtype, k, options):
    g = torch.Generator().manual_seed(k)
    hidden, weight = torch.randn(3, 17, 40, generator=g), torch.randn(1300, 40, generator=g) * 0.5
    labels = torch.randint(1300, (3, 17), generator=g)
    labels[0, :5] = IGNORE
    check(hidden, weight, k, dtype, backend, labels, bias=torch.randn(1300, generator=g), **options)


@given(
    rows=st.integers(1, 12),
    vocab=st.integers(1, 900),
    width=st.integers(1, 50),
    share=st.floats(0, 1),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=50, deadline=None)
def test_any_shape(rows, vocab, width, share, backend):
    g = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g)
    check(hidden, weight, round(share * vocab), backend[1], backend[0])


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_ties_go_to_the_lowest_id(backend):
    hidden, weight = torch.ones(2, 8), torch.zeros(1200, 8)
    weight[700:720] = 1
    weight[1100] = 2
    got = linear_topk_logps(hidden, weight, 10, backend=backend)
    assert got.ids.tolist() == [[1100, *range(700, 709)]] * 2
    got = linear_topk_logps(hidden, weight, 40, backend=backend)
    assert got.ids[0].tolist() == [1100, *range(700, 720), *range(19)]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_minus_infinity(backend):
    """Forbidden tokens come last, with probability 0, and only when k asks for more than there are others."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(4, 8, generator=g), torch.randn(700, 8, generator=g), torch.zeros(700)
    bias[:650] = -torch.inf
    got = linear_topk_logps(hidden, weight, 60, bias=bias, backend=backend)
    assert (got.ids[:, :50] >= 650).all()
    assert (got.logps[:, 50:] == -torch.inf).all()
    assert got.ids[0, 50:].tolist() == list(range(10))
    assert (got.tail == -torch.inf).all()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_nan_stays_in_its_row(backend):
    """In every column, and in some of the first that fill the list of candidates."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8, generator=g), torch.randn(1300, 8, generator=g), torch.zeros(1300)
    want = linear_topk_logps(hidden, weight, 20, backend=backend)
    spoilt = hidden.clone()
    spoilt[2] = torch.nan
    got = linear_topk_logps(spoilt, weight, 20, labels=torch.arange(5), backend=backend)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(got.ids[others], want.ids[others])
    assert torch.equal(got.logps[others], want.logps[others])
    assert got.logps[2].isnan().all()
    assert got.label[2].isnan()
    bias[::7] = torch.nan
    assert linear_topk_logps(hidden, weight, 20, bias=bias, backend=backend).tail.isnan().all()


@pytest.mark.parametrize("isa", cpu._cpu.available() if cpu._cpu else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa, dtype):
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(97, 77, generator=g), torch.randn(1100, 77, generator=g)
    best = cpu._cpu.active()
    cpu._cpu.use(isa)
    try:
        check(hidden, weight, 33, dtype, "cpu", torch.randint(1100, (97,), generator=g))
    finally:
        cpu._cpu.use(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_hidden_states(smollm2, dtype, monkeypatch):
    monkeypatch.undo()
    hidden, weight, labels = smollm2
    check(hidden, weight, 64, dtype, "cpu", labels)


def test_agrees_with_the_primitive(smollm2):
    hidden, weight, labels = smollm2
    top = linear_topk_logps(hidden, weight, 16, labels=labels)
    selected = linear_selected_logps(hidden, weight, labels, top.ids)
    torch.testing.assert_close(top.logps, selected.topk, rtol=0, atol=1e-5)
    torch.testing.assert_close(top.tail, selected.tail, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.label, selected.label, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_opcheck(backend):
    labels = torch.randint(600, (9,))
    labels[3] = IGNORE
    opcheck(
        module._topk_logps, (torch.randn(9, 8), torch.randn(600, 8), None, labels, 5, 1.0, None, 1.0, IGNORE, backend)
    )


def test_bad_arguments():
    hidden, weight = torch.randn(4, 8), torch.randn(50, 8)
    for k in (-1, 51):
        with pytest.raises(ValueError, match=rf"k={k} must lie in \[0, V=50\]"):
            linear_topk_logps(hidden, weight, k)
    with pytest.raises(ValueError, match=r"labels\[1\] is 50"):
        linear_topk_logps(hidden, weight, 3, labels=torch.tensor([0, 50, 1, 2]))
    with pytest.raises(ValueError, match="above the cpu backend's"):
        linear_topk_logps(hidden, torch.randn(5000, 8), 3000, backend="cpu")
    assert linear_topk_logps(hidden, torch.randn(5000, 8), 3000).ids.shape == (4, 3000)

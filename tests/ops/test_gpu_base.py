"""What the GPU backends share: how products are rounded, and what a pass holds in memory."""

import contextlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dadpo_kernels.ops.backends import cuda, gpu_base
from dadpo_kernels.ops.backends.base import Entries, run_forward
from dadpo_kernels.ops.backends.registry import BACKENDS
from dadpo_kernels.ops.head import Head
from dadpo_kernels.ops.run import plan_for

SHAPES = {
    "Qwen2.5-0.5B": (896, 151_936),
    "Qwen2.5-1.5B": (1536, 151_936),
    "Llama-3-8B": (4096, 128_256),
    "Gemma": (3072, 256_000),
    "Vicuna-7B": (4096, 32_000),
}


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_products_are_rounded_once(out, add):
    """As if the whole had been made in float32, and the sum too."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(700, 50, generator=g).bfloat16(), torch.randn(50, 24, generator=g).bfloat16()
    c = torch.randn(700, 24, generator=g).to(out)
    exact = a.double() @ b.double() + c.double() * add
    gpu_base.multiply(a, b, c, add=add)
    assert ((c - exact).abs() <= torch.finfo(out).eps / 2 * exact.abs() + 1e-5).all()
    assert exact.abs().max() > 1


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize("before", [(True, True), (False, True), (False, False)])
def test_long_sums_are_not_split(dtype, kind, before):
    """While a narrow result is made, whatever the user has set, who gets it back: also after an error."""
    matmul, name = torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction"
    state = (getattr(matmul, name), getattr(matmul, f"{name}_split_k"))
    try:
        setattr(matmul, name, before)
        with contextlib.suppress(ZeroDivisionError), gpu_base.unsplit_sums(dtype):
            assert not getattr(matmul, name)
            raise ZeroDivisionError
        assert (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) == before
        with gpu_base.unsplit_sums(torch.float32):
            assert getattr(matmul, name) == before[0]
    finally:
        setattr(matmul, name, state)


@pytest.mark.parametrize("backend", ["cuda", "triton_rows", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_takes_at_most_300_mib(shape, backend):
    """Above inputs, gradients and what is retained, for 8,192 tokens in bfloat16: a tile, or hidden times the factors,
    and hidden's gradient in float32.
    """
    if backend == "cuda" and cuda._cuda is None:
        pytest.skip("dadpo_kernels._cuda is not built here (no nvcc)")
    width, vocab = SHAPES[shape]
    tiles = BACKENDS[backend].tiles
    columns = min(vocab, tiles.tile_columns(8192, width, torch.bfloat16))
    assert columns >= 2048  # wide enough for products that fill a GPU
    held = tiles.workspace_bytes(8192, columns, width, torch.bfloat16, True) + 8192 * width * 4
    assert held <= 300 * 2**20


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time, in addition to those of `known`."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            address = storage.data_ptr()
            if address not in self.sizes:
                self.sizes[address] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, address, None)
            self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("budget", [0, 2**28])
def test_a_fused_forward_holds_no_more_than_is_estimated(monkeypatch, budget):
    """All that it allocates for 8,192 tokens, with launches that do nothing."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda *_, grid, warmup, **__: None)
    rows, vocab, width, k = 8192, 151_936, 64, 64
    hidden, weight = (torch.zeros(n, width, dtype=torch.bfloat16) for n in (rows, vocab))
    labels, ids = torch.zeros(rows, dtype=torch.int64), torch.arange(k).expand(rows, k)
    entries = Entries.merge(labels, ids)
    plan = plan_for(rows, vocab, width, torch.bfloat16, backend="triton", memory_budget=budget)
    buffer = torch.empty(plan.retained_bytes, dtype=torch.uint8)
    assert (len(buffer) > 0) == (budget > 0)
    tiles = BACKENDS["triton"].tiles(hidden, Head(weight, None, 1.0, None, 1.0), entries)
    with Held(hidden, weight, buffer, entries.ids, entries.order) as held:
        state = run_forward(tiles, plan, buffer)
    kept = sum(t.nbytes for t in (state.max, state.sum, state.selected))
    estimate = tiles.workspace_bytes(rows, plan.tile, width, torch.bfloat16, True)
    assert 10 * 2**20 < held.most - kept <= estimate

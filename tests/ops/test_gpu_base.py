"""What the GPU backends share: how a weight gradient is rounded, and what a pass holds in memory."""

import pytest
import torch

from dadpo_kernels.ops.backends import cuda, gpu_base
from dadpo_kernels.ops.backends.registry import BACKENDS

SHAPES = {
    "Qwen2.5-0.5B": (896, 151_936),
    "Qwen2.5-1.5B": (1536, 151_936),
    "Llama-3-8B": (4096, 128_256),
    "Gemma": (3072, 256_000),
    "Vicuna-7B": (4096, 32_000),
}


def test_weight_gradient_is_rounded_once(monkeypatch):
    """In strips, and as if the whole product had been made in float32."""
    monkeypatch.setattr(gpu_base, "STRIP", 1)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(700, 50, generator=g).bfloat16(), torch.randn(50, 24, generator=g).bfloat16()
    out = torch.full((700, 24), torch.nan, dtype=torch.bfloat16)
    gpu_base.rounded_mm(a, b, out)
    exact = a.double() @ b.double()
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
    assert exact.abs().min() > 0


@pytest.mark.parametrize("backend", ["cuda", "triton_rows", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_recomputing_takes_at_most_300_mib(shape, backend):
    """Above inputs and gradients, for 8,192 tokens in bfloat16: a tile, and hidden's gradient in float32."""
    if backend == "cuda" and cuda._cuda is None:
        pytest.skip("dadpo_kernels._cuda is not built here (no nvcc)")
    width, vocab = SHAPES[shape]
    tiles = BACKENDS[backend].tiles
    columns = min(vocab, tiles.tile_columns(8192, width, torch.bfloat16))
    assert columns >= 2048  # wide enough for products that fill a GPU
    held = tiles.workspace_bytes(8192, columns, width, torch.bfloat16, True) + 8192 * width * 4
    assert held <= 300 * 2**20

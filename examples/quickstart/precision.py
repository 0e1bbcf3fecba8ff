"""Which dtype the quickstart computes in: bfloat16 halves its time, but only where the processor multiplies it."""

import torch

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def bfloat16_is_fast() -> bool:
    """Whether matrix products in bfloat16 run in hardware; on a CPU without them they take ten to a hundred times as
    long as in float32."""
    return torch.accelerator.is_available() or any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS)

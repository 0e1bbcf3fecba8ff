"""Which dtype the quickstart computes in: bfloat16 halves its time, but only where the processor multiplies it."""

import torch

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def processor_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; without, products take ten to a hundred times as long as in float32."""
    return any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS)


def bfloat16_is_fast() -> bool:
    """Whether matrix products in bfloat16 run in hardware where a model is trained."""
    return torch.accelerator.is_available() or processor_multiplies_bfloat16()

"""How this package's time and memory grow, one sweep per question: `python -m benchmarks.run --scaling --out FILE`.

On a synthetic peaked head (`benchmarks.cases.peaked_head`) of small width in float32, so that 65,536 tokens are soon
done; forward and backward of DPO + top-k KL, or of DPO alone at K = 0. Every point is a process of its own. What does
not vary in a sweep is the default of `Shape`, or stands in `SWEEPS`.

    {SWEEP: {environment, hidden_size, points: [POINT, ...]}, ...}
    POINT   tokens, vocab_size, top_k, masked (fraction of the tokens), valid_tokens
            variant        see `benchmarks.variants.find_variant`
            seconds        [first call, ...]; big problems are called once
            peak_mib       above the inputs; gradient_mib of it are the gradients that are returned
            logits_mib     what one float32 [valid_tokens, vocab_size] takes
            units          matrix products of the plan, estimate_mib: `dadpo_kernels.estimate_memory` of the
                           peak; both null for what is not ours
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import TOP_K, peaked_head, save_inputs, with_teacher
from benchmarks.process import child, log
from benchmarks.variants import Variant, find_variant
from dadpo_kernels.ops.backends.registry import resolve
from dadpo_kernels.ops.memory import MemoryEstimate, estimate_memory

HIDDEN_SIZE = 256
DENSE_LOGITS_MIB = 512  # above this the dense variant, which needs several times as much, is left out
CALLS, CALLS_UP_TO = 1, 8_192 * 32_768  # calls after the first, for logits of at most so many elements
CPU = torch.device("cpu")
WITH_DENSE = ("recompute", "default", "dense")


class Shape(NamedTuple):
    tokens: int = 4_096
    vocab_size: int = 32_768
    top_k: int = TOP_K
    masked: float = 0.0

    @property
    def valid_tokens(self) -> int:
        return self.tokens - int(self.tokens * self.masked)

    @property
    def logits_mib(self) -> float:
        return self.valid_tokens * self.vocab_size * 4 / 2**20


class Sweep(NamedTuple):
    shapes: tuple[Shape, ...]
    variants: tuple[str, ...] = ("recompute", "default")


def budgets(shape: Shape) -> tuple[str, ...]:
    """From nothing to all that there is to retain."""
    everything = estimate(shape, find_variant("retain")).plan.retained_bytes
    return tuple(f"budget={everything * eighths // 8}" for eighths in (0, 1, 2, 4, 6, 8))


def estimate(shape: Shape, variant: Variant) -> MemoryEstimate:
    """What the package itself says about a plan, before it runs."""
    return estimate_memory(
        shape.valid_tokens, shape.vocab_size, HIDDEN_SIZE, torch.float32, k=shape.top_k, tokens=shape.tokens,
        backend=resolve("auto", CPU, torch.float32), memory_budget=variant.memory_budget, frozen_head=variant.frozen,
    )  # fmt: skip


SWEEPS = {
    "tokens": Sweep(tuple(Shape(tokens=n) for n in (1_024, 2_048, 4_096, 16_384, 65_536)), WITH_DENSE),
    "vocabulary": Sweep(tuple(Shape(1_024, vocab_size=v) for v in (32_768, 65_536, 131_072, 262_144)), WITH_DENSE),
    "top_k": Sweep(tuple(Shape(2_048, top_k=k) for k in (0, 16, 64, 128, 256))),
    "masked": Sweep(tuple(Shape(masked=eighths / 8) for eighths in (0, 2, 4, 6, 7))),
    "budget": Sweep((Shape(),), budgets(Shape())),
    "frozen": Sweep((Shape(),), ("recompute", "recompute,frozen", "retain", "retain,frozen")),
}


def new_points(name: str, threads: int, known: list[dict]) -> Iterator[dict]:
    """The points of a sweep that are not among the `known` ones, measured one after the other."""
    done = {(Shape(*(found[field] for field in Shape._fields)), found["variant"]) for found in known}
    with tempfile.TemporaryDirectory() as directory:
        stored = Path(directory) / "inputs.safetensors"
        for shape in SWEEPS[name].shapes:
            variants = [v for v in SWEEPS[name].variants if fits(shape, v) and (shape, v) not in done]
            if variants:
                hidden, weight, labels = peaked_head(shape.tokens, HIDDEN_SIZE, shape.vocab_size)
                save_inputs(with_teacher(hidden, weight, labels, shape.top_k, masked=shape.masked), stored)
                del hidden, weight, labels  # a child needs the memory
            for variant in variants:
                yield point(stored, shape, variant, threads)


def fits(shape: Shape, variant: str) -> bool:
    return find_variant(variant).ours or shape.logits_mib <= DENSE_LOGITS_MIB


def point(inputs: Path, shape: Shape, name: str, threads: int) -> dict:
    variant = find_variant(name)
    calls = CALLS if shape.valid_tokens * shape.vocab_size <= CALLS_UP_TO else 0
    result = child(inputs, name, threads, calls, "--objective", "dpo+kl" if shape.top_k else "dpo")
    seconds = [result["first_seconds"], *result["seconds"]]
    log(f"  {shape} {name:14} {min(seconds):7.3f} s {result['peak_mib']:7.0f} MiB")
    gradients = shape.tokens + (0 if variant.frozen else shape.vocab_size)
    expected = estimate(shape, variant) if variant.ours else None
    return shape._asdict() | {
        "valid_tokens": shape.valid_tokens,
        "variant": name,
        "seconds": seconds,
        "peak_mib": result["peak_mib"],
        "gradient_mib": gradients * HIDDEN_SIZE * 4 / 2**20,
        "logits_mib": shape.logits_mib,
        "units": expected and expected.plan.units,
        "estimate_mib": expected and expected.total / 2**20,
    }

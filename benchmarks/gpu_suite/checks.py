"""Values and gradients on the device against float64, with the memory that they come from poisoned beforehand.

The tests' policy: an error may be three times that of full float32 logits from the same operands, plus roundings.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_suite.settings import PLANS, Settings
from benchmarks.gpu_suite.task import Task
from dadpo_kernels import SelectedLogps, linear_selected_logps, linear_topk_logps
from dadpo_kernels.ops.backends import triton_
from dadpo_kernels.ops.backends.tuning import CONFIGS, Config, candidates

CASES = ("ragged", "offset +60", "offset -60", "no gradient", "dlse = 0", "softcap")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
ROWS, VOCAB, K = 203, 5003, 17
MASKED = slice(1, None, 3)
TIES = (3, 150)  # how many of the best
MANY = (16_384, 151_936, 64)  # N, V, H with N V > 2^31
LANES = tuple(
    f"{backend} {dtype}"
    for backend in ("cuda", "triton", "triton_rows", "torch")
    for dtype in DTYPES
    if dtype != "float16" or not backend.startswith("triton")
)
CONFIGURATIONS = "triton configurations"  # a lane too


def correctness(s: Settings, lane: str) -> Iterator[Task]:
    """A lane is a backend and a dtype, with the fixed configurations; one has all others of the fused kernels."""
    if lane == CONFIGURATIONS:
        yield from configurations(s)
        return
    backend, dtype = lane.split()
    kind = {"backend": backend, "dtype": dtype}

    def on_device(check, *arguments) -> dict:
        with mock.patch.dict(os.environ, DADPO_AUTOTUNE="0"):
            return check(s.device, DTYPES[dtype], s.backend(backend, DTYPES[dtype]), *arguments)

    for case in CASES:
        for plan, budget in PLANS.items():
            run = partial(on_device, compare, case, budget)
            yield Task(lane, kind | {"plan": plan, "case": case}, run, 0.8)
    for k in TIES:
        yield Task(lane, kind | {"case": f"ties in the top {k}"}, partial(on_device, compare_topk, k), 0.8)
    if dtype == "bfloat16":
        for plan, budget in PLANS.items():
            run = partial(on_device, compare_last_rows, budget, (40, 600, 64) if s.dry else MANY)
            yield Task(lane, kind | {"plan": plan, "case": "beyond 2^31 logits"}, run, 3.0)


def configurations(s: Settings) -> Iterator[Task]:
    """Blocks that reach over the last row and the last column, of every configuration but the fixed ones."""
    lists = [candidates(kernel, s.capability // 10, torch.bfloat16, width_of("softcap")) for kernel in CONFIGS]

    def run(choice: int, case: str, budget: int) -> dict:
        with mock.patch.object(triton_, "choose", nth_choice(choice, s.capability)):
            return compare(s.device, torch.bfloat16, s.backend("triton"), case, budget)

    for choice in range(1, max(map(len, lists))):
        for case in ("softcap", "offset +60"):
            for plan, budget in PLANS.items():
                row = {"backend": "triton", "dtype": "bfloat16", "plan": plan, "case": case, "choice": choice}
                yield Task(f"choice {choice}", row, partial(run, choice, case, budget), 0.6)


def nth_choice(choice: int, capability: int) -> Callable[..., Config]:
    """In the place of `triton_.choose`: that of each kernel's list, or its last."""

    def choose(kernel: str, hidden: Tensor, softcap: bool, tma: bool, *_) -> Config:
        choices = candidates(kernel, capability // 10, hidden.dtype, hidden.shape[1], tma=tma)
        return choices[min(choice, len(choices) - 1)]

    return choose


def width_of(case: str) -> int:
    return 123 if case == "ragged" else 128


def problem(case: str, device: torch.device, rows: int = ROWS) -> dict:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    width = width_of(case)
    labels = torch.randint(VOCAB, (rows,), generator=generator, device=device)
    ids = torch.randint(VOCAB, (rows, K), generator=generator, device=device)
    ids[::2, 0] = labels[::2]
    labels[MASKED] = -100
    offset = {"offset +60": 60.0, "offset -60": -60.0}.get(case, 0.0)
    return {
        "tensors": {"hidden": randn(rows, width), "weight": randn(VOCAB, width) * 0.3, "bias": randn(VOCAB) + offset},
        "labels": labels,
        "topk_ids": ids,
        "softcap": 20.0 if case == "softcap" else None,
        "case": case,
    }


def incoming(case: str, out: SelectedLogps) -> list[Tensor]:
    """Gradients of the three outputs. With `dlse = 0` they cancel in every row, exactly: none but the selected entries
    of the logits get any."""
    if case == "no gradient":
        return [torch.zeros_like(o) for o in out]
    if case == "dlse = 0":
        topk = torch.full_like(out.topk, -1 / (K - 1))
        topk[:, -1] = 0
        return [torch.ones_like(out.label), topk, torch.zeros_like(out.tail)]
    generator = torch.Generator(out.label.device).manual_seed(1)
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in out]


def evaluate(p: dict, dtype: torch.dtype, backend: str, budget: int | None) -> dict[str, Tensor]:
    leaves = {name: t.detach().to(dtype, copy=True).requires_grad_() for name, t in p["tensors"].items()}
    poison(p["labels"].device)
    out = linear_selected_logps(
        leaves["hidden"], leaves["weight"], p["labels"], p["topk_ids"], bias=leaves["bias"], softcap=p["softcap"],
        backend=backend, memory_budget=budget,
    )  # fmt: skip
    grads = incoming(p["case"], out)
    poison(p["labels"].device)
    torch.autograd.backward(out, grads)
    return out._asdict() | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


def poison(device: torch.device) -> None:
    """What the allocator hands out next is full of NaN: blocks of every size, since small ones are kept apart."""
    sizes = [2**26 if device.type == "cuda" else 2**20, *(2**i for i in range(7, 19) for _ in range(4))]
    _ = [torch.full((size,), torch.nan, device=device) for size in sizes]


def compare(device: torch.device, dtype: torch.dtype, backend: str, case: str, budget: int) -> dict:
    """Values and gradients, twice."""
    p = problem(case, device)
    rounded = p | {"tensors": {name: t.to(dtype) for name, t in p["tensors"].items()}}
    got, again = (evaluate(rounded, dtype, backend, budget) for _ in range(2))
    plain = evaluate(rounded, dtype, "reference", None)
    exact = evaluate(rounded, torch.float64, "reference", None)
    eps = torch.finfo(torch.float32).eps
    worst, where = 0.0, ""
    for name, want in exact.items():
        scale = want.abs().max().clamp_min(1.0).item()
        allowed = 3 * (plain[name].double() - want).abs().max().item() + 16 * eps * scale
        # Retained exponentials and scaled hidden states are rounded each, where the reference rounds dz alone.
        allowed += torch.finfo(dtype).eps * scale if name.startswith("grad") else 0.0
        share = (got[name].double() - want).abs().max().item() / allowed
        if math.isnan(share) or share > worst:
            worst, where = math.inf if math.isnan(share) else share, name
    same = all(torch.equal(got[name], again[name]) for name in got)
    return {"error_over_allowed": worst, "worst": where, "repeatable": same, "ok": worst <= 1 and same}


def compare_topk(device: torch.device, dtype: torch.dtype, backend: str, k: int) -> dict:
    """Integer logits, which every dtype holds exactly: equals are everywhere, and the lowest ids win."""
    generator = torch.Generator(device).manual_seed(3)
    hidden, weight = (
        torch.randint(-2, 3, shape, generator=generator, device=device).to(dtype) for shape in ((203, 8), (5003, 8))
    )
    labels = torch.randint(5003, (203,), generator=generator, device=device)
    poison(device)
    got = linear_topk_logps(hidden, weight, k, labels=labels, backend=backend)
    want = linear_topk_logps(hidden.double(), weight.double(), k, labels=labels, backend="reference")
    worst = 0.0
    for a, b in zip((got.logps, got.tail, got.label), (want.logps, want.tail, want.label), strict=True):
        assert a is not None  # labels were given
        assert b is not None
        allowed = 16 * torch.finfo(torch.float32).eps * b.abs().max().clamp_min(1.0).item()
        worst = max(worst, (a.double() - b).abs().nan_to_num(torch.inf).max().item() / allowed)
    same = torch.equal(got.ids, want.ids)
    return {"error_over_allowed": worst, "same_ids": same, "ok": same and worst <= 1}


def compare_last_rows(
    device: torch.device, dtype: torch.dtype, backend: str, budget: int, many: tuple[int, int, int]
) -> dict:
    """Offsets beyond 32 bits: the last rows of a large problem, alone, must come out the same."""
    rows, vocab, width = many
    generator = torch.Generator(device).manual_seed(2)
    weight = torch.randn(vocab, width, generator=generator, device=device).mul_(0.3).to(dtype)
    hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)

    def run(part: slice, name: str) -> tuple[Tensor, Tensor]:
        leaf = hidden[part].clone().requires_grad_()
        out = linear_selected_logps(leaf, weight, labels[part], labels[part, None], backend=name, memory_budget=budget)
        (out.label.sum() + out.tail.sum()).backward()
        assert leaf.grad is not None
        return out.label.detach(), leaf.grad.float()

    last = slice(rows - 8, rows)
    got, want = run(slice(0, rows), backend), run(last, "reference")
    errors = [(a[-8:] - b).abs().max().item() for a, b in zip(got, want, strict=True)]
    allowed = [1e-3, 2 * torch.finfo(dtype).eps * want[1].abs().max().item()]
    shares = [e / a for e, a in zip(errors, allowed, strict=True)]
    return {"error_over_allowed": max(shares), "ok": all(share <= 1 for share in shares)}

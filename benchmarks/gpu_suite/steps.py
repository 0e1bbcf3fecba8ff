"""Whole steps, forward and backward: where their time goes, and how they compare with the products and with rivals."""

import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice

import torch

from benchmarks.cases import Inputs, peaked_head, with_teacher
from benchmarks.gpu_suite import cost_model
from benchmarks.gpu_suite.contenders import EAGER, RIVALS, Loss, our_name, ours, rival
from benchmarks.gpu_suite.settings import (
    GPU_BACKENDS,
    PLANS,
    REPEATS,
    SHAPES,
    TOKENS,
    TOP_K,
    Batch,
    Settings,
    Shape,
    batch,
)
from benchmarks.gpu_suite.task import Task
from benchmarks.gpu_suite.timing import Unavailable, peak_bytes, seconds, times
from benchmarks.variants import find_variant

HOTTEST = 12  # kernels of a profile
SETUP = 0.4  # seconds: the first batch of a shape, the first call of a kernel
TUNING = 0.6  # seconds, the fused kernels' share of it
COMPILING = 8.0  # seconds, a rival's kernels when they are first called
EAGER_STEP = 6  # times the products, at most
WHOLE_LOSSES, OTHERS_LOSSES = ("recompute", "default", "retain", "dense"), ("trl-compacted", "liger")
H100 = cost_model.GPUS["H100"]


def expected(shape: Shape, top_k: int, backend: str, plan: str) -> float:
    """Seconds of one step, as the cost model has it."""
    return cost_model.step(H100, backend, plan, TOKENS, shape.width, shape.vocab, top_k)


def expected_rival(shape: Shape) -> float:
    return EAGER_STEP * cost_model.three_products(H100, TOKENS, shape.width, shape.vocab)


class Step:
    """Forward and backward. The gradients replace those of the call before."""

    def __init__(self, loss: Loss, data: Batch) -> None:
        self.loss, self.data = loss, data
        self.hidden, self.weight = data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()

    def __call__(self) -> None:
        self.clear()
        self.loss(self.hidden, self.weight, self.data.labels, self.data.topk_ids).backward()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def profiles(s: Settings, lane: str) -> Iterator[Task]:
    """The kernels in which a step of each plan and backend spends its time."""
    for shape in SHAPES[:2]:
        data = cache(partial(batch, s, shape, TOP_K[0]))
        for backend in GPU_BACKENDS:
            for plan in PLANS:
                name = {"shape": shape.name, "top_k": TOP_K[0], "name": our_name(backend, plan)}
                time = SETUP + TUNING + 5 * expected(shape, TOP_K[0], backend, plan)
                yield Task(f"{backend}, {plan}", name, partial(hottest, s, data, backend, plan), time)


def hottest(s: Settings, data: Callable[[], Batch], backend: str, plan: str) -> dict:
    """Seconds of a step, of its kernels one after the other, and `[name, calls, seconds]` of the hottest."""
    run = Step(ours(s, backend, plan), data())
    time = seconds(s.device, run, min(3, s.repeats))
    kind = torch.profiler.ProfilerActivity.CPU if s.dry else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kind]) as recorded:
        run()
        if not s.dry:
            torch.cuda.synchronize()
    spent = "self_cpu_time_total" if s.dry else "self_device_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, spent))
    kernels = [[event.key[:100], event.count, getattr(event, spent) / 1e6] for event in events]
    return {
        "both_seconds": time,
        "all_kernels_seconds": sum(kernel[2] for kernel in kernels),
        "launches": sum(kernel[1] for kernel in kernels if kernel[2]),
        "kernels": kernels[:HOTTEST],
    }


def table(s: Settings, lane: str) -> Iterator[Task]:
    """Ours beside the three products alone, the most telling shapes first."""
    for top_k in TOP_K:
        for shape in SHAPES:
            data = cache(partial(batch, s, shape, top_k))
            if top_k == TOP_K[0]:
                yield products(s, shape, data)
            yield from rows(s, shape, top_k, False, data)
            if shape == SHAPES[0] and top_k == TOP_K[0]:
                yield from rows(s, shape, top_k, True, cache(partial(batch, s, shape, top_k, True)))


def rows(s: Settings, shape: Shape, top_k: int, masked: bool, data: Callable[[], Batch]) -> Iterator[Task]:
    for backend in GPU_BACKENDS:
        for plan in PLANS:
            name = {"shape": shape.name, "top_k": top_k, "masked": masked, "name": our_name(backend, plan)}
            time = SETUP + TUNING * (backend == "triton") + calls() * expected(shape, top_k, backend, plan)
            yield Task(f"{backend}, {plan}", name, partial(measured, s, partial(ours, s, backend, plan), data), time)


def products(s: Settings, shape: Shape, data: Callable[[], Batch]) -> Task:
    """The floor of a shape. Its row says how large the head is."""
    sizes = {"tokens": TOKENS, "width": shape.width, "vocab": shape.vocab}
    time = SETUP + (1 + REPEATS) * cost_model.three_products(H100, *sizes.values())
    return Task("products", {"shape": shape.name, "name": "the three products"} | sizes, partial(floor, s, data), time)


def floor(s: Settings, data: Callable[[], Batch]) -> dict:
    hidden, weight, *_ = data()

    def run() -> None:
        z = hidden @ weight.T
        _ = z @ weight, z.T @ hidden

    time = seconds(s.device, run, s.repeats)
    return {"both_seconds": time, "both_flops": 6 * len(hidden) * weight.numel() / time}


def measured(s: Settings, make: Callable[[], Loss], data: Callable[[], Batch]) -> dict:
    """Times and peaks of forward, and of forward with backward."""
    loss, tensors = make(), data()
    step = Step(loss, tensors)

    def forward() -> None:
        with torch.no_grad():
            loss(*tensors)

    step()  # compiles and tunes, which takes memory of its own
    step.clear()
    peak, forward_peak = peak_bytes(s.device, step), peak_bytes(s.device, forward)
    gradients = (tensors.hidden.numel() + tensors.weight.numel()) * tensors.hidden.element_size()
    passes = times(s.device, step, s.repeats)
    time, forward_time = statistics.median(passes), seconds(s.device, forward, s.repeats)
    product = 2 * s.sizes(SHAPES[0])[0] * tensors.weight.numel()
    return {  # the flops are those that the task needs, whatever else was computed
        "forward_seconds": forward_time,
        "forward_flops": product / forward_time,
        "forward_peak_bytes": forward_peak,
        "both_seconds": time,
        "both_slowest_seconds": max(passes),
        "both_flops": 3 * product / time,
        "peak_bytes_above_gradients": None if peak is None else peak - gradients,
    }


def calls() -> float:
    """How many steps `measured` takes the time of; a forward is a third of one."""
    return (3 + REPEATS) * 4 / 3


def rivals(s: Settings, call: str) -> Iterator[Task]:
    """PyTorch with full logits, then those who know label log-probabilities alone, shape by shape."""
    for shape in SHAPES:
        for top_k in TOP_K:
            data = cache(partial(batch, s, shape, top_k))
            for name in (EAGER, *([] if top_k else RIVALS[call])):
                row = {"shape": shape.name, "top_k": top_k, "masked": False, "name": name}
                time = SETUP + calls() * expected_rival(shape) / (1 if name == EAGER else 3)
                time += COMPILING * (name != EAGER and shape == SHAPES[0])
                yield Task(name, row, partial(measured, s, partial(rival, s, call, name), data), time)


def whole_losses(s: Settings, lane: str) -> Iterator[Task]:
    """DPO with the teacher's KL, from hidden states, ours and others', on the narrowest head."""
    shape = min(SHAPES, key=lambda shape: shape.width)
    tokens, width, vocab = s.sizes(shape)

    @cache
    def inputs() -> Inputs:
        hidden, weight, labels = peaked_head(2 * tokens, width, vocab, device=s.device)
        return with_teacher(hidden.to(torch.bfloat16), weight.to(torch.bfloat16), labels, top_k=TOP_K[0])

    for name in WHOLE_LOSSES + OTHERS_LOSSES:
        variant = find_variant(name)
        for objective in variant.objectives:
            time = SETUP + (3 + REPEATS) * expected_rival(shape) + 20 * (name == "liger")  # torch.compile
            row = {"shape": shape.name, "name": variant.label, "objective": objective}
            yield Task(name, row, partial(whole_loss, s, inputs, name, objective), time)


def whole_loss(s: Settings, inputs: Callable[[], Inputs], name: str, objective: str) -> dict:
    if s.dry and name in OTHERS_LOSSES:
        raise Unavailable("it is Triton's or a compiler's, which takes a minute on a CPU")
    tensors = inputs()

    def run() -> None:
        hidden, weight = tensors.hidden.detach().requires_grad_(), tensors.weight.detach().requires_grad_()
        find_variant(name).loss(tensors._replace(hidden=hidden, weight=weight), objective).backward()

    return {"seconds": seconds(s.device, run, s.repeats), "peak_bytes": peak_bytes(s.device, run)}


def rivals_and_losses(s: Settings, lane: str) -> Iterator[Task]:
    """The shapes that tell most, whole losses, then the other shapes."""
    most = 2 * (len(TOP_K) + len(RIVALS["first"]))
    yield from islice(rivals(s, "first"), most)
    yield from whole_losses(s, lane)
    yield from islice(rivals(s, "first"), most, None)


def second_rivals(s: Settings, lane: str) -> Iterator[Task]:
    """Those whose wheels fill an upload of their own, beside ours and the products."""
    for shape in SHAPES:
        data = cache(partial(batch, s, shape, 0))
        yield products(s, shape, data)
        yield from rows(s, shape, 0, False, data)
        yield from (
            task for task in rivals(s, "second") if task.name["shape"] == shape.name and not task.name["top_k"]
        )

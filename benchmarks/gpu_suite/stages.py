"""The stages: generators of rows, ready to be cut off after any of them."""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from dadpo_kernels.backends import BACKENDS, triton_, triton_tuning
from dadpo_kernels.backends.row_tiles import accumulate, rounded_mm
from dadpo_kernels.backends.tiled import Coefficients, Entries, Head, Kept, State
from dadpo_kernels.backends.torch_ import wide_mm

from ..cases import IGNORE_INDEX, peaked_head, with_teacher
from ..variants import find_variant
from .checks import correctness
from .contenders import COMPILED, contenders
from .row_passes import row_passes
from .sanitizer import sanitizers
from .timing import attempt, copy_bandwidth, peak_bytes, seconds, times


@dataclass(frozen=True)
class Settings:
    shapes: dict[str, tuple[int, int]]  # name: (H, V)
    tokens: int  # valid ones
    top_k: tuple[int, ...]
    square: int  # of the product that measures the ceiling
    copied: int  # bytes
    many: tuple[int, int, int]  # N, V, H with N V > 2^31
    pair_tokens: int  # of the end-to-end batch, half of them masked
    repeats: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


FULL = Settings(
    {
        "Qwen2.5-0.5B": (896, 151_936),
        "Llama-3-8B": (4096, 128_256),
        "Qwen2.5-1.5B": (1536, 151_936),
        "Gemma": (3072, 256_000),
        "Vicuna-7B": (4096, 32_000),
    },
    8192, (0, 16, 128), 8192, 2**30, (16_384, 151_936, 64), 8192, 5,
)  # fmt: skip
TINY = Settings({"tiny": (64, 600)}, 32, (0, 4), 64, 2**16, (40, 600, 64), 64, 1)


class Stage(NamedTuple):
    run: Callable[[Settings], Iterator[dict]]
    seconds: float


WHOLE_LOSSES, RIVALS = ("recompute", "default", "retain", "dense"), ("trl-compacted", "liger")


def ceilings(s: Settings) -> Iterator[dict]:
    yield {"what": "copy", "bytes_per_second": copy_bandwidth(s.device, s.copied, s.repeats)}
    a = torch.randn(s.square, s.square, device=s.device).to(torch.bfloat16)
    product = seconds(s.device, lambda: a @ a, s.repeats)
    yield {"what": f"bfloat16 product, {s.square} cubed", "flops": 2 * s.square**3 / product}


def check(s: Settings) -> Iterator[dict]:
    # The fixed configurations; `sweep` holds all others against them.
    with mock.patch.dict(os.environ, DADPO_AUTOTUNE="0"):
        yield from correctness(s.device, s.many)


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    topk_ids: Tensor | None


def batch(s: Settings, width: int, vocab: int, top_k: int, masked: bool) -> Batch:
    """`tokens` valid positions of a peaked head (see `benchmarks.cases`); masked: as many again without a label."""
    hidden, weight, labels = peaked_head(s.tokens, width, vocab, device=s.device)
    hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
    ids = torch.randint(vocab, (s.tokens, top_k), device=s.device) if top_k else None
    if ids is not None:
        ids[:, 0] = labels
    if masked:
        hidden, labels = torch.cat([hidden, hidden]), torch.cat([labels, torch.full_like(labels, IGNORE_INDEX)])
        ids = None if ids is None else torch.cat([ids, ids])
    return Batch(hidden, weight, labels, ids)


def table(s: Settings) -> Iterator[dict]:
    """Forward, and forward with backward, of everyone, beside the three products alone."""
    for shape, (width, vocab) in s.shapes.items():
        head = {"shape": shape, "name": "the three products", "tokens": s.tokens, "width": width, "vocab": vocab}
        yield head | attempt(lambda: floor(s, batch(s, width, vocab, 0, False)))  # noqa: B023
    yield from compare(s, compiled=False)


def compiled(s: Settings) -> Iterator[dict]:
    """The same of `torch.compile`, whose compilations take most of the time and so come last."""
    yield from compare(s, compiled=True)


def compare(s: Settings, compiled: bool) -> Iterator[dict]:
    for masked in (False, True):
        for top_k in s.top_k:
            for shape, (width, vocab) in list(s.shapes.items())[: 1 if masked else None]:
                data = batch(s, width, vocab, top_k, masked)
                for name, loss in contenders(s.device, data.hidden.dtype, top_k).items():
                    if (name == COMPILED) == compiled:
                        row = {"shape": shape, "top_k": top_k, "masked": masked, "name": name}
                        yield row | attempt(lambda: measured(s, loss, data))  # noqa: B023


def floor(s: Settings, data: Batch) -> dict:
    def products() -> None:
        z = data.hidden @ data.weight.T
        _ = z @ data.weight, z.T @ data.hidden

    time = seconds(s.device, products, s.repeats)
    return {"both_seconds": time, "both_flops": 6 * s.tokens * data.weight.numel() / time}


def measured(s: Settings, loss: Callable[..., Tensor], data: Batch) -> dict:
    hidden, weight = data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            loss(data.hidden, data.weight, data.labels, data.topk_ids)

    def both() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, data.labels, data.topk_ids).backward()

    both()
    hidden.grad = weight.grad = None
    peak, forward_peak = peak_bytes(s.device, both), peak_bytes(s.device, forward)
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    passes = times(s.device, both, s.repeats)
    time, forward_time = statistics.median(passes), seconds(s.device, forward, s.repeats)
    product = 2 * s.tokens * weight.numel()
    return {  # the flops are those that the task needs, whatever else was computed
        "forward_seconds": forward_time,
        "forward_flops": product / forward_time,
        "forward_peak_bytes": forward_peak,
        "both_seconds": time,
        "both_slowest_seconds": max(passes),
        "both_flops": 3 * product / time,
        "peak_bytes_above_gradients": None if peak is None else peak - gradients,
    }


def products(s: Settings) -> Iterator[dict]:
    """The products of a tile, by width of the tile: what the choice of WORKSPACE and STRIP rests on."""
    for shape, (width, vocab) in s.shapes.items():
        data = batch(s, width, vocab, 0, False)
        total = torch.zeros(s.tokens, width, device=s.device)
        for columns in dict.fromkeys(min(c, vocab) for c in (2048, 4096, 8192, 16_384, 32_768)):
            tile = data.weight[:columns]
            dz, out = torch.randn(s.tokens, columns, device=s.device).to(tile.dtype), torch.empty_like(tile)
            runs = {
                "logits": lambda: wide_mm(data.hidden, tile.T),  # noqa: B023
                "grad_hidden": lambda: accumulate(total, dz, tile),  # noqa: B023
                "grad_weight": lambda: rounded_mm(dz.T, data.hidden, out),  # noqa: B023
                "grad_weight, rounded by cuBLAS": lambda: torch.mm(dz.T, data.hidden, out=out),  # noqa: B023
            }
            for name, run in runs.items():
                time = seconds(s.device, run, s.repeats)
                flops = 2 * s.tokens * columns * width / time
                yield {"shape": shape, "columns": columns, "product": name, "seconds": time, "flops": flops}


def sweep(s: Settings) -> Iterator[dict]:
    """Every configuration of every fused kernel on one tile: its time, and how far it is from the fixed one."""
    if triton_.obstacle(s.device, torch.bfloat16):
        return
    # The interpreter, which the tests run this with, takes any list.
    major = torch.cuda.get_device_properties(s.device).major if s.device.type == "cuda" else 9
    for shape, (width, vocab) in s.shapes.items():
        data = batch(s, width, vocab, min(64, vocab // 2), False)
        tiles = triton_.FusedTiles(
            data.hidden, Head(data.weight, None, 1.0, None, 1.0), Entries.merge(data.labels, data.topk_ids)
        )
        columns = min(vocab, tiles.tile_columns(s.tokens, width, torch.bfloat16))
        for kernel, run in fused_passes(tiles, columns).items():
            fixed = None
            for config in triton_tuning.candidates(kernel, major, torch.bfloat16, width):
                with mock.patch.object(triton_, "choose", lambda *_, c=config: c):
                    found = attempt(lambda: timed_and_held(s, run, fixed))  # noqa: B023
                    yield {"shape": shape, "kernel": kernel, "config": str(config)} | found
                    if fixed is None and "error" not in found:
                        fixed = run()


def fused_passes(tiles: triton_.FusedTiles, columns: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """By the names in `triton_tuning`: a pass over the first tile, as it is called, and what it computes."""
    rows, entries = tiles.entries.ids.shape
    padded, groups = tiles.kept_shape(rows, columns)
    kept = Kept(tiles.hidden.new_empty(rows, padded), tiles.hidden.new_empty(rows, groups, dtype=torch.float32))
    ones = torch.ones(rows, device=tiles.hidden.device)
    coefficients = Coefficients(ones, 14 * ones, torch.ones_like(tiles.entries.ids, dtype=torch.float32))

    def statistics(store: Kept | None = None) -> tuple[Tensor, ...]:
        state = State.new(rows, entries, tiles.hidden)
        tiles.statistics(0, columns, state, store)
        return state.max, state.sum, state.selected

    return {
        "statistics": statistics,
        "retain": lambda: (*statistics(kept), kept.exps[:, :columns].float(), kept.bases[:, 0].clone()),
        "gradient": lambda: (tiles.logit_gradient(0, columns, coefficients).float(),),
    }


def timed_and_held(s: Settings, run: Callable[[], tuple[Tensor, ...]], fixed: tuple[Tensor, ...] | None) -> dict:
    """Largest difference from `fixed`, relative to the largest value: roundings of bfloat16 at most."""
    time, difference = seconds(s.device, run, s.repeats), 0.0
    for got, want in zip(run(), fixed or (), strict=fixed is not None):
        got, want = (t.masked_fill(t == -torch.inf, 0) for t in (got, want))
        apart = (got - want).abs().nan_to_num(torch.inf).max() / want.abs().max().clamp_min(1)
        difference = max(difference, apart.item())
    return {"seconds": time, "difference": difference, "ok": difference <= torch.finfo(torch.bfloat16).eps}


def passes(s: Settings) -> Iterator[dict]:
    """Of the first shape: a tile has the same columns in all of them."""
    width, vocab = next(iter(s.shapes.values()))
    data = batch(s, width, vocab, min(64, vocab // 2), False)
    assert data.topk_ids is not None
    yield from row_passes(data.hidden, data.weight, data.labels, data.topk_ids, s.copied, s.repeats)


def sanitize(s: Settings) -> Iterator[dict]:
    if BACKENDS["cuda"].obstacle(s.device, torch.bfloat16) is None:
        yield from sanitizers()


def end_to_end(s: Settings) -> Iterator[dict]:
    """The whole loss, DPO with the teacher's KL, against Liger's DPO, TRL's log-probabilities and full logits."""
    width, vocab = next(iter(s.shapes.values()))
    hidden, weight, labels = peaked_head(s.pair_tokens, width, vocab, device=s.device)
    inputs = with_teacher(hidden.to(torch.bfloat16), weight.to(torch.bfloat16), labels, top_k=min(64, vocab // 2))
    # Rivals are Triton's or a compiler's, which takes a minute on a CPU.
    for name in WHOLE_LOSSES + (RIVALS if s.device.type == "cuda" else ()):
        variant = find_variant(name)
        for objective in variant.objectives:

            def run(variant=variant, objective=objective) -> None:
                h, w = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
                variant.loss(inputs._replace(hidden=h, weight=w), objective).backward()

            def cost(run=run) -> dict:
                return {"seconds": seconds(s.device, run, s.repeats), "peak_bytes": peak_bytes(s.device, run)}

            yield {"name": variant.label, "objective": objective} | attempt(cost)


# The suite's own limit cuts the last ones short if all before took theirs. Each has left what it measured.
STAGES = {
    "ceilings": Stage(ceilings, 20),
    "correctness": Stage(check, 100),
    "table": Stage(table, 170),
    "end_to_end": Stage(end_to_end, 50),
    "row_passes": Stage(passes, 25),
    "sweep": Stage(sweep, 50),
    "products": Stage(products, 20),
    "compiled": Stage(compiled, 40),
    "sanitizers": Stage(sanitize, 120),
}


def run_stage(name: str, settings: Settings) -> None:
    """Prints a line of JSON for each row."""
    torch.manual_seed(0)
    for row in STAGES[name].run(settings):
        print(json.dumps(row), flush=True)


def profile(s: Settings) -> str:
    """The three kernels in which each backend spends most of a forward with backward."""
    width, vocab = next(iter(s.shapes.values()))
    data = batch(s, width, vocab, s.top_k[-1], False)
    weight = data.weight.requires_grad_()
    text = []
    for name, loss in contenders(s.device, data.hidden.dtype, s.top_k[-1]).items():
        if not name.startswith("dadpo-kernels"):
            continue
        loss(data.hidden, weight, data.labels, data.topk_ids).backward()
        with torch.profiler.profile() as recorded:
            loss(data.hidden, weight, data.labels, data.topk_ids).backward()
        key = f"self_{s.device.type}_time_total"
        text.append(f"{name}\n{recorded.key_averages().table(sort_by=key, row_limit=3)}")
    return "\n".join(text)

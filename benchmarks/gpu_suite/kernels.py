"""Kernels alone: what the device can do at most, the products around ours, row passes, and every configuration."""

import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_suite import cost_model
from benchmarks.gpu_suite.row_passes import PASSES, row_pass
from benchmarks.gpu_suite.settings import REPEATS, SHAPES, TOKENS, TOP_K, Batch, Settings, Shape, batch
from benchmarks.gpu_suite.task import Task
from benchmarks.gpu_suite.timing import Unavailable, copy_bandwidth, seconds
from dadpo_kernels.ops.backends import triton_, tuning
from dadpo_kernels.ops.backends.base import Coefficients, Entries, Retained, State
from dadpo_kernels.ops.backends.gpu_base import REACH, multiply
from dadpo_kernels.ops.backends.registry import BACKENDS
from dadpo_kernels.ops.backends.torch_ import wide_mm
from dadpo_kernels.ops.head import Head

SQUARE, COPIED = 8192, 2**30  # sides of the product and bytes of the copy that measure the ceilings
TILES = (16_384, 8192, 2560)  # columns: of one row pass, of `triton`'s tiles, and of `cuda`'s at 8,192 tokens
CONFIGURED = SHAPES[:2]
H100 = cost_model.GPUS["H100"]


def ceilings_and_products(s: Settings, lane: str) -> Iterator[Task]:
    yield Task("copy", {"what": "copy"}, partial(copy, s), 0.5)
    for out in ("bfloat16", "float32"):
        run = partial(square, s, out)
        yield Task("square", {"what": f"product, {SQUARE} cubed, {out} out"}, run, 0.2 + 2e-3 * REPEATS)
    for columns in (None, *TILES):
        for shape in SHAPES:
            yield from products(s, shape, columns)


def bandwidth(s: Settings) -> float:
    return copy_bandwidth(s.device, 2**16 if s.dry else COPIED, s.repeats)


def copy(s: Settings) -> dict:
    return {"bytes_per_second": bandwidth(s)}


def square(s: Settings, out: str) -> dict:
    side = 64 if s.dry else SQUARE
    a = torch.randn(side, side, device=s.device).to(torch.bfloat16)
    time = seconds(s.device, lambda: wide_mm(a, a) if out == "float32" else a @ a, s.repeats)
    return {"seconds": time, "flops": 2 * side**3 / time}


def products(s: Settings, shape: Shape, columns: int | None) -> Iterator[Task]:
    """The three products of so many columns of the vocabulary (of all: None), in both dtypes that they may return."""
    width = columns or shape.vocab

    @cache
    def operands() -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, *_ = batch(s, shape, 0)
        tile = weight[:width]
        return hidden, tile, torch.randn(len(hidden), len(tile), device=s.device).to(tile.dtype)

    sides = {"logits": (TOKENS, width, shape.width), "grad_hidden": (TOKENS, shape.width, width),
             "grad_weight": (width, shape.width, TOKENS)}  # fmt: skip
    for product, (rows, across, inner) in sides.items():
        for out in ("bfloat16", "float32", *(["as in a step"] if columns and product != "logits" else [])):
            name = {"shape": shape.name, "columns": width, "product": product, "out": out}
            # The rest: making operands, in float32, of which the largest are 8 GB.
            time = 0.05 + (1 + REPEATS) * cost_model.product(H100, rows, across, inner, 4)
            yield Task("products", name, partial(one_product, s, operands, product, out), time)


def one_product(s: Settings, operands: Callable, product: str, out: str) -> dict:
    hidden, tile, dz = operands()
    a, b = {"logits": (hidden, tile.T), "grad_hidden": (dz, tile), "grad_weight": (dz.T, hidden)}[product]
    if out == "as in a step":
        add = product == "grad_hidden"
        total = torch.zeros(len(a), b.shape[1], dtype=torch.float32 if add else a.dtype, device=s.device)
        run = partial(multiply, a, b, total, add=add)
    else:
        run = partial(wide_mm if out == "float32" else torch.mm, a, b)
    time = seconds(s.device, run, s.repeats)
    return {"seconds": time, "flops": 2 * len(a) * b.shape[1] * a.shape[1] / time}


def row_passes_and_sweep(s: Settings, lane: str) -> Iterator[Task]:
    """Of the first shape, since a tile has the same columns in all of them; then the fused kernels' configurations."""
    data, rate = cache(partial(batch, s, SHAPES[0], TOP_K[0])), cache(partial(bandwidth, s))
    for backend in ("cuda", "triton_rows"):
        for name in PASSES:
            row = {"backend": backend, "pass": name}
            yield Task(f"{backend} {name}", row, partial(one_pass, s, backend, name, data, rate), 0.6)
    for shape in CONFIGURED:
        tiles = cache(partial(fused_tiles, s, shape))
        for kernel in tuning.CONFIGS:
            for config in tuning.candidates(kernel, s.capability // 10, torch.bfloat16, shape.width):
                row = {"shape": shape.name, "kernel": kernel, "config": str(config)}
                yield Task(f"{kernel}, {config}", row, partial(configured, s, tiles, kernel, config), 0.3)


def one_pass(s: Settings, backend: str, name: str, data: Callable[[], Batch], rate: Callable[[], float]) -> dict:
    if s.dry:
        raise Unavailable("it needs a GPU")
    hidden, weight, labels, topk_ids = data()
    assert topk_ids is not None
    return row_pass(s.backend(backend), name, hidden, weight, labels, topk_ids, rate(), s.repeats)


def fused_tiles(s: Settings, shape: Shape) -> triton_.FusedTiles:
    data = batch(s, shape, TOP_K[0])
    head = Head(data.weight, None, 1.0, None, 1.0)
    return triton_.FusedTiles(data.hidden, head, Entries.merge(data.labels, data.topk_ids))


def configured(s: Settings, tiles: Callable[[], triton_.FusedTiles], kernel: str, config: tuning.Config) -> dict:
    """A fused kernel over the columns that it takes at a time: its time alone, and how far it is from the list's last
    configuration.

    The largest difference, relative to the largest value, is `ok` if roundings of bfloat16 explain it.
    """
    if reason := BACKENDS["triton"].obstacle(s.device, torch.bfloat16):
        raise Unavailable(reason)
    if s.dry and config.PERSISTENT:
        raise Unavailable("Triton's interpreter does not run Gluon")
    times: list[float] = []

    def timed(*arguments) -> tuning.Config:
        times.extend(tuning.timed([config], arguments[-1])[config])
        return config

    run, width = fused_pass(tiles(), kernel), tiles().hidden.shape[1]

    def choosing(choice: Callable[..., tuning.Config]) -> tuple[Tensor, ...]:
        """The pass with this choice for its kernel, and the plainest for others that it launches."""

        def choose(name: str, *arguments) -> tuning.Config:
            plainest = tuning.candidates(name, s.capability // 10, torch.bfloat16, width)[-1]
            return choice(plainest, *arguments) if name == kernel else plainest

        with mock.patch.object(triton_, "choose", choose):
            return run()

    want, got = choosing(lambda plainest, *_: plainest), choosing(lambda *_: config)
    if not s.dry:
        choosing(timed)
    difference = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = (t.masked_fill(t == -torch.inf, 0) for t in (a, b))
        apart = (a - b).abs().nan_to_num(torch.inf).max() / b.abs().max().clamp_min(1)
        difference = max(difference, apart.item())
    row = {"difference": difference, "ok": difference <= torch.finfo(torch.bfloat16).eps}
    if times:
        time, columns = statistics.median(times), columns_of(tiles(), kernel)
        row |= {"seconds": time, "flops": 2 * TOKENS * columns * width / time}
    return row


def columns_of(tiles: triton_.FusedTiles, kernel: str) -> int:
    """What a kernel takes at a time: a span in the forward, a tile in the backward."""
    rows = len(tiles.hidden)
    columns = tiles.tile_columns(*tiles.hidden.shape, torch.bfloat16) if kernel == "gradient" else triton_.span(rows)
    return min(len(tiles.weight), columns)


def fused_pass(tiles: triton_.FusedTiles, kernel: str) -> Callable[[], tuple[Tensor, ...]]:
    """By its name in `tuning`: a pass over the first columns, as it is called, and what it computes."""
    rows, entries = tiles.entries.ids.shape
    columns = columns_of(tiles, kernel)
    ones = torch.ones(rows, device=tiles.hidden.device)
    retained = Retained(tiles.padded(columns, tiles.hidden.dtype), torch.zeros_like(ones))
    coefficients = Coefficients(ones, 14 * ones, torch.ones_like(tiles.entries.ids, dtype=torch.float32))

    def forward(store: Retained | None) -> tuple[Tensor, ...]:
        state = State.new(rows, entries, tiles.hidden)
        tiles.forward(0, columns, state, store)
        return state.max, state.sum, state.selected

    def repair() -> tuple[Tensor, ...]:
        retained.bases.fill_(14 - 2 * REACH)
        tiles.repair(14 * ones, retained)
        return retained.exps.float(), retained.bases.clone()

    def probe() -> tuple[Tensor, ...]:
        state = State.new(rows, entries, tiles.hidden)
        return tiles.partial_states("probe", 0, columns, state, None)

    return {
        "probe": probe,
        "repair": repair,
        "forward": lambda: forward(None),
        "retain": lambda: (*forward(retained), retained.exps.float(), retained.bases.clone()),
        "gradient": lambda: (tiles.logit_gradient(0, columns, coefficients).float(),),
    }[kernel]

"""The passes over a tile in memory, alone: what they move, over their time, beside the copy bandwidth.

Each is timed as a CUDA graph of several calls, so that Python's time between kernels does not count. That it can be
captured shows that it neither waits for the device nor leaves the current stream or PyTorch's allocator.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_suite.timing import seconds
from dadpo_kernels.ops.backends.base import Best, Coefficients, Entries, Retained, State
from dadpo_kernels.ops.backends.gpu_base import RowTiles
from dadpo_kernels.ops.backends.registry import BACKENDS
from dadpo_kernels.ops.head import Head

CALLS = 10  # in a graph
PASSES = ("forward", "forward, retaining", "logit_gradient", "column_sums", "topk")
Pass = Callable[[], tuple[Tensor, ...]]  # gives what it computes


def row_pass(
    backend: str,
    name: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    copy: float,
    repeats: int,
) -> dict:
    """One of `PASSES` over the first tile of a head; `copy` is the device's bandwidth, in bytes per second."""
    rows, width = hidden.shape
    kind = BACKENDS[backend].tiles
    columns = min(len(weight), kind.tile_columns(rows, width, hidden.dtype))
    tiles = kind(hidden, Head(weight, None, 1.0, None, 1.0), Entries.merge(labels, topk_ids))
    assert isinstance(tiles, RowTiles)
    with mock.patch.object(tiles, "products", return_value=tiles.products(0, columns)):
        fresh, moved = passes(tiles, columns, topk_ids.shape[1])[name]
        return {"columns": columns} | measured(hidden.device, fresh, moved, repeats, copy)


def passes(tiles: RowTiles, columns: int, k: int) -> dict[str, tuple[Callable[[], Pass], int]]:
    """`{name: (a maker of the pass on a state of its own, bytes of the tile that it must move)}`."""
    hidden, (rows, entries) = tiles.hidden, tiles.entries.ids.shape
    ones = torch.ones(rows, device=hidden.device)
    coefficients = Coefficients(ones, 14 * ones, torch.ones_like(tiles.entries.ids, dtype=torch.float32))
    wide, narrow = 4 * rows * columns, hidden.element_size() * rows * columns

    def forward(retain: bool = False) -> Pass:
        state, retained = State.new(rows, entries, hidden), None
        if retain:
            retained = Retained(tiles.padded(columns, hidden.dtype).zero_(), torch.zeros_like(ones))

        def run() -> tuple[Tensor, ...]:
            tiles.forward(0, columns, state, retained)
            return state.max, state.sum, state.selected, *([retained.exps, retained.bases] if retained else [])

        return run

    def column_sums() -> Pass:
        generator = torch.Generator(hidden.device).manual_seed(0)
        matrix = tiles.padded(columns, hidden.dtype)
        matrix.copy_(torch.randn(rows, columns, generator=generator, device=hidden.device))
        out = hidden.new_zeros(columns, dtype=torch.float32)

        def run() -> tuple[Tensor, ...]:
            tiles.column_sums(matrix, ones, out)
            return (out,)

        return run

    def topk() -> Pass:
        state, most = State.new(rows, entries, hidden), min(k, columns)
        values = hidden.new_full((rows, 2 * most + 1), -torch.inf, dtype=torch.float32)
        ids = torch.zeros_like(values, dtype=torch.int32)
        best = Best(values, ids, ids[:, 0].clone(), most)

        def run() -> tuple[Tensor, ...]:
            tiles.topk(0, columns, state, best)
            return state.max, state.sum, values[:, :most], ids[:, :most]

        return run

    made = (
        (forward, wide),
        (lambda: forward(retain=True), wide + narrow),
        (lambda: lambda: (tiles.logit_gradient(0, columns, coefficients),), wide + narrow),
        (column_sums, narrow),
        (topk, wide),
    )
    return dict(zip(PASSES, made, strict=True))


def measured(device: torch.device, fresh: Callable[[], Pass], moved: int, repeats: int, copy: float) -> dict:
    """Bandwidth, and its share of the copy's; `ok`: the graph computes bit for bit what the calls do."""
    want = repeated(fresh())
    launch = as_graph(device, partial(repeated, fresh()))
    same = all(torch.equal(a, b) for a, b in zip(launch(), want, strict=True))
    rate = CALLS * moved / seconds(device, launch, repeats)
    return {"bytes_per_second": rate, "of_copy": rate / copy, "ok": same}


def repeated(run: Pass) -> tuple[Tensor, ...]:
    for _ in range(CALLS - 1):
        run()
    return run()


def as_graph(device: torch.device, run: Pass) -> Pass:
    """One launch of all that `run` launches, where there are graphs."""
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay(held: Pass = run) -> tuple[Tensor, ...]:  # a graph holds addresses: what `run` holds must live on
        graph.replay()
        return out

    return replay

"""What a step should take on a GPU, from tile sizes and traffic: predictions to hold the measurements against.

    matrix product   flops over the rate that whole waves of cuBLAS' blocks leave, or bytes over the copy's bandwidth
    row pass         instructions a row over the issue rate, or bytes over 0.85 of the copy's bandwidth
    fused kernel     k loop at the rate that L2 feeds, then the epilogue, which one block a multiprocessor cannot hide

The constants are readings of an H100 where one is named as such, else counts of instructions in the machine code or
published figures. A measured step that is more than `MISS` away says that one of them is wrong: find out which.
"""

import math
import re
from typing import NamedTuple

import torch

from dadpo_kernels.ops.backends.cuda import CudaTiles
from dadpo_kernels.ops.backends.gpu_base import RowTiles
from dadpo_kernels.ops.backends.triton_ import PROBE, SPAN, FusedTiles, TritonTiles

MISS = 0.2  # a prediction further away than this share of the measurement is to be understood
MULTIPROCESSORS = 132
SHARE_OF_COPY = 0.85  # of the copy's bandwidth, what a pass over memory reaches
ISSUE = 0.8  # of the issue slots, what arithmetic in registers fills
KERNEL = 4e-6  # seconds from one small kernel to the next
GLUE = {True: 0.9e-3, False: 0.3e-3}  # sort of the ids, coefficients, compaction; with top-k ids or without


class GPU(NamedTuple):
    flops: float  # of a large bfloat16 product (8192 cubed: 798 TFLOP/s on an H100, 788 on an H200)
    copy: float  # bytes read and written per second by a large copy (measured)
    clock: float = 1.7e9  # under the load of matrix products
    l2: float = 8.7e12  # bytes per second that the multiprocessors read from L2


GPUS = {"H100": GPU(790e12, 3.0e12), "H200": GPU(790e12, 4.3e12)}


class Fused(NamedTuple):
    """A block of the fused kernels, as Triton 3.6 compiles it."""

    rows: int
    columns: int
    rate: float  # of the product's flops, in the k loop
    epilogue: dict[str, int]  # cycles
    blocks: dict[str, int]  # on a multiprocessor at a time


WIDE = Fused(128, 256, 0.95, {"forward": 4000, "retain": 4000, "gradient": 4000},
             {"forward": 1, "retain": 1, "gradient": 1})  # fmt: skip  # persistent: its loads run on in the epilogue


def gpu_named(device: str) -> GPU | None:
    """The GPU of a device's name, as PyTorch has it."""
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device)), None)


def waves(rows: int, columns: int) -> float:
    """The share of the multiprocessors' time that the blocks of a product fill, with the best of cuBLAS' blocks."""
    best = 0.0
    for height, width, efficiency in (
        (128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (192, 128, 0.97), (128, 128, 0.92), (64, 256, 0.88),
    ):  # fmt: skip
        blocks = math.ceil(rows / height) * math.ceil(columns / width)
        held = math.ceil(blocks / MULTIPROCESSORS) * MULTIPROCESSORS * height * width
        best = max(best, efficiency * rows * columns / held)
    return min(1.0, best)


def product(gpu: GPU, rows: int, columns: int, inner: int, out_bytes: float, accumulate: bool = False) -> float:
    """Seconds of `[rows, inner] @ [inner, columns]` in bfloat16, the result in `out_bytes` an element."""
    fill = 16 * inner / (16 * inner + 1500)  # of a block's cycles, those of its k loop
    compute = 2 * rows * columns * inner / (gpu.flops * waves(rows, columns) * fill / 0.985)
    moved = rows * columns * out_bytes * (2 if accumulate else 1) + 2 * (rows + columns) * inner
    memory = moved / gpu.copy
    return max(compute, memory) + 0.15 * min(compute, memory)  # partly hidden


def three_products(gpu: GPU, tokens: int, width: int, vocab: int) -> float:
    """Seconds of the floor: logits, and the gradients of hidden states and weight, all in bfloat16."""
    return (
        product(gpu, tokens, vocab, width, 2)
        + product(gpu, tokens, width, vocab, 2)
        + product(gpu, vocab, width, tokens, 2)
    )


def row_pass(gpu: GPU, tiles: type[RowTiles], rows: int, columns: int, gradient: bool, moved: int) -> float:
    """Seconds of one pass over a tile in memory, `moved` bytes an element."""
    if tiles is CudaTiles:  # 4 warps a row, each with up to 8 chunks of 8 columns a thread
        chunks = math.ceil(columns / 1024)
        issued = math.ceil(rows / MULTIPROCESSORS) * 4 * (100 + (180 if gradient else 200) * chunks) / 4
    else:  # 26 instructions an element, on a row padded to a power of two, 128 lanes a cycle
        issued = rows / MULTIPROCESSORS * (1 << (columns - 1).bit_length()) * 26 / 128
    return max(issued / ISSUE / gpu.clock, rows * columns * moved / (SHARE_OF_COPY * gpu.copy)) + 3e-6


def gradients(gpu: GPU, tokens: int, width: int, columns: int, retained: bool) -> float:
    """The gradients of hidden and weight from a tile's gradient of the logits, or from all that is retained.

    That scales the product and hidden by a factor per row: 12 bytes an element.
    """
    weight = product(gpu, columns, width, tokens, 2)
    if not retained:
        return weight + product(gpu, tokens, width, columns, 4, accumulate=True)
    scaled = tokens * width * 12 / (SHARE_OF_COPY * gpu.copy)
    return weight + product(gpu, tokens, width, columns, 4) + scaled


def fused_pass(gpu: GPU, tile: Fused, tokens: int, width: int, vocab: int, kernel: str) -> float:
    """Seconds of a fused kernel ("forward", "retain" or "gradient") over the whole vocabulary."""
    fed = gpu.l2 * tile.rows * tile.columns / (tile.rows + tile.columns)  # flops, at 2 bytes an operand
    rate = min(gpu.flops * tile.rate, fed) / MULTIPROCESSORS
    loop = 2 * tile.rows * tile.columns * width / rate + 1200 / gpu.clock
    epilogue = tile.epilogue[kernel] / gpu.clock
    block = loop + epilogue if tile.blocks[kernel] == 1 else max(loop, epilogue) + 0.25 * min(loop, epilogue)
    return math.ceil(tokens / tile.rows) * math.ceil(vocab / tile.columns) / MULTIPROCESSORS * block * 1.03


def step(
    gpu: GPU, backend: str, plan: str, tokens: int, width: int, vocab: int, top_k: int
) -> float:  # fmt: skip
    """Seconds of forward with backward of `linear_selected_logps` in bfloat16, everything valid.

    Args:
        backend: "cuda", "triton_rows" or "triton".
        plan: "retain" or "recompute".
    """
    retain, bfloat16 = plan == "retain", torch.bfloat16
    if backend == "triton":
        columns = FusedTiles.tile_columns(tokens, width, bfloat16)

        def fused(kernel: str) -> float:
            return fused_pass(gpu, WIDE, tokens, width, vocab, kernel)

        products = fused("retain") if retain else fused("forward") + fused("gradient")
        # The entries' ranges and the merge of a span; a tile's ranges; the columns that are computed twice.
        products += math.ceil(vocab / SPAN) * 2 * KERNEL
        products += fused("forward") * PROBE / vocab + 6 * KERNEL if retain else math.ceil(vocab / columns) * KERNEL
    else:
        kind = {"cuda": CudaTiles, "triton_rows": TritonTiles}[backend]
        columns = min(8192, RowTiles.tile_columns(tokens, width, bfloat16))
        tile = product(gpu, tokens, columns, width, 4)
        if retain:
            a_tile = tile + row_pass(gpu, kind, tokens, columns, False, 6)
        else:
            a_tile = 2 * tile + row_pass(gpu, kind, tokens, columns, False, 4)
            a_tile += row_pass(gpu, kind, tokens, columns, True, 6)
        products = vocab / columns * a_tile
    if retain:
        return products + gradients(gpu, tokens, width, vocab, True) + GLUE[bool(top_k)]
    return products + vocab / columns * gradients(gpu, tokens, width, columns, False) + GLUE[bool(top_k)]

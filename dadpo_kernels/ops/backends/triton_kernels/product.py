"""One tile of `hidden @ weight.T` with `tl.dot`, and the range of each row's entries inside it.

A program computes `BLOCK_M` rows by `BLOCK_N` columns. The logits stay in registers; the kernels in `fused`
consume them and write only their results to memory.
"""

import triton
import triton.language as tl
from triton import knobs

from .logits import transform

# Triton's interpreter multiplies the bit patterns of bfloat16 operands; there they are converted to float32 first.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """`(row block, column block)` of this program. GROUP row blocks sweep all columns together, for reuse in L2."""
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * column_blocks) * GROUP
    height = min(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    return first + within % height, within // height


@triton.jit
def product_tile(
    hidden, hidden_stride, rows,  # [rows, width]: pointer and row stride in elements, or a TMA descriptor
    weight, weight_stride, columns, width,  # [columns, width], likewise
    row_block, column_block,  # indices from `place`
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # width is a multiple of BLOCK_K: loads need no mask
    TMA: tl.constexpr,
):  # fmt: skip
    """The float32 products `[BLOCK_M, BLOCK_N]`.

    Rows and columns past the end hold values that callers must not store: copies of the last row or column, or zeros
    if TMA is used.
    """
    # Pointers to the first BLOCK_K columns of both operands. Indices are clamped, so loads need no mask along M and N.
    if not TMA:
        row = tl.minimum(row_block * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
        column = tl.minimum(column_block * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        a_at = hidden + row[:, None] * hidden_stride + k[None, :]
        b_at = weight + column[None, :] * weight_stride + k[:, None]
    # Without this hint the loop may run zero times, and a branch around it carries zeros to the accumulator. With
    # those, ptxas 12.8 (Triton 3.6) does not pipeline a TMA tile: it waits after every wgmma.
    tl.assume(width > 0)
    # Accumulate over the inner dimension in float32.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if TMA:
            a = hidden.load([row_block * BLOCK_M, start])
            b = weight.load([column_block * BLOCK_N, start]).T
        elif EVEN_K:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            inside = k < width - start
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
            b = tl.load(b_at, mask=inside[:, None], other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
        if not TMA:
            a_at += BLOCK_K
            b_at += BLOCK_K
    return acc


@triton.jit
def logit_tile(
    hidden, hidden_stride, rows, weight, weight_stride,  # as in `product_tile`
    bias, columns, width, row_block, column_block,  # bias: [columns] or None
    scale, softcap, inv_temperature,  # floats; softcap is ignored unless SOFTCAP
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """`(row [BLOCK_M], column [BLOCK_N], float32 logits [BLOCK_M, BLOCK_N])`; logits past the last column are -inf."""
    product = product_tile(
        hidden, hidden_stride, rows, weight, weight_stride, columns, width, row_block, column_block,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA,
    )  # fmt: skip
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias is not None:
        product += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    z = transform(product, scale, softcap, inv_temperature, SOFTCAP)
    return row, column, tl.where((column < columns)[None, :], z, float("-inf"))


@triton.jit
def entry_ranges(starts, row, rows, column_block):
    """`(begin, end)` `[BLOCK_M]`: each row's entries in this column block; `starts` is int32 `[blocks + 1, rows]`."""
    at = starts + column_block.to(tl.int64) * rows + row
    begin = tl.load(at, mask=row < rows, other=0)
    return begin, tl.load(at + rows, mask=row < rows, other=0)

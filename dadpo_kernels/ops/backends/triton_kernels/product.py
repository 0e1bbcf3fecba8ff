"""One tile of `hidden @ weight.T` on the matrix units, and the entries of its rows that lie in it.

A program owns `BLOCK_M` rows and `BLOCK_N` columns. Its logits live in registers; what goes to memory is what the
kernels of `forward` and `backward` make of them.
"""

import triton
import triton.language as tl
from triton import knobs

from .logits import transform

# The interpreter's product of bfloat16 operands is garbage (it multiplies their bits): there they are widened first.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """`(row block, column block)`: GROUP row blocks pass over all columns together: both operands stay in L2."""
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * column_blocks) * GROUP
    height = min(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    return first + within % height, within // height


@triton.jit
def product_tile(
    hidden, hidden_stride, rows, weight, weight_stride, columns, width, row_block, column_block,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """float32 `[BLOCK_M, BLOCK_N]`. What lies behind the end is never stored: it repeats the last row or column or, if
    TMA copies the blocks of the descriptors `hidden` and `weight`, it is zero.
    """
    if not TMA:
        row = tl.minimum(row_block * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
        column = tl.minimum(column_block * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        a_at = hidden + row[:, None] * hidden_stride + k[None, :]
        b_at = weight + column[None, :] * weight_stride + k[:, None]
    # The loop runs at least once. Where it might not, zeros reach the accumulator by a way around it, and ptxas 12.8
    # (Triton 3.6) then gives up the pipeline of a TMA tile: it waits after every single wgmma.
    tl.assume(width > 0)
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
    hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, row_block, column_block,
    scale, softcap, inv_temperature,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """`(row, column, logits)`; logits behind the last column are -inf."""
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
    """`(begin, end)` of each row's entries in this block of columns, from `starts [blocks + 1, rows]`."""
    at = starts + column_block.to(tl.int64) * rows + row
    begin = tl.load(at, mask=row < rows, other=0)
    return begin, tl.load(at + rows, mask=row < rows, other=0)

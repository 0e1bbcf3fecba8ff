"""Backward of the fused plan for tiles that were not retained: product and gradient of the logits in one kernel.

Only the gradient of the logits is written, one vocabulary tile at a time, in the operands' dtype. `triton_.py` passes
it to cuBLAS for the gradients of hidden and weight.
"""

import triton
import triton.language as tl

from .logits import slope
from .product import entry_ranges, logit_tile, place


@triton.jit(do_not_specialize=["first", "entries"])
def logit_gradient(
    hidden, hidden_stride, rows,  # [rows, width] float32 or bfloat16: pointer and row stride, or a TMA descriptor
    weight, weight_stride, bias,  # [columns, width] likewise; [columns] or None
    columns, width, first,  # the tile is columns [first, first + columns) of the vocabulary
    scale, softcap, inv_temperature,  # floats
    starts,  # [column blocks + 1, rows] int32: where each row's entries of each column block begin
    ids, entries,  # [rows, entries] int32, ascending along a row
    c, base, values,  # [rows], [rows], [rows, entries] float32
    dz, dz_stride,  # [rows, columns] written, operands' dtype; row stride in elements
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`dz = c exp(z - base)` times the softcap's slope; at the entries `values`, which agree for equal ids."""
    row_block, column_block = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row, column, z = logit_tile(
        hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, row_block, column_block,
        scale, softcap, inv_temperature, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA,
    )  # fmt: skip
    # The gradient outside the entries.
    inside = row < rows
    d = tl.exp(z - tl.load(base + row, mask=inside, other=0.0)[:, None])
    d *= tl.load(c + row, mask=inside, other=0.0)[:, None]
    if SOFTCAP:
        d *= slope(z, softcap, inv_temperature)
    # Overwrite the entries: each step handles the next entry of all rows at once.
    wide_row = row.to(tl.int64)
    block_first = first + column_block * BLOCK_N
    begin, end = entry_ranges(starts, row, rows, column_block)
    for step in range(0, tl.max(end - begin, 0)):
        entry = wide_row * entries + begin + step
        live = begin + step < end
        id = tl.load(ids + entry, mask=live, other=-1)
        value = tl.load(values + entry, mask=live, other=0.0)
        d = tl.where(tl.arange(0, BLOCK_N)[None, :] == (id - block_first)[:, None], value[:, None], d)
    tl.store(
        dz + wide_row[:, None] * dz_stride + column[None, :],
        d.to(dz.dtype.element_ty),
        mask=inside[:, None] & (column < columns)[None, :],
    )

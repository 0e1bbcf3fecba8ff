"""The backward of the fused plan where nothing was retained: product and gradient of the logits in one kernel.

The gradient leaves the chip in the operands' dtype, a tile of the vocabulary at a time, for the two products that
`triton_.py` hands to cuBLAS.
"""

import triton
import triton.language as tl

from .logits import slope
from .product import entry_ranges, logit_tile, place


@triton.jit(do_not_specialize=["first", "entries"])
def logit_gradient(
    hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, first, scale, softcap, inv_temperature,
    starts, ids, entries, c, base, values, dz, dz_stride,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`dz = c exp(z - base)`, its values at the entries (those of equal ids are equal)."""
    row_block, column_block = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row, column, z = logit_tile(
        hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, row_block, column_block,
        scale, softcap, inv_temperature, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA,
    )  # fmt: skip
    inside = row < rows
    d = tl.exp(z - tl.load(base + row, mask=inside, other=0.0)[:, None])
    d *= tl.load(c + row, mask=inside, other=0.0)[:, None]
    if SOFTCAP:
        d *= slope(z, softcap, inv_temperature)
    wide_row = row.to(tl.int64)
    here = first + column_block * BLOCK_N
    begin, end = entry_ranges(starts, row, rows, column_block)
    for step in range(0, tl.max(end - begin, 0)):
        entry = wide_row * entries + begin + step
        live = begin + step < end
        id = tl.load(ids + entry, mask=live, other=-1)
        value = tl.load(values + entry, mask=live, other=0.0)
        d = tl.where(tl.arange(0, BLOCK_N)[None, :] == (id - here)[:, None], value[:, None], d)
    tl.store(
        dz + wide_row[:, None] * dz_stride + column[None, :],
        d.to(dz.dtype.element_ty),
        mask=inside[:, None] & (column < columns)[None, :],
    )

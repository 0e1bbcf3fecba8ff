"""The forward of the fused plan: product, softmax state of the tail, entries and retained exponentials in one kernel.

Every row meets its entries of the block one after the other: a round handles the next entry of all rows at once, so
there are as many rounds as the busiest row has entries here, seldom more than two among thousands of columns.
"""

import triton
import triton.language as tl

from .logits import finite, slope
from .product import entry_ranges, logit_tile, place


@triton.jit(do_not_specialize=["first", "entries"])
def statistics(
    hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, first, scale, softcap, inv_temperature,
    starts, ids, drop, entries, selected, part_max, part_sum, exps, exps_stride, bases, bases_stride, only,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Softmax states `part_* [blocks, rows]` of the columns outside the top k, `selected` and, unless None, `exps`.

    `drop` marks the last of each row's equal ids if it is a top-k id: only then does its column leave the tail, for
    the equal ones before it read the logit too. `only [rows]`: a repair, which writes the exponentials of the marked
    rows alone and nothing else.
    """
    row_block, column_block = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    if only is not None:
        row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        if tl.max(tl.load(only + row, mask=row < rows, other=0).to(tl.int32), 0) == 0:
            return
    row, column, z = logit_tile(
        hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, row_block, column_block,
        scale, softcap, inv_temperature, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA,
    )  # fmt: skip
    wide_row = row.to(tl.int64)
    here = first + column_block * BLOCK_N
    begin, end = entry_ranges(starts, row, rows, column_block)
    for step in range(0, tl.max(end - begin, 0)):
        entry = wide_row * entries + begin + step
        live = begin + step < end
        id = tl.load(ids + entry, mask=live, other=-1)
        hit = tl.arange(0, BLOCK_N)[None, :] == (id - here)[:, None]
        if only is None:
            tl.store(selected + entry, tl.sum(tl.where(hit, z, 0.0), 1), mask=live)
        dropped = tl.load(drop + entry, mask=live, other=0) != 0
        z = tl.where(hit & dropped[:, None], float("-inf"), z)

    largest = tl.max(z, 1)
    e = tl.exp(z - finite(largest)[:, None])
    if only is None:
        at = column_block.to(tl.int64) * rows + row
        tl.store(part_max + at, largest, mask=row < rows)
        tl.store(part_sum + at, tl.sum(e, 1), mask=row < rows)
    if exps is not None:
        base = tl.load(bases + wide_row * bases_stride, mask=row < rows, other=0.0)
        written = row < rows
        if only is not None:
            written = written & (tl.load(only + row, mask=row < rows, other=0) != 0)
        # Bounded, for a guess too low would make inf, and 0 * inf is not the 0 of a block of -inf.
        e *= tl.exp(tl.minimum(finite(largest) - base, 80.0))[:, None]
        if SOFTCAP:
            e *= slope(z, softcap, inv_temperature)
        tl.store(
            exps + wide_row[:, None] * exps_stride + column[None, :],
            e.to(exps.dtype.element_ty),
            mask=written[:, None] & (column < columns)[None, :],
        )

"""Forward of the fused plan: product, softmax state of the tail, entries and retained exponentials in one kernel.

A loop handles the next entry of all rows at once. It takes as many steps as the row with the most entries in the
column block, rarely more than two among thousands of columns.
"""

import triton
import triton.language as tl

from .logits import finite, slope
from .product import entry_ranges, logit_tile, place


@triton.jit(do_not_specialize=["first", "entries"])
def statistics(
    hidden, hidden_stride, rows,  # [rows, width] float32 or bfloat16: pointer and row stride, or a TMA descriptor
    weight, weight_stride, bias,  # [columns, width] likewise; [columns] or None
    columns, width, first,  # the tile is columns [first, first + columns) of the vocabulary
    scale, softcap, inv_temperature,  # floats
    starts,  # [column blocks + 1, rows] int32: where each row's entries of each column block begin
    ids, drop, entries,  # [rows, entries] int32 (ascending along a row) and bool
    selected,  # [rows, entries] float32 written: the entries' logits
    part_max, part_sum,  # [column blocks, rows] float32 written: softmax states of the columns outside the top k
    exps, exps_stride,  # [rows, columns] written, operands' dtype; row stride in elements; None: do not retain
    bases, bases_stride,  # [rows] float32 the exponentials' reference; stride in elements
    only,  # [rows] int8 or None
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Partial softmax states of the tail, the entries' logits and, optionally, the retained exponentials.

    Equal ids are adjacent. `drop` marks only the last of them, if it is a top-k id: the earlier ones must read the
    logit before the column is removed from the tail.

    With `only`, this is a repair: it rewrites the exponentials of the marked rows and nothing else.
    """
    # A repair skips the whole block if none of its rows is marked.
    row_block, column_block = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    if only is not None:
        row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        if tl.max(tl.load(only + row, mask=row < rows, other=0).to(tl.int32), 0) == 0:
            return
    row, column, z = logit_tile(
        hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, row_block, column_block,
        scale, softcap, inv_temperature, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA,
    )  # fmt: skip

    # Store the entries' logits and mask the top-k ids out of the tail.
    wide_row = row.to(tl.int64)
    block_first = first + column_block * BLOCK_N
    begin, end = entry_ranges(starts, row, rows, column_block)
    for step in range(0, tl.max(end - begin, 0)):
        entry = wide_row * entries + begin + step
        live = begin + step < end
        id = tl.load(ids + entry, mask=live, other=-1)
        hit = tl.arange(0, BLOCK_N)[None, :] == (id - block_first)[:, None]
        if only is None:
            tl.store(selected + entry, tl.sum(tl.where(hit, z, 0.0), 1), mask=live)
        dropped = tl.load(drop + entry, mask=live, other=0) != 0
        z = tl.where(hit & dropped[:, None], float("-inf"), z)

    # The softmax state of this column block, relative to its own maximum.
    largest = tl.max(z, 1)
    e = tl.exp(z - finite(largest)[:, None])
    if only is None:
        at = column_block.to(tl.int64) * rows + row
        tl.store(part_max + at, largest, mask=row < rows)
        tl.store(part_sum + at, tl.sum(e, 1), mask=row < rows)

    # Rescale the exponentials from the block's maximum to the row's base, and retain them.
    if exps is not None:
        base = tl.load(bases + wide_row * bases_stride, mask=row < rows, other=0.0)
        written = row < rows
        if only is not None:
            written = written & (tl.load(only + row, mask=row < rows, other=0) != 0)
        # Clamped: a base guessed too low would overflow to inf, and 0 * inf is NaN.
        e *= tl.exp(tl.minimum(finite(largest) - base, 80.0))[:, None]
        if SOFTCAP:
            e *= slope(z, softcap, inv_temperature)
        tl.store(
            exps + wide_row[:, None] * exps_stride + column[None, :],
            e.to(exps.dtype.element_ty),
            mask=written[:, None] & (column < columns)[None, :],
        )

"""Kernels that compute the product and consume it on the chip: of the logits, none is written to memory.

The forward stores the tail's softmax states, the entries' logits and, optionally, exponentials; the backward stores
the gradient of the logits of one vocabulary tile at a time, which `triton_.py` passes to cuBLAS.

A row's entries (its label and top-k ids) are few among thousands of columns. A loop handles the next entry of all rows
at once: it takes as many steps as the row with the most entries in the column block, rarely more than two.
"""

import triton
import triton.language as tl

from .logits import finite, slope
from .product import entry_ranges, logit_tile, place


@triton.jit(do_not_specialize=["first", "entries"])
def forward(
    hidden, hidden_stride, rows,  # [rows, width] float32 or bfloat16: pointer and row stride, or a TMA descriptor
    weight, weight_stride, bias,  # [columns, width] likewise; [columns] or None
    columns, width, first,  # the tile is columns [first, first + columns) of the vocabulary
    scale, softcap, inv_temperature,  # floats
    starts,  # [column blocks + 1, rows] int32: where each row's entries of each column block begin
    ids, entries,  # [rows, entries] int32, ascending along a row
    exps, exps_stride,  # [rows, columns] written, operands' dtype; row stride in elements; None: do not retain
    drop,  # [rows, entries] bool
    selected,  # [rows, entries] float32 written: the entries' logits
    part_max, part_sum,  # [column blocks, rows] float32 written: softmax states of the columns outside the top k
    bases,  # [rows] float32: the exponentials' reference; None: do not retain
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Partial softmax states of the tail, the entries' logits and, optionally, the retained exponentials.

    Equal ids are adjacent. `drop` marks only the last of them, if it is a top-k id: the earlier ones must read the
    logit before the column is removed from the tail.
    """
    row_block, column_block = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
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
        tl.store(selected + entry, tl.sum(tl.where(hit, z, 0.0), 1), mask=live)
        dropped = tl.load(drop + entry, mask=live, other=0) != 0
        z = tl.where(hit & dropped[:, None], float("-inf"), z)

    # The softmax state of this column block, relative to its own maximum.
    largest = tl.max(z, 1)
    e = tl.exp(z - finite(largest)[:, None])
    at = column_block.to(tl.int64) * rows + row
    tl.store(part_max + at, largest, mask=row < rows)
    tl.store(part_sum + at, tl.sum(e, 1), mask=row < rows)

    # Rescale the exponentials from the block's maximum to the row's base, and retain them.
    if exps is not None:
        base = tl.load(bases + row, mask=row < rows, other=0.0)
        # Clamped: a base too low would overflow to inf, and 0 * inf is NaN. `repair` rewrites such rows.
        e *= tl.exp(tl.minimum(finite(largest) - base, 80.0))[:, None]
        if SOFTCAP:
            e *= slope(z, softcap, inv_temperature)
        tl.store(
            exps + wide_row[:, None] * exps_stride + column[None, :],
            e.to(exps.dtype.element_ty),
            mask=(row < rows)[:, None] & (column < columns)[None, :],
        )


@triton.jit
def repair(
    hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width,  # as in `forward`
    scale, softcap, inv_temperature,
    exps, exps_stride,  # [rows, columns], rewritten where the reference changes
    before, bases,  # [rows] float32: the reference of the exponentials, and what it is to be
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Computes the exponentials of some rows anew, relative to another base; the entries' too, which nobody reads.

    A program sweeps all columns for its block of rows, and ends at once where no row of it changes.
    """
    row_block = tl.program_id(0)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    base = tl.load(bases + row, mask=row < rows, other=0.0)
    stale = tl.load(before + row, mask=row < rows, other=0.0) != base
    if tl.max(stale.to(tl.int32), 0) == 0:
        return
    for column_block in range(tl.program_id(1), tl.cdiv(columns, BLOCK_N), tl.num_programs(1)):
        row, column, z = logit_tile(
            hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, row_block, column_block,
            scale, softcap, inv_temperature, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA,
        )  # fmt: skip
        e = tl.exp(tl.minimum(z - base[:, None], 80.0))
        if SOFTCAP:
            e *= slope(z, softcap, inv_temperature)
        tl.store(
            exps + row.to(tl.int64)[:, None] * exps_stride + column[None, :],
            e.to(exps.dtype.element_ty),
            mask=stale[:, None] & (column < columns)[None, :],
        )


@triton.jit(do_not_specialize=["first", "entries"])
def logit_gradient(
    hidden, hidden_stride, rows, weight, weight_stride, bias, columns, width, first,  # as in `forward`
    scale, softcap, inv_temperature, starts, ids, entries,
    dz, dz_stride,  # [rows, columns] written, operands' dtype; row stride in elements
    c, base, values,  # [rows], [rows], [rows, entries] float32
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
    # Overwrite the entries.
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


@triton.jit(do_not_specialize=["rows", "entries", "first", "columns", "block"])
def starts(
    ids, rows, entries,  # [rows, entries] int32, ascending along a row
    first, columns, block,  # the tile is columns [first, first + columns) of the vocabulary, in blocks of `block`
    out,  # [blocks + 1, rows] int32 written
    ROWS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Where each row's entries of each column block begin, and at the end of the last block end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    edge = tl.program_id(1) * EDGES + tl.arange(0, EDGES)
    limit = first + tl.minimum(edge * block, columns)
    below = tl.zeros((EDGES, ROWS), tl.int32)
    for entry in range(0, entries):
        id = tl.load(ids + row.to(tl.int64) * entries + entry, mask=row < rows, other=0)
        below += (id[None, :] < limit[:, None]).to(tl.int32)
    inside = (edge <= tl.cdiv(columns, block))[:, None] & (row < rows)[None, :]
    tl.store(out + edge.to(tl.int64)[:, None] * rows + row[None, :], below, mask=inside)


@triton.jit(do_not_specialize=["rows", "groups"])
def merge(
    part_max, part_sum,  # [groups, rows] float32: partial softmax states
    rows, groups,
    state_max, state_sum,  # [rows] float32 and float64, updated
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Merges partial softmax states into the running state, in a fixed order, the sum in float64."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.load(state_max + row, mask=row < rows, other=float("-inf"))
    total = tl.load(state_sum + row, mask=row < rows, other=0.0)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        ok = (row < rows)[None, :] & (group < groups)[:, None]
        at = group.to(tl.int64)[:, None] * rows + row[None, :]
        maxima = tl.load(part_max + at, mask=ok, other=float("-inf"))
        sums = tl.load(part_sum + at, mask=ok, other=0.0)
        merged = tl.maximum(largest, tl.max(maxima, 0))
        share = tl.exp(maxima - finite(merged)[None, :])  # 0 for a group that is all -inf
        total *= tl.exp(largest - finite(merged)).to(tl.float64)
        total += tl.sum(sums.to(tl.float64) * share.to(tl.float64), 0)
        largest = merged
    tl.store(state_max + row, largest, mask=row < rows)
    tl.store(state_sum + row, total, mask=row < rows)

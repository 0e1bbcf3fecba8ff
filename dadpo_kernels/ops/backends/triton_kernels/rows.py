"""Row passes over one vocabulary tile in memory, one program per row, and the small kernels that go with them.

`products` is the tile's `hidden @ weight.T` in float32, `[rows, columns]`, starting at column `first` of the
vocabulary. A row's entries (its label and top-k ids) ascend, so those inside the tile form a range. They are few: a
loop over them masks or replaces their columns in registers. Programs share no output, and there are no atomics.

`do_not_specialize` keeps Triton from recompiling for tile offsets and counts that happen to be 1 or divisible by 16.
"""

import triton
import triton.language as tl

from .logits import finite, slope, transform


@triton.jit
def entry_range(ids, first, columns, entries, ENTRIES: tl.constexpr):
    """The range `[begin, end)` of the row's entries with ids in `[first, first + columns)`."""
    entry = tl.arange(0, ENTRIES)
    id = tl.load(ids + entry, mask=entry < entries, other=2147483647)
    return tl.sum((id < first).to(tl.int32)), tl.sum((id < first + columns).to(tl.int32))


@triton.jit
def row_logits(products, columns, bias, scale, softcap, inv_temperature, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The row's float32 logits `[BLOCK]`; -inf past its end."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    product = tl.load(products + column, mask=inside, other=0.0)
    if bias is not None:
        product += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, transform(product, scale, softcap, inv_temperature, SOFTCAP), float("-inf"))


@triton.jit
def store_selected(
    products, columns, first, bias,  # the row: [columns] float32; [columns] or None
    ids, entries, selected,  # the row: [entries] int32, ascending; [entries] float32 written
    scale, softcap, inv_temperature,  # floats
    SOFTCAP: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Stores the logits of the row's entries that lie in this tile."""
    entry = tl.arange(0, ENTRIES)
    local = tl.load(ids + entry, mask=entry < entries, other=-1) - first
    hit = (local >= 0) & (local < columns) & (entry < entries)
    product = tl.load(products + local, mask=hit, other=0.0)
    if bias is not None:
        product += tl.load(bias + local, mask=hit, other=0.0).to(tl.float32)
    tl.store(selected + entry, transform(product, scale, softcap, inv_temperature, SOFTCAP), mask=hit)


@triton.jit
def absorb(maximum, total, state_max, state_sum):
    """Merges `(maximum, total)` into a row's running softmax state, its sum in float64."""
    before = tl.load(state_max)
    merged = tl.maximum(before, maximum)
    kept = tl.load(state_sum) * tl.exp(before - finite(merged)).to(tl.float64)
    tl.store(state_max, merged)
    tl.store(state_sum, kept + total.to(tl.float64) * tl.exp(maximum - finite(merged)).to(tl.float64))


@triton.jit
def rebase(exps, first, base, largest, BLOCK: tl.constexpr):
    """Makes the row's exponentials in the `first` columns before the pointer relative to `largest`, not to `base`."""
    factor = tl.exp(base - largest)
    for start in range(0, first, BLOCK):
        back = start + 1 + tl.arange(0, BLOCK)
        e = tl.load(exps - back, mask=back <= first, other=0.0).to(tl.float32)
        tl.store(exps - back, (e * factor).to(exps.dtype.element_ty), mask=back <= first)


@triton.jit(do_not_specialize=["first", "entries"])
def forward(
    products, stride, columns, first,  # [rows, columns] float32; row stride in elements
    bias, scale, softcap, inv_temperature,  # [columns] or None; floats
    ids, in_topk, entries,  # [rows, entries] int32 (ascending along a row) and bool
    selected,  # [rows, entries] float32 written: the entries' logits
    state_max, state_sum,  # [rows] float32 and float64 updated: softmax state of the columns outside the top k
    exps, exps_stride,  # [rows, columns] written, operands' dtype, behind `first` others; row stride; or None
    bases, reach,  # [rows] float32 updated: the exponentials' reference; what the tail may rise above it
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,  # powers of two, at least columns and entries
):  # fmt: skip
    """Adds the tile's tail to the softmax state; stores the entries' logits and, optionally, the exponentials.

    A row's base is the largest logit of the first tile that has any. Where a later one rises above it by more than
    `reach`, which is rare, it becomes the base, and the row's exponentials so far follow.
    """
    row = tl.program_id(0).to(tl.int64)
    if exps is not None:
        before = tl.load(state_max + row)
        empty = before == float("-inf")
        base = tl.load(bases + row, mask=~empty, other=0.0)
        tl.debug_barrier()  # every warp has read what one of them will store
    # Load the logits, store those of the entries, and mask the top-k ids out of the tail.
    products += row * stride
    ids += row * entries
    z = row_logits(products, columns, bias, scale, softcap, inv_temperature, SOFTCAP, BLOCK)
    store_selected(
        products, columns, first, bias, ids, entries, selected + row * entries, scale, softcap, inv_temperature,
        SOFTCAP, ENTRIES,
    )  # fmt: skip
    column = tl.arange(0, BLOCK)
    begin, end = entry_range(ids, first, columns, entries, ENTRIES)
    for entry in range(begin, end):
        masked = tl.load(in_topk + row * entries + entry) != 0
        z = tl.where((column == tl.load(ids + entry) - first) & masked, float("-inf"), z)
    # The tail's state, from exponentials relative to the tile's maximum.
    largest = tl.max(z, 0)
    e = tl.exp(z - finite(largest))
    absorb(largest, tl.sum(e, 0), state_max + row, state_sum + row)
    # Relative to the row's base, they are retained.
    if exps is not None:
        exps += row * exps_stride
        if empty | (largest > base + reach):
            if not empty:
                rebase(exps, first, base, largest, BLOCK)
            base = finite(largest)
            tl.store(bases + row, base)
        e *= tl.exp(tl.minimum(finite(largest) - base, reach))  # the minimum where nothing is finite: 0 * inf is NaN
        if SOFTCAP:
            e *= slope(z, softcap, inv_temperature)
        tl.store(exps + column, e.to(exps.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["first", "entries"])
def logit_gradient(
    products, stride, columns, first,  # [rows, columns] float32; row stride in elements
    bias, scale, softcap, inv_temperature,  # [columns] or None; floats
    ids, entries,  # [rows, entries] int32, ascending along a row
    c, base, values,  # [rows], [rows], [rows, entries] float32
    dz, dz_stride,  # [rows, columns] written, operands' dtype; row stride in elements
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`dz = c exp(z - base)` times the softcap's slope; at the entries `values`, which agree for equal ids."""
    row = tl.program_id(0).to(tl.int64)
    ids += row * entries
    z = row_logits(products + row * stride, columns, bias, scale, softcap, inv_temperature, SOFTCAP, BLOCK)
    d = tl.exp(z - tl.load(base + row)) * tl.load(c + row)
    if SOFTCAP:
        d *= slope(z, softcap, inv_temperature)
    column = tl.arange(0, BLOCK)
    begin, end = entry_range(ids, first, columns, entries, ENTRIES)
    for entry in range(begin, end):
        value = tl.load(values + row * entries + entry)
        d = tl.where(column == tl.load(ids + entry) - first, value, d)
    tl.store(dz + row * dz_stride + column, d.to(dz.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["columns", "entries"])
def exchange(
    matrix, stride, columns,  # [rows, columns] edited in place; row stride in elements
    ids, values, entries,  # [rows, entries] int32, ascending along a row, and the matrix's dtype, edited in place
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Swaps the matrix at the ids below `columns` with the values: called twice, it undoes itself.

    Of equal ids only the first takes part, so no two lanes write the same column.
    """
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    id = tl.load(ids + row * entries + entry, mask=entry < entries, other=-1)
    previous = tl.load(ids + row * entries + entry - 1, mask=(entry > 0) & (entry < entries), other=-1)
    hit = (id >= 0) & (id < columns) & (id != previous)
    inside, outside = matrix + row * stride + id, values + row * entries + entry
    before = tl.load(inside, mask=hit, other=0.0)
    tl.store(inside, tl.load(outside, mask=hit, other=0.0), mask=hit)
    tl.store(outside, before, mask=hit)


@triton.jit(do_not_specialize=["rows"])
def column_sums(
    matrix, stride, rows, columns,  # [rows, columns] float32 or bfloat16; row stride in elements
    factors, out,  # [rows] float32 or None (all 1); [columns] float32 written
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out[j] = sum_n factors[n] matrix[n, j]` in float32, blocks of rows in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        if factors is not None:
            x *= tl.load(factors + row, mask=row < rows, other=0.0)[:, None]
        total += tl.sum(x, 0)
    tl.store(out + column, total, mask=column < columns)

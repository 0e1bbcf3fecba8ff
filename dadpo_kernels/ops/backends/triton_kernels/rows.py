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


@triton.jit(do_not_specialize=["first", "entries"])
def statistics(
    products, stride, columns, first,  # [rows, columns] float32; row stride in elements
    bias, scale, softcap, inv_temperature,  # [columns] or None; floats
    ids, in_topk, entries,  # [rows, entries] int32 (ascending along a row) and bool
    selected,  # [rows, entries] float32 written: the entries' logits
    part_max, part_sum,  # [rows] float32 written: softmax state of the columns outside the top k
    exps, exps_stride,  # [rows, columns] written, operands' dtype; row stride in elements; None: do not retain
    bases, bases_stride,  # [rows] float32 written: the exponentials' reference; stride in elements
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,  # powers of two, at least columns and entries
):  # fmt: skip
    """The softmax state of the tile's tail, the entries' logits and, optionally, the retained exponentials."""
    # Load the logits, store those of the entries, and mask the top-k ids out of the tail.
    row = tl.program_id(0).to(tl.int64)
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
    # The tail's state, and its exponentials relative to the tile's maximum.
    largest = tl.max(z, 0)
    e = tl.exp(z - finite(largest))
    tl.store(part_max + row, largest)
    tl.store(part_sum + row, tl.sum(e, 0))
    if exps is not None:
        if SOFTCAP:
            e *= slope(z, softcap, inv_temperature)
        tl.store(exps + row * exps_stride + column, e.to(exps.dtype.element_ty), mask=column < columns)
        tl.store(bases + row * bases_stride, largest)


@triton.jit(do_not_specialize=["rows", "groups"])
def absorb(
    part_max, part_sum,  # [groups, rows] float32 partial states of the tile
    rows, groups,
    state_max, state_sum,  # [rows] float32 and float64, updated
    bases, bases_stride,  # [rows] float32, updated where the guess failed; stride in elements
    stale,  # [rows] int8 written: 1 where the exponentials must be rewritten; None: no guesses to check
    reach,  # largest acceptable |guess - maximum|
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Merges a tile's partial softmax states into the running state, in a fixed order.

    With `stale`, the tile was stored as `exp(z - bases)` with guessed bases. A guess is kept if the tile's largest
    logit lies within `reach` of it. Otherwise that logit becomes the base and the row is marked. A row whose tail is
    all -inf gets base -inf and is not marked: its exponentials are 0 already.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)
    ok = (row < rows)[None, :] & (group < groups)[:, None]
    at = group.to(tl.int64)[:, None] * rows + row[None, :]
    maxima = tl.load(part_max + at, mask=ok, other=float("-inf"))
    sums = tl.load(part_sum + at, mask=ok, other=0.0)
    # Online softmax merge. The sum is accumulated in float64 across tiles.
    largest = tl.max(maxima, 0)
    before = tl.load(state_max + row, mask=row < rows, other=float("-inf"))
    merged = tl.maximum(before, largest)
    weight = tl.exp(maxima - finite(merged)[None, :])  # 0 for a group that is all -inf
    total = tl.load(state_sum + row, mask=row < rows, other=0.0) * tl.exp(before - finite(merged)).to(tl.float64)
    total += tl.sum(sums.to(tl.float64) * weight.to(tl.float64), 0)
    tl.store(state_max + row, merged, mask=row < rows)
    tl.store(state_sum + row, total, mask=row < rows)
    if stale is not None:
        base = tl.load(bases + row.to(tl.int64) * bases_stride, mask=row < rows, other=0.0)
        serves = tl.abs(largest - base) <= reach
        empty = largest == float("-inf")
        tl.store(stale + row, (~(serves | empty)).to(tl.int8), mask=row < rows)
        tl.store(bases + row.to(tl.int64) * bases_stride, tl.where(serves, base, largest), mask=row < rows)


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


@triton.jit
def distinct_hits(ids, first, columns, entries, ENTRIES: tl.constexpr):
    """`(entry, column, hit)` `[ENTRIES]`: the row's entries in this tile.

    Only the first of equal ids is a hit, so no two lanes write the same column.
    """
    entry = tl.arange(0, ENTRIES)
    id = tl.load(ids + entry, mask=entry < entries, other=-1)
    previous = tl.load(ids + entry - 1, mask=(entry > 0) & (entry < entries), other=-1)
    return entry, id - first, (id >= first) & (id < first + columns) & (id != previous)


@triton.jit(do_not_specialize=["first", "entries"])
def enter_values(
    exps, exps_stride, columns, first,  # [rows, columns] operands' dtype, edited in place; row stride in elements
    ids, entries,  # [rows, entries] int32, ascending along a row
    c, base, values,  # [rows], [rows], [rows, entries] float32
    bases, bases_stride,  # [rows] float32 that the exponentials are relative to; stride in elements
    factors, saved,  # [rows] float32 and [rows, entries] of the exponentials' dtype, written
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Makes `factors[n] * exps[n]` the gradient of the logits: writes `values / factor` at the entries.

    The overwritten exponentials go to `saved`. The factor is `c exp(bases - base)`. Where it is tiny relative to the
    values, it is raised to 2^-100 of the largest, so that the quotients stay finite. This overstates the gradient at
    the other columns, but their exponentials are below 2^44 (see REACH in `triton_.py`), so it stays below 2^-56 of
    that value.
    """
    row = tl.program_id(0).to(tl.int64)
    entry, column, hit = distinct_hits(ids + row * entries, first, columns, entries, ENTRIES)
    value = tl.load(values + row * entries + entry, mask=hit, other=0.0)
    factor = tl.load(c + row) * tl.exp(tl.load(bases + row * bases_stride) - tl.load(base + row))
    least = tl.max(tl.abs(value), 0) * 7.888609052210118e-31  # 2^-100
    factor = tl.where(tl.abs(factor) < least, tl.where(factor < 0, -least, least), factor)
    tl.store(factors + row, factor)
    at = exps + row * exps_stride + column
    tl.store(saved + row * entries + entry, tl.load(at, mask=hit, other=0.0), mask=hit)
    quotient = tl.where(value == 0, 0.0, value / factor)
    tl.store(at, quotient.to(exps.dtype.element_ty), mask=hit)


@triton.jit(do_not_specialize=["first", "entries"])
def restore(exps, exps_stride, columns, first, ids, entries, saved, ENTRIES: tl.constexpr):
    """Undoes `enter_values` (same arguments), so that a second backward reads the forward's exponentials."""
    row = tl.program_id(0).to(tl.int64)
    entry, column, hit = distinct_hits(ids + row * entries, first, columns, entries, ENTRIES)
    value = tl.load(saved + row * entries + entry, mask=hit, other=0.0)
    tl.store(exps + row * exps_stride + column, value, mask=hit)


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

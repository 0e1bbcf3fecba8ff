"""Passes over one tile of the vocabulary in memory, one program per row, and the small kernels around them.

`products` is the tile's `hidden @ weight.T` in float32, `[rows, columns]` from column `first` of the vocabulary. A
row's entries (its label and top-k ids) ascend, so those inside the tile are a range; there are few, and a loop over
them masks or replaces their columns in registers. No program writes what another one reads, and nothing is atomic.
"""

import triton
import triton.language as tl

from .logits import finite, slope, transform


@triton.jit
def entry_range(ids, first, columns, entries, ENTRIES: tl.constexpr):
    """`[begin, end)` of the row's entries in columns `[first, first + columns)`."""
    entry = tl.arange(0, ENTRIES)
    id = tl.load(ids + entry, mask=entry < entries, other=2147483647)
    return tl.sum((id < first).to(tl.int32)), tl.sum((id < first + columns).to(tl.int32))


@triton.jit
def row_logits(products, columns, bias, scale, softcap, inv_temperature, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of a row; -inf behind its end."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    product = tl.load(products + column, mask=inside, other=0.0)
    if bias is not None:
        product += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, transform(product, scale, softcap, inv_temperature, SOFTCAP), float("-inf"))


@triton.jit
def store_selected(
    products, columns, first, bias, ids, entries, selected, scale, softcap, inv_temperature,
    SOFTCAP: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Logits of the row's entries in this tile."""
    entry = tl.arange(0, ENTRIES)
    local = tl.load(ids + entry, mask=entry < entries, other=-1) - first
    hit = (local >= 0) & (local < columns) & (entry < entries)
    product = tl.load(products + local, mask=hit, other=0.0)
    if bias is not None:
        product += tl.load(bias + local, mask=hit, other=0.0).to(tl.float32)
    tl.store(selected + entry, transform(product, scale, softcap, inv_temperature, SOFTCAP), mask=hit)


@triton.jit(do_not_specialize=["first", "entries"])
def statistics(
    products, stride, columns, first, bias, scale, softcap, inv_temperature, ids, in_topk, entries, selected,
    part_max, part_sum, exps, exps_stride, bases, bases_stride,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The softmax state of the tile's columns outside the top k, the entries' logits, and `exps` unless it is None."""
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
    part_max, part_sum, rows, groups, state_max, state_sum, bases, bases_stride, stale, reach,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Merges the partial states `[groups, rows]` of a tile, in a fixed order, into the running one.

    With `stale`, the tile was stored as `exp(z - bases)` for bases guessed beforehand. A guess serves if the tile's
    largest logit lies within `reach` of it; otherwise it is replaced by that logit and the row marked. A
    tile without a finite logit gets base -inf: it is all zeros.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)
    ok = (row < rows)[None, :] & (group < groups)[:, None]
    at = group.to(tl.int64)[:, None] * rows + row[None, :]
    maxima = tl.load(part_max + at, mask=ok, other=float("-inf"))
    sums = tl.load(part_sum + at, mask=ok, other=0.0)
    largest = tl.max(maxima, 0)
    before = tl.load(state_max + row, mask=row < rows, other=float("-inf"))
    merged = tl.maximum(before, largest)
    weight = tl.exp(maxima - finite(merged)[None, :])  # 0 for a group of -inf alone
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
    products, stride, columns, first, bias, scale, softcap, inv_temperature, ids, entries, c, base, values,
    dz, dz_stride,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`dz = c exp(z - base)`, its values at the entries, in the operands' dtype."""
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
    """`(entry, column, hit)`: the row's entries in this tile; of equal ids the first: no two lanes share one."""
    entry = tl.arange(0, ENTRIES)
    id = tl.load(ids + entry, mask=entry < entries, other=-1)
    previous = tl.load(ids + entry - 1, mask=(entry > 0) & (entry < entries), other=-1)
    return entry, id - first, (id >= first) & (id < first + columns) & (id != previous)


@triton.jit(do_not_specialize=["first", "entries"])
def enter_values(
    exps, exps_stride, columns, first, ids, entries, c, base, values, bases, bases_stride, factors, saved,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Makes `factors[n] * exps[n]` the gradient of the logits: puts `values / factor` at the entries.

    What stood there goes to `saved`. The factor is `c exp(kept base - base)`; where that is tiny beside the values it
    is raised to 2^-100 of the largest, so that the quotient is finite. The exponentials it then overstates are below
    2^44 (see REACH in `triton_.py`), hence their gradients still below 2^-56 of that value.
    """
    row = tl.program_id(0).to(tl.int64)
    entry, column, hit = distinct_hits(ids + row * entries, first, columns, entries, ENTRIES)
    value = tl.load(values + row * entries + entry, mask=hit, other=0.0)
    factor = tl.load(c + row) * tl.exp(tl.load(bases + row * bases_stride) - tl.load(base + row))
    least = tl.max(tl.abs(value), 0) * 7.888609052210118e-31
    factor = tl.where(tl.abs(factor) < least, tl.where(factor < 0, -least, least), factor)
    tl.store(factors + row, factor)
    at = exps + row * exps_stride + column
    tl.store(saved + row * entries + entry, tl.load(at, mask=hit, other=0.0), mask=hit)
    quotient = tl.where(value == 0, 0.0, value / factor)
    tl.store(at, quotient.to(exps.dtype.element_ty), mask=hit)


@triton.jit(do_not_specialize=["first", "entries"])
def restore(exps, exps_stride, columns, first, ids, entries, saved, ENTRIES: tl.constexpr):
    """Undoes `enter_values`: a second backward finds what the forward left."""
    row = tl.program_id(0).to(tl.int64)
    entry, column, hit = distinct_hits(ids + row * entries, first, columns, entries, ENTRIES)
    value = tl.load(saved + row * entries + entry, mask=hit, other=0.0)
    tl.store(exps + row * exps_stride + column, value, mask=hit)


@triton.jit(do_not_specialize=["rows"])
def column_sums(matrix, stride, rows, columns, factors, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`out[j] = sum_n factors[n] matrix[n, j]` in float32, rows in order; `factors` None: all one."""
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

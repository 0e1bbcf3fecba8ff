"""The best k logits of a row, tile by tile: a radix select in registers, exact, whatever k.

Floats are compared as integers in their own order. The k-th largest of {kept so far} and {tile} is found bit by bit:
32 counts, no sort, no candidate list. Among equals the lowest ids win: what is kept stands in ascending order of ids,
and tiles ascend, so ranks among equals are running counts.
"""

import triton
import triton.language as tl

from .logits import finite
from .rows import row_logits, store_selected

LEAST = tl.constexpr(-2147483648)  # below the key of -inf


@triton.jit
def order_key(z):
    """An int32 that orders as the float does; NaN is the largest and -0 equals 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["first", "entries", "have", "keep"])
def select(
    products, stride, columns, first, bias, scale, softcap, inv_temperature, ids, entries, selected,
    best_values, best_ids, capacity, have, keep, part_max, part_sum,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Of the `have` kept logits and the tile's, keeps the best `keep`; `part_*` get the softmax state of all others.

    One row per program: what is kept was read in full before the counts, hence before the first store.
    """
    row = tl.program_id(0).to(tl.int64)
    products += row * stride
    best_values += row * capacity
    best_ids += row * capacity
    store_selected(
        products, columns, first, bias, ids + row * entries, entries, selected + row * entries, scale, softcap,
        inv_temperature, SOFTCAP, ENTRIES,
    )  # fmt: skip
    z = row_logits(products, columns, bias, scale, softcap, inv_temperature, SOFTCAP, BLOCK)
    column = tl.arange(0, BLOCK)
    slot = tl.arange(0, BEST)
    old = tl.load(best_values + slot, mask=slot < have, other=float("-inf"))
    old_id = tl.load(best_ids + slot, mask=slot < have, other=0)
    key = tl.where(column < columns, order_key(z), LEAST)
    old_key = tl.where(slot < have, order_key(old), LEAST)

    one = tl.full((), 1, tl.int32)
    threshold = tl.full((), LEAST, tl.int32)
    for i in range(32):
        # The top bit of a signed number is set where the number is small, so that raising it clears it.
        raised = threshold ^ (one << (31 - i))
        count = tl.sum((key >= raised).to(tl.int32), 0) + tl.sum((old_key >= raised).to(tl.int32), 0)
        threshold = tl.where(count >= keep, raised, threshold)

    above, old_above = (key > threshold).to(tl.int32), (old_key > threshold).to(tl.int32)
    equal, old_equal = (key == threshold).to(tl.int32), (old_key == threshold).to(tl.int32)
    room = keep - tl.sum(above, 0) - tl.sum(old_above, 0)
    old_equals = tl.sum(old_equal, 0)
    old_kept = old_above | (old_equal & (tl.cumsum(old_equal, 0) <= room).to(tl.int32))
    kept = above | (equal & (old_equals + tl.cumsum(equal, 0) <= room).to(tl.int32))
    old_place = tl.cumsum(old_kept, 0) - 1
    place = tl.sum(old_kept, 0) + tl.cumsum(kept, 0) - 1

    z_out = tl.where(kept != 0, float("-inf"), z)
    old_out = tl.where(old_kept != 0, float("-inf"), old)
    largest = tl.maximum(tl.max(z_out, 0), tl.max(old_out, 0))
    total = tl.sum(tl.exp(z_out - finite(largest)), 0) + tl.sum(tl.exp(old_out - finite(largest)), 0)
    tl.store(part_max + row, largest)
    tl.store(part_sum + row, total)
    tl.store(best_values + old_place, old, mask=old_kept != 0)
    tl.store(best_ids + old_place, old_id, mask=old_kept != 0)
    tl.store(best_values + place, z, mask=kept != 0)
    tl.store(best_ids + place, first + column, mask=kept != 0)

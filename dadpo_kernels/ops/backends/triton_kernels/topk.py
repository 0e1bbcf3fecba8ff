"""The k largest logits of a row, tile by tile: an exact radix select in registers.

Floats are mapped to integers of the same order. The k-th largest of the kept logits and the tile together is
determined bit by bit, with 32 counts, without sorting and without a candidate list. Ties go to the lowest ids: kept
logits are stored in ascending order of ids and tiles come in ascending order, so ranks among equals are prefix sums.
"""

import triton
import triton.language as tl

from .logits import finite
from .rows import absorb, row_logits, store_selected

LEAST = tl.constexpr(-2147483648)  # below the key of -inf


@triton.jit
def order_key(z):
    """An int32 key in the same order as the float; NaN is the largest and -0 equals 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["first", "entries", "have", "keep"])
def select(
    products, stride, columns, first,  # [rows, columns] float32; row stride in elements
    bias, scale, softcap, inv_temperature,  # [columns] or None; floats
    ids, entries, selected,  # [rows, entries] int32, ascending along a row; [rows, entries] float32 written
    best_values, best_ids, capacity,  # [rows, capacity] float32 and int32, updated in place, ids ascending
    have, keep,  # number of kept logits before and after this tile
    state_max, state_sum,  # [rows] float32 and float64, updated
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, BEST: tl.constexpr,  # powers of two
):  # fmt: skip
    """Keeps the `keep` largest of the `have` kept logits and the tile; the rest joins the softmax state.

    The update in place is safe: a program owns its row and reads all kept logits before its first store.
    """
    # Load the tile's logits and the kept ones; lanes past the end get the least key.
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

    # Radix select: the threshold becomes the largest key that at least `keep` keys reach, from the top bit down.
    one = tl.full((), 1, tl.int32)
    threshold = tl.full((), LEAST, tl.int32)
    for i in range(32):
        # XOR, because the first step must clear the sign bit to raise the threshold; all later bits are still 0.
        raised = threshold ^ (one << (31 - i))
        count = tl.sum((key >= raised).to(tl.int32), 0) + tl.sum((old_key >= raised).to(tl.int32), 0)
        threshold = tl.where(count >= keep, raised, threshold)

    # Keep all above the threshold and the first `room` of its equals; prefix sums give each its slot.
    above, old_above = (key > threshold).to(tl.int32), (old_key > threshold).to(tl.int32)
    equal, old_equal = (key == threshold).to(tl.int32), (old_key == threshold).to(tl.int32)
    room = keep - tl.sum(above, 0) - tl.sum(old_above, 0)
    old_equals = tl.sum(old_equal, 0)
    old_kept = old_above | (old_equal & (tl.cumsum(old_equal, 0) <= room).to(tl.int32))
    kept = above | (equal & (old_equals + tl.cumsum(equal, 0) <= room).to(tl.int32))
    old_place = tl.cumsum(old_kept, 0) - 1
    place = tl.sum(old_kept, 0) + tl.cumsum(kept, 0) - 1

    # The softmax state of all that is not kept.
    z_out = tl.where(kept != 0, float("-inf"), z)
    old_out = tl.where(old_kept != 0, float("-inf"), old)
    largest = tl.maximum(tl.max(z_out, 0), tl.max(old_out, 0))
    total = tl.sum(tl.exp(z_out - finite(largest)), 0) + tl.sum(tl.exp(old_out - finite(largest)), 0)
    absorb(largest, total, state_max + row, state_sum + row)
    # The kept logits, previously kept ones first: ids stay ascending.
    tl.store(best_values + old_place, old, mask=old_kept != 0)
    tl.store(best_ids + old_place, old_id, mask=old_kept != 0)
    tl.store(best_values + place, z, mask=kept != 0)
    tl.store(best_ids + place, first + column, mask=kept != 0)

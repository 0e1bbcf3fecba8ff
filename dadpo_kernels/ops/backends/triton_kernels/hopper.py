"""Persistent forms of `fused.forward` and `fused.logit_gradient` for Hopper, in Gluon, for bfloat16 operands.

A program computes one tile after another, as many programs as the chip has multiprocessors. TMA brings slices of the
operands, BLOCK_K deep, into a ring of STAGES buffers in shared memory, `STAGES - 1` slices ahead of the product: while
a tile's logits are being consumed, the first slices of the next tile arrive. What is stored in bfloat16 leaves through
shared memory, by TMA as well, and beside the next tile's product.

In `fused`, a program loads nothing while it consumes its tile, and the compiler chooses the
layouts and buffers. Here these are written down, and so is each hand-over of a buffer. Triton's interpreter does not
run Gluon; the tests execute this source with a stand-in for Gluon that checks every hand-over.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import logits

if hasattr(tma, "async_load"):  # Triton 3.9's names; 3.6 has the same operations under others
    load_block, store_block, barrier = tma.async_load, tma.async_store, gl.barrier
else:
    load_block, store_block = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    barrier = gl.thread_barrier

# A Gluon kernel compiles what it calls as its callee's language, and Triton's constants have no layout.
tanh, slope, finite = (gluon.jit(f.fn) for f in (logits.tanh, logits.slope, logits.finite))


@gluon.jit
def transform(products, scale, softcap, inv_temperature, SOFTCAP: gl.constexpr):
    """As `logits.transform`, which would call Triton's tanh."""
    if SOFTCAP:
        return tanh(products * (scale / softcap)) * (softcap * inv_temperature)
    else:
        return products * (scale * inv_temperature)


@gluon.jit
def place(tile, row_blocks, column_blocks, GROUP: gl.constexpr):
    """`(row block, column block)` of a tile, in the order of `product.place`."""
    first = tile // (GROUP * column_blocks) * GROUP
    height = gl.minimum(row_blocks - first, GROUP)
    within = tile % (GROUP * column_blocks)
    return first + within % height, within // height


@gluon.jit
def place_or_last(tile, row_blocks, column_blocks, GROUP: gl.constexpr):
    """`place` where the tile may lie past the last one: no division by a height of 0. Nothing is loaded there."""
    return place(gl.minimum(tile, row_blocks * column_blocks - 1), row_blocks, column_blocks, GROUP)


@gluon.jit
def slices(width, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """Slices of each tile. At least as many as are loaded ahead, which then end in the next tile; TMA makes of slices
    past the width zeros.
    """
    return gl.maximum(gl.cdiv(width, BLOCK_K), STAGES - 1)


@gluon.jit
def stage(count, STAGES: gl.constexpr):
    """The buffer of a program's slice number `count`, counted over all its tiles."""
    return count % STAGES


@gluon.jit
def phase(count, STAGES: gl.constexpr):
    """The parity of the phase that slice `count` completes on the barrier of its buffer."""
    return (count // STAGES) & 1


@gluon.jit
def ahead(k, steps, STAGES: gl.constexpr):
    """`(whether it is this tile's or the next one's, its number there)`: the slice to load in step k of a tile."""
    number = k + STAGES - 1
    own = number < steps
    return own, gl.where(own, number, number - steps)


@gluon.jit
def load_slice(
    hidden_desc, weight_desc, row_block, column_block, k, a, b, full, count, wanted,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts to load slice k of a tile as the program's slice number `count`, if it is wanted."""
    s = stage(count, STAGES)
    mbarrier.expect(full.index(s), (BLOCK_M + BLOCK_N) * BLOCK_K * 2, pred=wanted)
    load_block(hidden_desc, [row_block * BLOCK_M, k * BLOCK_K], full.index(s), a.index(s), wanted)
    load_block(weight_desc, [column_block * BLOCK_N, k * BLOCK_K], full.index(s), b.index(s), wanted)


@gluon.jit
def begin(
    hidden_desc, weight_desc, row_block, column_block, wanted,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The ring `(a [STAGES, BLOCK_M, BLOCK_K], b [STAGES, BLOCK_N, BLOCK_K], their barriers)`, with the first tile's
    first slices on their way.
    """
    gl.static_assert(STAGES > 1)
    a = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], hidden_desc.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()  # TMA signals these barriers
    barrier()
    for i in gl.static_range(STAGES - 1):
        load_slice(
            hidden_desc, weight_desc, row_block, column_block, i, a, b, full, i, wanted,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    return a, b, full


@gluon.jit
def multiply(
    hidden_desc, weight_desc, row_block, column_block, next_row_block, next_column_block, more,  # is there a next
    a, b, full, count, steps,  # the ring, the number of this tile's first slice, slices of a tile
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The float32 products `[BLOCK_M, BLOCK_N]` of a tile, with the next one's first slices on their way.

    One step's wgmma is always in flight, and the step before it is known to have finished: its buffer is refilled.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
    gl.assume(steps > 0)  # as in `product.py`: else a branch around the loop, and a wait after every wgmma
    for k in range(0, steps):
        s = stage(count, STAGES)
        mbarrier.wait(full.index(s), phase(count, STAGES))
        acc = warpgroup_mma(a.index(s), b.index(s).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        # A warp group has waited for its own wgmma only, and one thread loads for all.
        barrier()
        own, number = ahead(k, steps, STAGES)
        load_slice(
            hidden_desc, weight_desc, gl.where(own, row_block, next_row_block),
            gl.where(own, column_block, next_column_block), number, a, b, full, count + STAGES - 1, own | more,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        count += 1
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


# A tile is consumed as [BLOCK_M, BLOCK_N / 8, 8]: a thread holds all groups of eight columns, and two lanes of each.
# So a column's number is a constant in the code and one of two numbers in registers. Of [BLOCK_N] numbers the compiler
# keeps 64 in registers over the product, and spills.


@gluon.jit
def per_row(x):
    """`[BLOCK_M]` to `[BLOCK_M, 1, 1]`"""
    return gl.expand_dims(gl.expand_dims(x, 1), 1)


@gluon.jit
def row_sum(x):
    """`[BLOCK_M, BLOCK_N / 8, 8]` to `[BLOCK_M]`"""
    return gl.sum(gl.sum(x, 1), 1)


@gluon.jit
def row_max(x):
    """`[BLOCK_M, BLOCK_N / 8, 8]` to `[BLOCK_M]`"""
    return gl.max(gl.max(x, 1), 1)


@gluon.jit
def at_column(column, group, lane):
    """Where a tile has each row's column: `[BLOCK_M]` int32, counted from the tile's first, to `[BLOCK_M, .., 8]`.

    A column outside the tile is nowhere in it.
    """
    return group == gl.where((per_row(column) & 7) == lane, per_row(column) >> 3, -1)


@gluon.jit
def logit_tile(
    products, row_block, column_block, bias, columns, scale, softcap, inv_temperature,
    SOFTCAP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """`(row [BLOCK_M], group [1, BLOCK_N / 8, 1], lane [1, 1, 8], float32 logits [BLOCK_M, BLOCK_N / 8, 8])`.

    The tile's column is `8 group + lane`. Logits past the last column are -inf.
    """
    z = gl.reshape(products, (BLOCK_M, BLOCK_N // 8, 8))
    layout: gl.constexpr = z.type.layout
    row = row_block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, gl.SliceLayout(1, layout)))
    group = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    group = gl.expand_dims(gl.expand_dims(group, 0), 2)
    lane = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    lane = gl.expand_dims(gl.expand_dims(lane, 0), 1)
    first = column_block * BLOCK_N
    inside = group < (columns - first - lane + 7) >> 3
    if bias is not None:
        z += gl.load(bias + first + lane + 8 * group, mask=inside, other=0.0).to(gl.float32)
    z = transform(z, scale, softcap, inv_temperature, SOFTCAP)
    return row, group, lane, gl.where(inside, z, float("-inf"))


@gluon.jit
def store_tile(
    tile, desc, row_block, column_block, out, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """Starts to store `[BLOCK_M, BLOCK_N / 8, 8]` in bfloat16, through `out`, where `desc` has the tile.

    What a thread stores to shared memory becomes visible to TMA by its fence. All threads have passed theirs when some
    start the copies: this barrier says so, and so would Triton's `Membar.cpp`, which puts one between a store to a
    buffer and a copy from it. The same file puts one after `store_wait` ("If the current op is an async wait and the
    next op is not a barrier we insert a barrier op and sync"): only the threads that started copies wait for them.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    tile = gl.convert_layout(gl.reshape(tile.to(gl.bfloat16), (BLOCK_M, BLOCK_N)), layout, assert_trivial=True)
    tma.store_wait(0)  # the last tile has been read from `out`
    barrier()
    out.store(tile)
    fence_async_shared()
    barrier()
    store_block(desc, [row_block * BLOCK_M, column_block * BLOCK_N], out)


@gluon.jit(do_not_specialize=["rows", "columns", "width", "first", "entries"])
def forward(
    hidden_desc, weight_desc,  # descriptors of [rows, width] and [columns, width] bfloat16
    exps_desc,  # descriptor of [rows, columns] bfloat16, written; None: do not retain
    rows, bias, columns, width, first,  # bias: [columns] or None; columns [first, first + columns) of the vocabulary
    scale, softcap, inv_temperature,  # floats
    starts,  # [column blocks + 1, rows] int32: where each row's entries of each column block begin
    ids, entries,  # [rows, entries] int32, ascending along a row
    drop,  # [rows, entries] bool
    selected,  # [rows, entries] float32 written: the entries' logits
    part_max, part_sum,  # [column blocks, rows] float32 written: softmax states of the columns outside the top k
    bases,  # [rows] float32: the exponentials' reference; None: do not retain
    SOFTCAP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Partial softmax states of the tail, the entries' logits and, optionally, exponentials `exp(z - base)`.

    See `fused.forward`, whose contract for entries this is. Without softcap the exponentials are those of the
    softmax state, rescaled: `exp(z - maximum)` has float32's precision where it is not below 2^-126, and the factor
    adds one rounding. With softcap they are computed from z, which has to stay for the slope: both do not fit the
    registers.
    """
    row_blocks, column_blocks = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N)
    tiles = row_blocks * column_blocks
    steps = slices(width, BLOCK_K, STAGES)
    program, programs = gl.program_id(0), gl.num_programs(0)
    if exps_desc is not None:
        out = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N], exps_desc.layout)
    row_block, column_block = place_or_last(program, row_blocks, column_blocks, GROUP)
    a, b, full = begin(
        hidden_desc, weight_desc, row_block, column_block, program < tiles, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    count = 0
    for tile in range(program, tiles, programs):
        next_row_block, next_column_block = place_or_last(tile + programs, row_blocks, column_blocks, GROUP)
        products = multiply(
            hidden_desc, weight_desc, row_block, column_block, next_row_block, next_column_block,
            tile + programs < tiles, a, b, full, count, steps, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        count += steps
        row, group, lane, z = logit_tile(
            products, row_block, column_block, bias, columns, scale, softcap, inv_temperature,
            SOFTCAP, BLOCK_M, BLOCK_N,
        )  # fmt: skip

        # Store the entries' logits and mask the top-k ids out of the tail: in each step the next entry of all rows.
        inside = row < rows
        wide_row = row.to(gl.int64)
        at = column_block.to(gl.int64) * rows + row
        begins = gl.load(starts + at, mask=inside, other=0)
        ends = gl.load(starts + at + rows, mask=inside, other=0)
        block_first = first + column_block * BLOCK_N
        for step in range(0, gl.max(ends - begins, 0)):
            entry = wide_row * entries + begins + step
            live = begins + step < ends
            hit = at_column(gl.load(ids + entry, mask=live, other=-1) - block_first, group, lane)
            gl.store(selected + entry, row_sum(gl.where(hit, z, 0.0)), mask=live)
            dropped = gl.load(drop + entry, mask=live, other=0) != 0
            z = gl.where(hit & per_row(dropped), float("-inf"), z)

        # The softmax state of this column block, relative to its own maximum.
        largest = row_max(z)
        e = gl.exp(z - per_row(finite(largest)))
        gl.store(part_max + at, largest, mask=inside)
        gl.store(part_sum + at, row_sum(e), mask=inside)

        # Clamped: a base too low would overflow to inf, and 0 * inf is NaN. `fused.repair` rewrites such rows.
        if exps_desc is not None:
            base = gl.load(bases + row, mask=inside, other=0.0)
            if SOFTCAP:
                e = gl.exp(gl.minimum(z - per_row(base), 80.0)) * slope(z, softcap, inv_temperature)
            else:
                e = e * per_row(gl.exp(gl.minimum(finite(largest) - base, 80.0)))
            store_tile(e, exps_desc, row_block, column_block, out, BLOCK_M, BLOCK_N)
        row_block, column_block = next_row_block, next_column_block
    if exps_desc is not None:
        tma.store_wait(0)  # shared memory must outlive its last reader


@gluon.jit(do_not_specialize=["rows", "columns", "width", "first", "entries"])
def logit_gradient(
    hidden_desc, weight_desc,  # descriptors of [rows, width] and [columns, width] bfloat16
    dz_desc,  # descriptor of [rows, columns] bfloat16, written
    rows, bias, columns, width, first,  # bias: [columns] or None; columns [first, first + columns) of the vocabulary
    scale, softcap, inv_temperature,  # floats
    starts,  # [column blocks + 1, rows] int32: where each row's entries of each column block begin
    ids, entries,  # [rows, entries] int32, ascending along a row
    c, base, values,  # [rows], [rows], [rows, entries] float32
    SOFTCAP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """`dz = c exp(z - base)` times the softcap's slope; at the entries `values`, which agree for equal ids."""
    row_blocks, column_blocks = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N)
    tiles = row_blocks * column_blocks
    steps = slices(width, BLOCK_K, STAGES)
    program, programs = gl.program_id(0), gl.num_programs(0)
    out = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N], dz_desc.layout)
    row_block, column_block = place_or_last(program, row_blocks, column_blocks, GROUP)
    a, b, full = begin(
        hidden_desc, weight_desc, row_block, column_block, program < tiles, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    count = 0
    for tile in range(program, tiles, programs):
        next_row_block, next_column_block = place_or_last(tile + programs, row_blocks, column_blocks, GROUP)
        products = multiply(
            hidden_desc, weight_desc, row_block, column_block, next_row_block, next_column_block,
            tile + programs < tiles, a, b, full, count, steps, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        count += steps
        row, group, lane, z = logit_tile(
            products, row_block, column_block, bias, columns, scale, softcap, inv_temperature,
            SOFTCAP, BLOCK_M, BLOCK_N,
        )  # fmt: skip

        # The gradient outside the entries.
        inside = row < rows
        d = gl.exp(z - per_row(gl.load(base + row, mask=inside, other=0.0)))
        d *= per_row(gl.load(c + row, mask=inside, other=0.0))
        if SOFTCAP:
            d *= slope(z, softcap, inv_temperature)

        # Overwrite the entries: in each step the next one of all rows.
        wide_row = row.to(gl.int64)
        at = column_block.to(gl.int64) * rows + row
        begins = gl.load(starts + at, mask=inside, other=0)
        ends = gl.load(starts + at + rows, mask=inside, other=0)
        block_first = first + column_block * BLOCK_N
        for step in range(0, gl.max(ends - begins, 0)):
            entry = wide_row * entries + begins + step
            live = begins + step < ends
            hit = at_column(gl.load(ids + entry, mask=live, other=-1) - block_first, group, lane)
            d = gl.where(hit, per_row(gl.load(values + entry, mask=live, other=0.0)), d)
        store_tile(d, dz_desc, row_block, column_block, out, BLOCK_M, BLOCK_N)
        row_block, column_block = next_row_block, next_column_block
    tma.store_wait(0)  # shared memory must outlive its last reader


def describe(matrix: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """For TMA: a bfloat16 matrix in blocks that lie in shared memory as wgmma reads them.

    The matrix and its rows start at multiples of 16 bytes, and a row's elements are adjacent.
    """
    return TensorDescriptor.from_tensor(
        matrix, list(block), gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    )


def launcher(
    kernel,
    hidden: Tensor,
    weight: Tensor,
    stored: Tensor | None,
    *arguments,
    BLOCK_M: int,
    BLOCK_N: int,
    BLOCK_K: int,
    programs: int | None = None,
    **options,
) -> Callable[[], None]:
    """All that a launch of one of the two kernels needs, made now; what is returned launches and does nothing else.

    Args:
        hidden: [rows, width], and weight [columns, width]; rows and columns are not 0.
        stored: [rows, columns] to be written, exponentials or gradient; None: the forward retains nothing.
        arguments: the kernel's, from `rows` on.
        programs: as many as the device has multiprocessors, unless it is said.
        options: STAGES, GROUP, SOFTCAP, and num_warps.
    """
    if programs is None:
        programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 1
    tiles = -(-len(hidden) // BLOCK_M) * -(-len(weight) // BLOCK_N)
    return partial(
        kernel[(min(programs, tiles),)],
        describe(hidden, (BLOCK_M, BLOCK_K)),
        describe(weight, (BLOCK_N, BLOCK_K)),
        None if stored is None else describe(stored, (BLOCK_M, BLOCK_N)),
        *arguments,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        **options,
    )

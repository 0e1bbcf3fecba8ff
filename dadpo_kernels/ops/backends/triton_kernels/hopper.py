import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import logits

# Triton 3.9 renamed the copies of 3.6.
if hasattr(tma, "async_load"):
    load_block, store_block = tma.async_load, tma.async_store
else:
    load_block, store_block = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

tanh, slope, finite = gluon.jit(logits.tanh.fn), gluon.jit(logits.slope.fn), gluon.jit(logits.finite.fn)


@gluon.jit
def place(tile, row_blocks, column_blocks, GROUP: gl.constexpr):
    first = tile // (GROUP * column_blocks) * GROUP
    height = gl.minimum(row_blocks - first, GROUP)
    within = tile % (GROUP * column_blocks)
    return first + within % height, within // height


@gluon.jit
def stage(count, STAGES: gl.constexpr):
    return count % STAGES


@gluon.jit
def phase(count, STAGES: gl.constexpr):
    return (count // STAGES) & 1


@gluon.jit
def ahead(k, steps, more, STAGES: gl.constexpr):
    slice = k + STAGES - 1
    own = slice < steps
    return own, gl.where(own, slice, slice - steps), own | more


@gluon.jit
def load_slice(
    hidden_desc, weight_desc, row_block, column_block, k, a, b, full, count, needed,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):
    s = stage(count, STAGES)
    mbarrier.expect(full.index(s), (BLOCK_M + BLOCK_N) * BLOCK_K * 2, pred=needed)
    load_block(hidden_desc, [row_block * BLOCK_M, k * BLOCK_K], full.index(s), a.index(s), needed)
    load_block(weight_desc, [column_block * BLOCK_N, k * BLOCK_K], full.index(s), b.index(s), needed)


@gluon.jit
def multiply(
    hidden_desc, weight_desc, row_block, column_block, next_row_block, next_column_block, more, a, b, full, count, steps,
    layout: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):
    gl.assume(steps > 0)
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
    for k in range(0, steps):
        s = stage(count, STAGES)
        mbarrier.wait(full.index(s), phase(count, STAGES))
        acc = warpgroup_mma(a.index(s), b.index(s).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        own, slice, needed = ahead(k, steps, more, STAGES)
        load_slice(
            hidden_desc, weight_desc, gl.where(own, row_block, next_row_block),
            gl.where(own, column_block, next_column_block), slice, a, b, full, count + STAGES - 1, needed,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )
        count += 1
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


@gluon.jit
def row_vector(x):
    return gl.expand_dims(gl.expand_dims(x, 1), 1)


@gluon.jit
def total(x):
    return gl.sum(gl.sum(x, 1), 1)


@gluon.jit
def one_hot(column, group, lane):
    """[M,G,8]"""
    return group == row_vector(column >> 3)


@gluon.jit(do_not_specialize=["rows", "columns", "width", "first", "entries"])
def hopper_forward(
    hidden_desc, weight_desc, exps_desc, rows, bias, columns, width, first, scale, softcap, inv_temperature,
    starts, ids, drop, entries, selected, part_max, part_sum, bases,
    SOFTCAP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    a = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], hidden_desc.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if exps_desc is not None:
        out = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N], exps_desc.layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    row_blocks, column_blocks = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N)
    tiles = row_blocks * column_blocks
    steps = gl.maximum(gl.cdiv(width, BLOCK_K), STAGES - 1)
    program, programs = gl.program_id(0), gl.num_programs(0)
    row_block, column_block = place(gl.minimum(program, tiles - 1), row_blocks, column_blocks, GROUP)
    for i in gl.static_range(STAGES - 1):
        load_slice(hidden_desc, weight_desc, row_block, column_block, i, a, b, full, i, program < tiles, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    count = 0
    for tile in range(program, tiles, programs):
        more = tile + programs < tiles
        next_row_block, next_column_block = place(gl.minimum(tile + programs, tiles - 1), row_blocks, column_blocks, GROUP)
        z = multiply(hidden_desc, weight_desc, row_block, column_block, next_row_block, next_column_block, more, a, b, full, count, steps, layout, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
        count += steps
        z = gl.reshape(z, (BLOCK_M, BLOCK_N // 8, 8))
        cube: gl.constexpr = z.type.layout
        row = row_block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, gl.SliceLayout(1, cube)))
        group = gl.expand_dims(gl.expand_dims(gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, cube))), 0), 2)
        lane = gl.expand_dims(gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, cube))), 0), 1)
        block_column = column_block * BLOCK_N
        inside = group < ((columns - block_column - lane + 7) >> 3)
        if bias is not None:
            z += gl.load(bias + block_column + lane + group * 8, mask=inside, other=0.0).to(gl.float32)
        if SOFTCAP:
            z = tanh(z * (scale / softcap)) * (softcap * inv_temperature)
        else:
            z = z * (scale * inv_temperature)
        z = gl.where(inside, z, float("-inf"))
        wide_row = row.to(gl.int64)
        at = column_block.to(gl.int64) * rows + row
        begin = gl.load(starts + at, mask=row < rows, other=0)
        end = gl.load(starts + at + rows, mask=row < rows, other=0)
        block_first = first + block_column
        for step in range(0, gl.max(end - begin, 0)):
            entry = wide_row * entries + begin + step
            live = begin + step < end
            id = gl.load(ids + entry, mask=live, other=-1) - block_first
            hit = group == gl.where((row_vector(id) & 7) == lane, row_vector(id) >> 3, -1)
            gl.store(selected + entry, total(gl.where(hit, z, 0.0)), mask=live)
            dropped = gl.load(drop + entry, mask=live, other=0) != 0
            z = gl.where(hit & row_vector(dropped), float("-inf"), z)
        largest = gl.max(gl.max(z, 1), 1)
        e = gl.exp(z - row_vector(finite(largest)))
        gl.store(part_max + at, largest, mask=row < rows)
        gl.store(part_sum + at, total(e), mask=row < rows)
        if exps_desc is not None:
            base = gl.load(bases + row, mask=row < rows, other=0.0)
            if SOFTCAP:
                e = gl.exp(gl.minimum(z - row_vector(base), 80.0)) * slope(z, softcap, inv_temperature)
            else:
                e = e * row_vector(gl.exp(gl.minimum(finite(largest) - base, 80.0)))
            tma.store_wait(0)
            out.store(gl.convert_layout(gl.reshape(e.to(gl.bfloat16), (BLOCK_M, BLOCK_N)), layout))
            fence_async_shared()
            store_block(exps_desc, [row_block * BLOCK_M, column_block * BLOCK_N], out)
        row_block, column_block = next_row_block, next_column_block
    if exps_desc is not None:
        tma.store_wait(0)

"""Executes Gluon kernels in NumPy, and checks what they hand over between threads, TMA and the tensor cores.

Triton's interpreter does not know Gluon. Here the kernels' own source runs with a stand-in for the part of Gluon's
language that they use, one program after another. Asynchronous work is done as late as it may be: a buffer that is
being loaded holds NaN until a wait for its barrier. What would be a race, if the work were done earlier, fails:

- a load into a buffer that a wgmma may still read, or that not all warps know to be free (no barrier since);
- an expectation on a barrier whose last phase nobody has waited for, a wait with the wrong phase or for nothing;
- a store to shared memory that a TMA store may still read; a TMA store without a fence and a barrier after the store;
- an access to memory out of bounds, and anything left in flight at a program's end.
"""

from types import FunctionType, ModuleType, SimpleNamespace

import numpy as np
import torch


class Block(np.ndarray):
    """A tensor of the language; scalars have no dimension."""

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def to(self, dtype):
        return block(rounded(self) if dtype == "bfloat16" else self.astype(dtype))

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return block(array)

    # The language has values: none changes under another name.

    def __iadd__(self, other):
        return self + other

    def __imul__(self, other):
        return self * other


def block(x) -> Block:
    return np.asarray(x).view(Block)


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16 and back."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().float().numpy()


class Pointer:
    """Elements of a flat array. `writes` counts the stores to each of them."""

    def __init__(self, array: np.ndarray, at=0) -> None:
        assert array.flags.c_contiguous
        self.array, self.at = array, at

    def __add__(self, offset) -> "Pointer":
        wide = self.array.ndim == 1 or isinstance(offset, int) or offset.dtype == np.int64
        assert wide, "an offset into a matrix in less than 64 bits"
        return Pointer(self.array, self.at + np.asarray(offset, np.int64))

    def elements(self, mask) -> tuple[np.ndarray, np.ndarray]:
        """`(indices, mask)`, whole arrays; no element that is not masked lies outside."""
        at, mask = np.broadcast_arrays(self.at, True if mask is None else mask)
        assert ((at >= 0) & (at < self.array.size))[mask].all(), "out of bounds"
        return at, mask


class Descriptor:
    """`matrix [rows, columns]` for TMA, in blocks. Reads past the end give 0, and writes are clipped."""

    layout = None

    def __init__(self, matrix: np.ndarray, shape: tuple[int, int]) -> None:
        self.matrix, self.block = matrix, shape
        self.stored: dict[tuple[int, int], int] = {}  # how often each block has been

    def read(self, row: int, column: int) -> np.ndarray:
        whole = np.zeros(self.block, np.float32)
        part = self.matrix[row : row + self.block[0], column : column + self.block[1]]
        whole[: part.shape[0], : part.shape[1]] = part
        return whole

    def write(self, row: int, column: int, value: np.ndarray) -> None:
        assert row < self.matrix.shape[0]
        assert column < self.matrix.shape[1]
        part = self.matrix[row : row + self.block[0], column : column + self.block[1]]
        part[...] = value[: part.shape[0], : part.shape[1]]
        self.stored[row, column] = self.stored.get((row, column), 0) + 1


class Buffer:
    """A block of shared memory.

    `state` is one of: free; loading, loaded (by TMA); reading, read (by wgmma or a TMA store; "read": who has waited
    knows); written, fenced, ready (for a TMA store). A barrier frees what has been read.
    """

    def __init__(self, shape) -> None:
        self.data, self.state = block(np.full(shape, np.nan, np.float32)), "free"

    def permute(self, order) -> "Transposed":
        assert order == (1, 0)
        return Transposed(self)

    def store(self, value: Block) -> None:
        assert self.state == "free", f"store to a buffer that is {self.state}"
        assert value.shape == self.data.shape
        self.data[...], self.state = value, "written"


class Transposed:
    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer


class MBarrier:
    """Phases that have been completed, and the loads of the one that has not.

    `state`: written, fenced; ready for the next phase; waited for, until a barrier says that all warps have.
    """

    def __init__(self) -> None:
        self.state, self.completed, self.expected, self.loads = "none", 0, 0, []


class Ring:
    def __init__(self, parts: list) -> None:
        self.parts = parts

    def index(self, i) -> Buffer | MBarrier:
        assert 0 <= i < len(self.parts)
        return self.parts[int(i)]


class Accumulator:
    """Of a wgmma that may be in flight: only another wgmma and a wait take it."""

    def __init__(self, value: Block, operands: list[Buffer]) -> None:
        self.value, self.operands = value, operands
        self.seen = [operand.data.copy() for operand in operands]


class Machine:
    """One program: its shared memory, and what is in flight. `consumed` lists the sources of wgmma's operands."""

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.buffers: list[Buffer] = []
        self.barriers: list[MBarrier] = []
        self.flying: list[Accumulator] = []
        self.stores: list[tuple[Descriptor, list, Buffer, np.ndarray]] = []
        self.consumed: list[tuple] = []
        self.waits = 0

    # Shared memory and threads.

    def allocate(self, dtype, shape, layout):
        if dtype == "int64":
            parts = [MBarrier() for _ in range(shape[0])]
            self.barriers += parts
            return Ring(parts)
        parts = [Buffer(shape[-2:]) for _ in range(shape[0] if len(shape) == 3 else 1)]
        self.buffers += parts
        return Ring(parts) if len(shape) == 3 else parts[0]

    def barrier(self) -> None:
        free = {"read": "free", "fenced": "ready", "waited for": "ready"}
        for part in self.buffers + self.barriers:
            part.state = free.get(part.state, part.state)

    def fence(self) -> None:
        for part in self.buffers + self.barriers:
            part.state = "fenced" if part.state == "written" else part.state

    # Barriers in shared memory.

    def init(self, bar: MBarrier, count: int) -> None:
        assert (bar.state, count) == ("none", 1)
        bar.state = "written"

    def expect(self, bar: MBarrier, size: int, pred=True) -> None:
        if pred:
            assert bar.state == "ready", f"the barrier is {bar.state}"
            assert not bar.expected, "the last phase has not been waited for"
            bar.expected = size

    def wait(self, bar: MBarrier, phase) -> None:
        assert bar.expected, "nothing was loaded: this waits for ever"
        assert phase == bar.completed % 2, "this waits for the phase before, or for ever"
        assert sum(2 * buffer.data.size for *_, buffer in bar.loads) == bar.expected
        for desc, at, buffer in bar.loads:
            buffer.data[...], buffer.state, buffer.source = desc.read(*at), "loaded", (desc, *at)
        bar.completed, bar.expected, bar.loads, bar.state = bar.completed + 1, 0, [], "waited for"
        self.waits += 1

    # TMA.

    def load(self, desc: Descriptor, at, bar: MBarrier, buffer: Buffer, pred=True) -> None:
        if pred:
            assert buffer.state == "free", f"load into a buffer that is {buffer.state}"
            assert bar.expected, "nothing is expected"
            buffer.data[...], buffer.state = np.nan, "loading"
            bar.loads.append((desc, [int(i) for i in at], buffer))

    def store(self, desc: Descriptor, at, buffer: Buffer) -> None:
        assert buffer.state == "ready", f"TMA store from a buffer that is {buffer.state}"
        buffer.state = "reading"
        self.stores.append((desc, [int(i) for i in at], buffer, buffer.data.copy()))

    def store_wait(self, pendings: int) -> None:
        while len(self.stores) > pendings:
            desc, at, buffer, seen = self.stores.pop(0)
            assert np.array_equal(buffer.data, seen, equal_nan=True)
            desc.write(*at, buffer.data)
            buffer.state = "read"

    # Tensor cores.

    def mma(self, a: Buffer, b: Transposed, acc, is_async: bool) -> Accumulator:
        operands = [a, b.buffer]
        assert all(buffer.state == "loaded" for buffer in operands)
        before = acc.value if isinstance(acc, Accumulator) else acc
        assert isinstance(acc, Accumulator) or not self.flying
        for buffer in operands:
            buffer.state = "reading"
        self.consumed.append((a.source, b.buffer.source))
        self.flying.append(Accumulator(block(before + a.data @ b.buffer.data.T), operands))
        return self.flying[-1]

    def mma_wait(self, num_outstanding: int, deps):
        (acc,) = deps
        while len(self.flying) > num_outstanding:
            done = self.flying.pop(0)
            for operand, seen in zip(done.operands, done.seen, strict=True):
                assert np.array_equal(operand.data, seen, equal_nan=True)
                operand.state = "read"
        return acc if self.flying else acc.value

    def finish(self) -> None:
        assert not self.flying and not self.stores, "in flight at the end"  # noqa: PT018
        assert not any(bar.expected for bar in self.barriers), "loaded and not consumed"
        assert all(buffer.state in ("free", "read") for buffer in self.buffers)

    # The language.

    def language(self) -> SimpleNamespace:
        return SimpleNamespace(
            constexpr=None, int32="int32", int64="int64", float32="float32", bfloat16="bfloat16",
            program_id=lambda axis: block(self.program), num_programs=lambda axis: block(self.programs),
            num_warps=lambda: 8, allocate_shared_memory=self.allocate, static_range=range, assume=true,
            static_assert=true, NVMMADistributedLayout=no_layout, SliceLayout=no_layout, load=load, store=store,
            arange=lambda start, end, layout: block(np.arange(start, end, dtype=np.int32)),
            zeros=lambda shape, dtype, layout: block(np.zeros(shape, dtype)),
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: block(np.minimum(a, b)), maximum=lambda a, b: block(np.maximum(a, b)),
            where=lambda condition, a, b: block(np.where(condition, a, b)).astype(kind(a, b), copy=False),
            sum=lambda x, axis: block(np.sum(x, axis)), max=lambda x, axis: block(np.max(x, axis)),
            exp=lambda x: block(np.exp(x)), abs=lambda x: block(np.abs(x)),
            expand_dims=lambda x, axis: block(np.expand_dims(x, axis)),
            reshape=lambda x, shape: block(np.reshape(x, shape)), convert_layout=lambda x, layout, assert_trivial: x,
        )  # fmt: skip

    def globals(self, module: ModuleType) -> dict:
        """The module's names for this machine: its kernels and device functions, and what they use."""
        language = self.language()
        names = dict(vars(module)) | {
            "gl": language, "tl": language, "barrier": self.barrier, "fence_async_shared": self.fence,
            "mbarrier": SimpleNamespace(MBarrierLayout=no_layout, init=self.init, expect=self.expect, wait=self.wait),
            "tma": SimpleNamespace(store_wait=self.store_wait), "load_block": self.load, "store_block": self.store,
            "warpgroup_mma": self.mma, "warpgroup_mma_wait": self.mma_wait,
        }  # fmt: skip
        for name, value in vars(module).items():
            if isinstance(getattr(value, "fn", None), FunctionType):
                names[name] = FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        return names


def launch(
    module: ModuleType, kernel: str, programs: int, *arguments, replaced: dict | None = None, **constants
) -> list[Machine]:
    """Runs a kernel's programs. Matrices are `Descriptor`s; of arrays it gets pointers.

    Args:
        replaced: other values of names that the kernel uses.
    """
    arguments = [Pointer(a) if isinstance(a, np.ndarray) else a for a in arguments]
    machines = [Machine(program, programs) for program in range(programs)]
    for machine in machines:
        with np.errstate(invalid="ignore", over="ignore"):
            names = machine.globals(module)
            names |= replaced or {}
            names[kernel](*arguments, **constants)
        machine.finish()
    return machines


def no_layout(*_) -> None:
    return None


def true(condition) -> None:
    assert condition


def kind(a, b):
    """The dtype of one of two values of which one may be a Python number."""
    arrays = [x.dtype for x in (a, b) if isinstance(x, np.ndarray)]
    return np.result_type(*arrays) if arrays else np.result_type(a, b)


def load(pointer: Pointer, mask=None, other=0) -> Block:
    at, mask = pointer.elements(mask)
    out = np.full(at.shape, other, pointer.array.dtype)
    out[mask] = pointer.array.reshape(-1)[at[mask]]
    return block(out)


def store(pointer: Pointer, value, mask=None) -> None:
    at, mask = pointer.elements(mask)
    flat, value = pointer.array.reshape(-1), np.broadcast_to(value, at.shape)
    assert len(np.unique(at[mask])) == mask.sum(), "two threads store to one element"
    assert np.isnan(flat[at[mask]]).all(), "an element is stored twice"
    flat[at[mask]] = value[mask]

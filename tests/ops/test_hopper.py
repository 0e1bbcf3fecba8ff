"""The persistent Hopper kernels: what they compile to, and what their source does in `gluon_model`."""

import itertools
import random
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from dadpo_kernels.ops.backends.triton_kernels import hopper
from dadpo_kernels.ops.backends.tuning import CONFIGS
from tests.support import gluon_model
from tests.support.gluon_model import Descriptor, Machine, rounded
from tools import offline
from tools.machine_code import CHIPS, inspect_triton

BLOCK = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8}
SMALL = {"BLOCK_M": 8, "BLOCK_N": 16, "BLOCK_K": 8, "GROUP": 2}
SOFTCAP = 3.0


# What they compile to.


def compiled(kernel, stored: bool, options: bool, stages: int):
    """`kernel` for a ragged problem; with `options`, a bias and a softcap."""
    rows, columns, width, entries = 1000, 4090, 904, 65
    matrix = {"dtype": torch.bfloat16}
    hidden, weight = torch.zeros(rows, width, **matrix), torch.zeros(columns, width, **matrix)
    out = torch.zeros(rows, columns + 6, **matrix)[:, :columns] if stored else None
    f, i = torch.zeros(16), torch.zeros(16, dtype=torch.int32)
    head = (rows, torch.zeros(columns, **matrix) if options else None, columns, width, 0, 1.0, 30.0, 1.0, i, i)
    rest = (entries, f, f, f)
    if kernel is hopper.forward:
        rest = (entries, i.bool(), f, f, f, f if stored else None)
    with offline.compiling(90) as kernels:
        hopper.launcher(
            kernel, hidden, weight, out, *head, *rest, **BLOCK, SOFTCAP=options, STAGES=stages, num_warps=8,
            programs=132,
        )()  # fmt: skip
    ((_, code),) = kernels.values()
    return code


@pytest.mark.parametrize("options", [False, True], ids=["plain", "bias, softcap"])
@pytest.mark.parametrize(
    ("name", "kernel"), [("forward", hopper.forward), ("retain", hopper.forward), ("gradient", hopper.logit_gradient)]
)
def test_compiled(name, kernel, options):
    config = CONFIGS[name][9][0]
    assert config.options == {**BLOCK, "STAGES": config.num_stages, "num_warps": 8}
    stored = name != "forward"
    code = compiled(kernel, stored, options, config.num_stages)
    wanted = ("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "cp.async.bulk.tensor")
    found = inspect_triton(CHIPS[90], code, wanted, name="", dtype="bfloat16", variant="", config="")
    assert not found.complaints
    assert found.loop_spills == 0  # so the loop was found
    assert options or found.spills == 0  # the softcap's temporaries do not all fit, outside of the loop
    assert found.shared <= config.shared(name, torch.bfloat16) <= min(CHIPS[90].shared_per_block, found.shared + 512)
    ptx = code.asm["ptx"]
    assert ("cp.async.bulk.tensor.2d.global.shared" in ptx) == stored
    # Between the wait for a step's wgmma and the load into its buffer, all warps meet.
    step = re.search(r"wgmma\.wait_group\.sync\.aligned 1;(.*?)expect_tx", ptx, re.DOTALL)
    assert "bar.sync" in step[1]
    if stored:  # the buffer: read, then known to be by all; written, visible to TMA, by all; then copied from
        marks = ("wait_group.read", "bar.sync", "stmatrix", "fence.proxy.async", "bar.sync", "tensor.2d.global.shared")
        order = re.findall("|".join(map(re.escape, dict.fromkeys(marks))), ptx[ptx.index(marks[0]) :])
        assert tuple(mark for mark, _ in itertools.groupby(order))[: len(marks)] == marks


# What their source does.


@dataclass
class Problem:
    """Rows of bfloat16 values in float32, and entries: sorted ids, some of them twice, of which the last may be
    dropped. Some lie outside of the columns.
    """

    rows: int
    columns: int
    width: int
    entries: int
    block: int  # columns of a block
    options: bool
    first: int = 7

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.rows + 10 * self.columns + 100 * self.width)

        def values(*shape):
            return rounded(rng.normal(size=shape))

        self.hidden, self.weight = values(self.rows, self.width), values(self.columns, self.width)
        self.bias = values(self.columns) if self.options else None
        self.scalars = (0.7, SOFTCAP, 0.9)
        last = self.first + self.columns
        ids = rng.integers(max(0, self.first - 3), last + 3, (self.rows, self.entries))
        ids[:, 1:2] = ids[:, :1]
        self.ids = np.sort(ids, 1).astype(np.int32)
        same = np.diff(self.ids, axis=1, append=-1) == 0
        self.drop = (rng.random(ids.shape) < 0.7) & ~same
        blocks = -(-self.columns // self.block)
        edges = self.first + np.minimum(np.arange(blocks + 1) * self.block, self.columns)
        self.starts = np.stack([np.searchsorted(row, edges) for row in self.ids], 1).astype(np.int32)
        self.inside = (self.first <= self.ids) & (self.ids < last)

    @property
    def logits(self) -> np.ndarray:
        """In float64."""
        scale, softcap, inv_temperature = self.scalars
        z = self.hidden.astype(np.float64) @ self.weight.T.astype(np.float64)
        if not self.options:
            return z * (scale * inv_temperature)
        return np.tanh((z + self.bias) * scale / softcap) * softcap * inv_temperature

    def slope(self, z: np.ndarray) -> np.ndarray | float:
        return 1 - (z / (SOFTCAP * self.scalars[2])) ** 2 if self.options else 1.0

    def at_entries(self, x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, np.where(self.inside, self.ids - self.first, 0), 1)

    def arguments(self) -> tuple:
        return (self.rows, self.bias, self.columns, self.width, self.first, *self.scalars, self.starts, self.ids)


def run(p: Problem, kernel: str, programs: int, stored: np.ndarray | None, *rest, replaced=None, **block):
    """The machines, the operands' descriptors, and that of what is stored."""
    m, n, k = block["BLOCK_M"], block["BLOCK_N"], block["BLOCK_K"]
    operands = Descriptor(p.hidden, (m, k)), Descriptor(p.weight, (n, k))
    out = None if stored is None else Descriptor(stored, (m, n))
    machines = gluon_model.launch(
        hopper, kernel, programs, *operands, out, *p.arguments(), *rest, replaced=replaced, SOFTCAP=p.options, **block
    )
    return machines, operands, out


def nans(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def check_forward(p: Problem, programs: int, retain: bool, **block) -> tuple:
    blocks = -(-p.columns // p.block)
    selected, part_max, part_sum = nans(p.rows, p.entries), nans(blocks, p.rows), nans(blocks, p.rows)
    exps = nans(p.rows, p.columns) if retain else None
    bases = p.logits.max(1).astype(np.float32) - 2 if retain else None
    rest = (p.entries, p.drop, selected, part_max, part_sum, bases)
    ran = run(p, "forward", programs, exps, *rest, **block)
    z = p.logits
    np.testing.assert_allclose(selected[p.inside], p.at_entries(z)[p.inside], rtol=1e-4, atol=1e-4)
    assert np.isnan(selected[~p.inside]).all()
    for row, entry in zip(*np.nonzero(p.drop & p.inside), strict=True):
        z[row, p.ids[row, entry] - p.first] = -np.inf
    for i in range(blocks):
        part = z[:, i * p.block : (i + 1) * p.block]
        largest = part.max(1)
        np.testing.assert_allclose(part_max[i], largest, rtol=1e-4, atol=1e-4)
        largest[largest == -np.inf] = 0
        np.testing.assert_allclose(part_sum[i], np.exp(part - largest[:, None]).sum(1), rtol=1e-3)
    if retain:
        with np.errstate(invalid="ignore"):
            wanted = np.where(z == -np.inf, 0, np.exp(z - bases[:, None]) * p.slope(z))
        np.testing.assert_allclose(exps, wanted, rtol=2**-7, atol=1e-3)
    return ran


def check_gradient(p: Problem, programs: int, **block) -> tuple:
    rng = np.random.default_rng(0)
    z = p.logits
    c = rng.normal(size=p.rows).astype(np.float32)
    base = z.max(1).astype(np.float32)
    values = (p.ids * 0.37 + np.arange(p.rows)[:, None]).astype(np.float32)  # equal for equal ids
    dz = nans(p.rows, p.columns)
    ran = run(p, "logit_gradient", programs, dz, p.entries, c, base, values, **block)
    wanted = c[:, None] * np.exp(z - base[:, None]) * p.slope(z)
    for row, entry in zip(*np.nonzero(p.inside), strict=True):
        wanted[row, p.ids[row, entry] - p.first] = values[row, entry]
    np.testing.assert_allclose(dz, wanted, rtol=2**-7, atol=1e-3)
    return ran


def check_schedule(p: Problem, machines: list[Machine], operands, out, **block) -> None:
    """Every tile once, of the slices that are its own, in order; no load beside these."""
    m, n, k = block["BLOCK_M"], block["BLOCK_N"], block["BLOCK_K"]
    row_blocks, column_blocks = -(-p.rows // m), -(-p.columns // n)
    order = tile_order(row_blocks, column_blocks, block["GROUP"])
    assert sorted(order) == list(itertools.product(range(row_blocks), range(column_blocks)))
    steps = max(-(-p.width // k), block["STAGES"] - 1)
    for machine in machines:
        wanted = [
            ((operands[0], row * m, step * k), (operands[1], column * n, step * k))
            for row, column in order[machine.program :: machine.programs]
            for step in range(steps)
        ]
        assert machine.consumed == wanted
        assert machine.waits == len(wanted)
    if out:
        assert out.stored == {(row * m, column * n): 1 for row, column in order}


def tile_order(row_blocks: int, column_blocks: int, group: int) -> list[tuple[int, int]]:
    """By groups of row blocks; in a group by columns, then by rows."""
    groups = [range(first, min(first + group, row_blocks)) for first in range(0, row_blocks, group)]
    return [(row, column) for rows in groups for column in range(column_blocks) for row in rows]


SHAPES = list(itertools.product((1, 8, 9, 45), (1, 16, 50), (1, 8, 20, 64), (1, 2, 5, 60), (2, 3, 4, 6)))


@pytest.mark.parametrize("kernel", ["forward", "retain", "gradient"])
def test_schedules(kernel):
    """Many shapes and rings, with more programs than tiles and fewer slices than stages among them."""
    for rows, columns, width, programs, stages in random.Random(kernel).sample(SHAPES, 80):
        p = Problem(rows, columns, width, 5, SMALL["BLOCK_N"], options=(rows + width) % 2 == 0)
        block = SMALL | {"STAGES": stages}
        if kernel == "gradient":
            ran = check_gradient(p, programs, **block)
        else:
            ran = check_forward(p, programs, kernel == "retain", **block)
        check_schedule(p, *ran, **block)


@pytest.mark.parametrize("options", [False, True], ids=["plain", "bias, softcap"])
def test_the_blocks_that_compile(options):
    p = Problem(300, 700, 200, 9, BLOCK["BLOCK_N"], options)
    block = BLOCK | {"STAGES": 3}
    check_schedule(p, *check_forward(p, 4, True, **block), **block)
    check_schedule(p, *check_gradient(p, 4, **block), **block)


def test_many_entries_in_one_block():
    """Also of one id."""
    p = Problem(9, 40, 16, 60, SMALL["BLOCK_N"], options=True)
    check_forward(p, 2, True, **SMALL, STAGES=3)
    check_gradient(p, 2, **SMALL, STAGES=3)


def test_a_block_without_a_tail_and_a_base_far_too_low():
    """Its maximum is -inf and its exponentials are 0; elsewhere the clamp keeps them finite."""
    p = Problem(2, 8, 8, 8, 8, options=False)
    p.ids[...] = p.first + np.arange(8)
    p.drop[...], p.inside[...] = [[True], [False]], True
    p.starts[...] = [[0, 0], [8, 8]]
    part_max, part_sum, exps = nans(1, 2), nans(1, 2), nans(2, 8)
    rest = (8, p.drop, nans(2, 8), part_max, part_sum, np.full(2, -500, np.float32))
    run(p, "forward", 1, exps, *rest, BLOCK_M=8, BLOCK_N=8, BLOCK_K=8, STAGES=2, GROUP=1)
    assert part_max[0, 0] == -np.inf
    assert part_sum[0, 0] == 0
    assert (exps[0] == 0).all()
    assert exps[1].max() == pytest.approx(np.exp(80.0), rel=2**-8)


@pytest.mark.parametrize(
    ("name", "broken", "complaint"),
    [
        ("slices", lambda width, k, stages: -(-width // k), "loaded and not consumed"),
        ("phase", lambda count, stages: 0, "waits for the phase before"),
        ("stage", lambda count, stages: count % (stages - 1), "load into a buffer that is"),
        ("ahead", lambda k, steps, stages: (True, k + stages - 1), "loaded and not consumed"),
        ("place_or_last", lambda *_: (gluon_model.block(0), gluon_model.block(0)), "Not equal"),
    ],
)
def test_wrong_arithmetic_is_found(name, broken, complaint):
    """The model is not vacuous."""
    p = Problem(20, 40, 16, 5, SMALL["BLOCK_N"], options=False)
    with pytest.raises(AssertionError, match=complaint):
        check_gradient(p, 2, replaced={name: broken}, **SMALL, STAGES=4)


class Without(Machine):
    """One call of an operation does nothing."""

    def __init__(self, program: int, programs: int, operation: str, missing: int) -> None:
        super().__init__(program, programs)
        real, calls = getattr(self, operation), itertools.count()
        setattr(self, operation, lambda *args: None if next(calls) == missing else real(*args))


@pytest.mark.parametrize(
    ("operation", "missing", "complaint"),
    [
        ("fence", 0, "the barrier is written"),
        ("barrier", 0, "the barrier is fenced"),
        ("barrier", 2, "load into a buffer that is read"),  # 1, 2: two steps; in the first, all buffers are free
        ("fence", 1, "TMA store from a buffer that is written"),
        ("barrier", 4, "TMA store from a buffer that is fenced"),
        ("store_wait", 1, "store to a buffer that is reading"),
        ("barrier", 7, "store to a buffer that is read"),  # 5, 6: the steps of the second tile
        ("store_wait", 5, "in flight at the end"),  # after five tiles
    ],
)
def test_a_missing_synchronisation_is_found(monkeypatch, operation, missing, complaint):
    monkeypatch.setattr(gluon_model, "Machine", lambda *args: Without(*args, operation, missing))
    p = Problem(20, 40, 16, 5, SMALL["BLOCK_N"], options=False)
    with pytest.raises(AssertionError, match=complaint):
        check_gradient(p, 2, **SMALL, STAGES=3)

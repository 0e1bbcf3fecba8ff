"""Single CUDA kernels on the host, with memory laid out as the backend never does: misaligned, far apart."""

from types import SimpleNamespace

import pytest
import torch

from tests.support import cuda_host
from tests.support.extension import load
from tests.support.far import far, linux

ROWS, FIRST = 3, 1000
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


PLACES = {
    "misaligned": lambda values: place(values, 3, 1023),
    "far": lambda values: far(*values.shape, values.dtype).copy_(values),
}


@pytest.fixture(scope="module")
def host():
    return load(cuda_host.plain())


def place(values: torch.Tensor, offset: int, stride: int, guard: float = 12345.0) -> torch.Tensor:
    """`values` in rows `stride` apart, `offset` elements behind an aligned address, in a sea of `guard`."""
    rows, columns = values.shape
    sea = torch.full((64 + offset + rows * stride,), guard, dtype=values.dtype)
    start = (-sea.data_ptr() // sea.element_size()) % 16 + offset
    out = sea[start:].as_strided((rows, columns), (stride, 1))
    out.copy_(values)
    return out


class Case:
    """A tile of random products, its entries, and the calls on it."""

    def __init__(self, host, columns: int, offset: int = 0, stride: int | None = None) -> None:
        g = torch.Generator().manual_seed(columns)
        self.host, self.columns = host, columns
        self.z = torch.randn(ROWS, columns, generator=g) * 3
        self.products = place(self.z, offset, stride or columns)
        ids = torch.randint(FIRST - 50, FIRST + columns + 50, (ROWS, 9), generator=g, dtype=torch.int32)
        ids[:, 0] = FIRST + columns - 1
        ids[:, 1:3] = FIRST
        self.ids = ids.sort(1).values
        self.in_topk = torch.arange(9) % 3 != 1
        self.in_topk = self.in_topk.expand(ROWS, 9).contiguous()
        local = (self.ids - FIRST).long()
        self.hit = (local >= 0) & (local < columns)
        self.local = local.clamp(0, columns - 1)
        self.inside = torch.zeros(ROWS, columns, dtype=torch.bool)
        for n, j in (self.hit & self.in_topk).nonzero():
            self.inside[n, self.local[n, j]] = True
        self.queue = host.Queue(0, 0)

    def tile(self):
        p = self.products
        return self.host.Tile(
            products=p.data_ptr(), rows=ROWS, stride=p.stride(0), first=FIRST, columns=self.columns, bias=0, scale=1.0,
            softcap=0.0, inv_temperature=1.0, ids=self.ids.data_ptr(), entries=9,
        )  # fmt: skip

    def matrix(self, matrix: torch.Tensor):
        return self.host.Matrix(matrix.data_ptr(), matrix.stride(0), getattr(self.host.Type, TYPES[matrix.dtype]))

    def tail(self) -> torch.Tensor:
        return self.z.double().masked_fill(self.inside, -torch.inf)

    def forward(self, state: SimpleNamespace, exps: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the pass; the entries' logits. `exps` are the columns of this tile, behind FIRST others."""
        selected = torch.full((ROWS, 9), 7.0)
        whole = self.host.Matrix(0, 0, self.host.Type.f32)
        if exps is not None:
            whole = self.host.Matrix(
                exps.data_ptr() - FIRST * exps.element_size(),
                exps.stride(0),
                getattr(self.host.Type, TYPES[exps.dtype]),
            )
        self.host.forward(
            self.queue, self.tile(), self.in_topk.data_ptr(), selected.data_ptr(), state.max.data_ptr(),
            state.sum.data_ptr(), whole, state.bases.data_ptr(), 30.0,
        )  # fmt: skip
        return selected

    def check_forward(self, exps: torch.Tensor | None = None) -> None:
        """As the first tile that has a logit: its maximum is the base."""
        state, tail = no_state(), self.tail()
        selected = self.forward(state, exps)
        torch.testing.assert_close(state.max.double() + state.sum.log(), tail.logsumexp(1), rtol=3e-6, atol=3e-6)
        assert torch.equal(selected, torch.where(self.hit, self.z.gather(1, self.local), 7.0))
        if exps is not None:
            base = tail.amax(1)
            base = base.masked_fill(base == -torch.inf, 0)
            assert torch.equal(state.bases, base.float())
            rtol = torch.finfo(exps.dtype).eps + 3e-6  # the difference of logits is rounded at their size
            torch.testing.assert_close(exps.double(), (tail - base[:, None]).exp(), rtol=rtol, atol=1e-7)

    def check_gradient(self, out: torch.Tensor) -> None:
        g = torch.Generator().manual_seed(1)
        c, base = torch.randn(ROWS, generator=g), self.z.amax(1)
        values = torch.randn(ROWS, self.columns, generator=g).gather(1, self.local)  # equal ids have equal values
        self.host.logit_gradient(
            self.queue, self.tile(), c.data_ptr(), base.data_ptr(), values.data_ptr(), self.matrix(out)
        )
        want = c[:, None].double() * (self.z - base[:, None]).double().exp()
        for n, j in self.hit.nonzero():
            want[n, self.local[n, j]] = values[n, j].double()
        torch.testing.assert_close(out.double(), want, rtol=4 * torch.finfo(out.dtype).eps, atol=1e-7)


def no_state() -> SimpleNamespace:
    """Of rows that have not met a logit; their bases are not written yet."""
    return SimpleNamespace(
        max=torch.full((ROWS,), -torch.inf), sum=torch.zeros(ROWS).double(), bases=torch.full((ROWS,), torch.nan)
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("columns", "offset", "stride"),
    [(1, 0, 1), (7, 1, 7), (8, 3, 13), (255, 2, 255), (256, 0, 264), (257, 1, 258), (1021, 3, 1021), (1500, 0, 1501)],
)
def test_misaligned_rows(host, columns, offset, stride, dtype):
    """Heads and tails of every length, rows that start anywhere; what lies between the rows is not touched."""
    case = Case(host, columns, offset, stride)
    exps = place(torch.zeros(ROWS, columns, dtype=dtype), offset, stride)
    before = exps.as_strided((exps.untyped_storage().nbytes() // exps.element_size(),), (1,), 0).clone()
    case.check_forward(exps)
    case.check_gradient(exps)
    after = exps.as_strided(before.shape, (1,), 0)
    inside = torch.zeros_like(before, dtype=torch.bool)
    inside.as_strided(exps.shape, exps.stride(), exps.storage_offset()).fill_(True)
    assert torch.equal(after[~inside], before[~inside])
    assert (after[inside] != before[inside]).any()


@linux
@pytest.mark.parametrize("dtype", TYPES)
def test_offsets_beyond_32_bits(host, dtype):
    """The third row starts at element 2^32 and some: index arithmetic in 32 bits would land elsewhere."""
    case = Case(host, 100)
    products, exps = far(ROWS, 100, torch.float32), far(ROWS, 100, dtype)
    products.copy_(case.products)
    case.products = products
    case.check_forward(exps)
    case.check_gradient(exps)
    out = torch.zeros(100)
    host.column_sums(case.queue, case.matrix(exps), ROWS, 100, 0, out.data_ptr())
    torch.testing.assert_close(out, exps.float().sum(0))
    assert out.abs().max() > 0


@linux
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", TYPES)
def test_exchange_undoes_itself(host, dtype, where):
    """The first of equal ids below the number of columns; all else stays."""
    case = Case(host, 1021)
    ids = (case.ids - FIRST).contiguous()  # some are negative, some beyond the columns
    g = torch.Generator().manual_seed(2)
    matrix = PLACES[where](torch.rand(ROWS, 1021, generator=g).to(dtype))
    values = torch.rand(ROWS, 9, generator=g).to(dtype)
    before, given = matrix.clone(), values.clone()
    want = before.clone()
    for n, j in reversed(case.hit.nonzero().tolist()):  # so that the first of equal ids has the last word
        want[n, ids[n, j]] = given[n, j]

    def exchange() -> None:
        host.exchange(case.queue, case.matrix(matrix), ROWS, 1021, ids.data_ptr(), 9, values.data_ptr())

    exchange()
    assert torch.equal(matrix, want)
    assert not torch.equal(matrix, before)
    exchange()
    assert torch.equal(matrix, before)
    assert torch.equal(values, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_rises_takes_its_exponentials_along(host, dtype):
    """A little: its base stays. By more than the reach: the new maximum is the base, also of the columns before."""
    case = Case(host, 255)
    state, tail = no_state(), case.tail()
    whole = torch.full((ROWS, FIRST + 255), 2.0, dtype=dtype)
    rise = torch.tensor([29.0, 31.0, 200.0])
    state.max[:] = state.bases[:] = tail.amax(1).float() - rise
    state.sum[:] = 1.0
    before = state.bases.clone()
    case.forward(state, whole[:, FIRST:])
    moved = torch.tensor([False, True, True])
    assert torch.equal(state.bases, torch.where(moved, tail.amax(1).float(), before))
    want = torch.cat([2 * (before - state.bases).double().exp()[:, None].expand(ROWS, FIRST),
                      (tail - state.bases[:, None]).exp()], 1)  # fmt: skip
    torch.testing.assert_close(whole.double(), want, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=1e-37)


@pytest.mark.parametrize("height", [-torch.inf, -300.0, 300.0])
def test_a_row_without_a_logit_gets_its_base_later(host, height):
    """The first tile holds -inf alone; the base is the second's maximum, or 0 for ever."""
    case, state = Case(host, 255), no_state()
    z, exps = case.products.clone(), torch.full((ROWS, 255), torch.nan)
    case.products.fill_(-torch.inf)
    case.forward(state, exps)
    assert torch.equal(state.bases, torch.zeros(ROWS))
    assert torch.equal(exps, torch.zeros(ROWS, 255))
    case.products.copy_(z + height)
    case.forward(state, exps)
    tail = (case.tail() + height).float()
    base = tail.amax(1).masked_fill(tail.amax(1) == -torch.inf, 0)
    assert torch.equal(state.bases, base)
    torch.testing.assert_close(exps, (tail - base[:, None]).exp(), rtol=1e-4, atol=1e-7)


@linux
@pytest.mark.parametrize("where", PLACES)
def test_top_k_of_rows_anywhere(host, where):
    case = Case(host, 1021)
    case.products = PLACES[where](case.z)
    values, ids = torch.full((ROWS, 101), -torch.inf), torch.zeros(ROWS, 101, dtype=torch.int32)
    values[:, :2], ids[:, :2] = torch.tensor([50.0, -50.0]), torch.tensor([5, 6], dtype=torch.int32)
    selected, state = torch.zeros(ROWS, 9), no_state()
    host.topk(
        case.queue, case.tile(), selected.data_ptr(), values.data_ptr(), ids.data_ptr(), 101, 2, 50,
        state.max.data_ptr(), state.sum.data_ptr(),
    )  # fmt: skip
    best = case.z.topk(49, dim=1)
    assert (values[:, 0] == 50).all()
    assert torch.equal(values[:, 1:50].sort(1, descending=True).values, best.values)
    assert torch.equal(ids[:, 1:50].sort(1).values, (best.indices + FIRST).sort(1).values.int())
    rest = torch.cat([case.z.scatter(1, best.indices, -torch.inf), torch.full((ROWS, 1), -50.0)], 1)
    torch.testing.assert_close((state.max + state.sum.log()).float(), rest.logsumexp(1), rtol=3e-6, atol=3e-6)


def test_what_does_not_fit_is_refused(host):
    case = Case(host, 10)
    case.columns = host.COLUMNS + 1
    with pytest.raises(RuntimeError, match="does not fit into a block of"):
        case.check_gradient(torch.zeros(ROWS, 10))
    with pytest.raises(RuntimeError, match=f"k={host.MAX_K + 1} exceeds {host.MAX_K}"):
        host.topk(case.queue, Case(host, 10).tile(), 0, 0, 0, 0, 0, host.MAX_K + 1, 0, 0)

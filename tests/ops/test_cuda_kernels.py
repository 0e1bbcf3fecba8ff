"""Single CUDA kernels on the host, with memory laid out as the backend never does: misaligned, far apart."""

from types import SimpleNamespace

import pytest
import torch

from tests.support import cuda_host
from tests.support.far import far, linux

ROWS, FIRST = 3, 1000
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


PLACES = {
    "misaligned": lambda values: place(values, 3, 1023),
    "far": lambda values: far(*values.shape, values.dtype).copy_(values),
}


@pytest.fixture(scope="module")
def host():
    return cuda_host.load(cuda_host.plain())


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

    def __init__(self, host, columns: int, segments: int, offset: int = 0, stride: int | None = None) -> None:
        g = torch.Generator().manual_seed(columns)
        self.host, self.columns, self.segments = host, columns, segments
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
            softcap=0.0, inv_temperature=1.0, ids=self.ids.data_ptr(), entries=9, segments=self.segments,
        )  # fmt: skip

    def retained(self, matrix: torch.Tensor):
        return self.host.Retained(matrix.data_ptr(), matrix.stride(0), getattr(self.host.Type, TYPES[matrix.dtype]))

    def check_statistics(self, exps: torch.Tensor | None = None) -> None:
        selected = torch.full((ROWS, 9), 7.0)
        part = torch.full((2, self.segments, ROWS), torch.nan)
        self.host.statistics(
            self.queue, self.tile(), self.in_topk.data_ptr(), selected.data_ptr(), part[0].data_ptr(),
            part[1].data_ptr(), self.host.Retained(0, 0, self.host.Type.f32) if exps is None else self.retained(exps),
        )  # fmt: skip
        state = SimpleNamespace(
            max=torch.full((ROWS,), -torch.inf), sum=torch.zeros(ROWS).double(), bases=torch.zeros(ROWS, 4)
        )
        self.host.absorb(
            self.queue, part[0].data_ptr(), part[1].data_ptr(), ROWS, self.segments, state.max.data_ptr(),
            state.sum.data_ptr(), state.bases.data_ptr(), 4,
        )  # fmt: skip
        tail = self.z.double().masked_fill(self.inside, -torch.inf)
        torch.testing.assert_close(state.max.double() + state.sum.log(), tail.logsumexp(1), rtol=3e-6, atol=3e-6)
        assert torch.equal(state.bases[:, 0], tail.amax(1).float())
        assert torch.equal(selected, torch.where(self.hit, self.z.gather(1, self.local), 7.0))
        if exps is not None:
            base = tail.amax(1, keepdim=True)
            want = (tail - base.masked_fill(base == -torch.inf, 0)).exp()
            scale = 32768 if exps.dtype == torch.float16 else 1
            rtol = torch.finfo(exps.dtype).eps + 3e-6  # the difference of logits is rounded at their size
            torch.testing.assert_close(exps.double() / scale, want, rtol=rtol, atol=1e-9)

    def check_gradient(self, out: torch.Tensor) -> None:
        g = torch.Generator().manual_seed(1)
        c, base = torch.randn(ROWS, generator=g), self.z.amax(1)
        values = torch.randn(ROWS, self.columns, generator=g).gather(1, self.local)  # equal ids have equal values
        self.host.logit_gradient(
            self.queue, self.tile(), c.data_ptr(), base.data_ptr(), 1, values.data_ptr(), self.retained(out)
        )
        want = c[:, None].double() * (self.z - base[:, None]).double().exp()
        for n, j in self.hit.nonzero():
            want[n, self.local[n, j]] = values[n, j].double()
        torch.testing.assert_close(out.double(), want, rtol=4 * torch.finfo(out.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    ("columns", "offset", "stride"),
    [(1, 0, 1), (7, 1, 7), (8, 3, 13), (255, 2, 255), (256, 0, 264), (257, 1, 258), (1021, 3, 1021), (1500, 0, 1501)],
)
def test_misaligned_rows(host, columns, offset, stride, segments, dtype):
    """Heads and tails of every length, rows that start anywhere; what lies between the rows is not touched."""
    case = Case(host, columns, segments, offset, stride)
    exps = place(torch.zeros(ROWS, columns, dtype=dtype), offset, stride)
    before = exps.as_strided((exps.untyped_storage().nbytes() // exps.element_size(),), (1,), 0).clone()
    case.check_statistics(exps if segments == 1 else None)
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
    case = Case(host, 100, 1)
    products, exps = far(ROWS, 100, torch.float32), far(ROWS, 100, dtype)
    products.copy_(case.products)
    case.products = products
    case.check_statistics(exps)
    case.check_gradient(exps)
    out = torch.zeros(100)
    host.column_sums(case.queue, case.retained(exps), ROWS, 100, 0, out.data_ptr())
    torch.testing.assert_close(out, exps.float().sum(0))
    assert out.abs().max() > 0


@linux
def test_entered_values_and_restore(host):
    """Far rows again; a factor of 0 is raised so that the values stand, and everything is put back."""
    case = Case(host, 100, 1)
    exps = far(ROWS, 100, torch.float32)
    exps.copy_(torch.rand(ROWS, 100))
    before = exps.clone()
    c, base, bases = torch.tensor([0.5, 0.0, -1e-38]), torch.zeros(ROWS), torch.zeros(ROWS, 4)
    values = torch.randn(ROWS, 100).gather(1, case.local)
    factors, saved = torch.empty(ROWS), torch.empty(ROWS, 9)
    gradient = host.RetainedGradient(
        retained=case.retained(exps), rows=ROWS, first=FIRST, columns=100, ids=case.ids.data_ptr(), entries=9,
        c=c.data_ptr(), base=base.data_ptr(), values=values.data_ptr(), bases=bases.data_ptr(), bases_stride=4, dz=0,
        dz_stride=0, factors=factors.data_ptr(), saved=saved.data_ptr(),
    )  # fmt: skip
    host.enter_values(case.queue, gradient)
    want = c[:, None] * before
    for n, j in case.hit.nonzero():
        want[n, case.local[n, j]] = values[n, j]
    torch.testing.assert_close(factors[:, None] * exps, want, rtol=1e-6, atol=8 * 2.0**-100)
    host.restore(case.queue, gradient)
    assert torch.equal(exps, before)


@linux
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", TYPES)
def test_scaled_exponentials(host, dtype, where):
    """From retained exponentials to the gradient in one pass, values at the entries."""
    case, scale = Case(host, 1021, 1), 32768 if dtype == torch.float16 else 1
    g = torch.Generator().manual_seed(2)
    exps = PLACES[where]((torch.rand(ROWS, 1021, generator=g) * scale).to(dtype))
    dz = PLACES[where](torch.full((ROWS, 1021), torch.nan, dtype=dtype))
    c, base, bases = torch.randn(ROWS, generator=g), torch.randn(ROWS, generator=g), torch.randn(ROWS, 4, generator=g)
    values = torch.randn(ROWS, 1021, generator=g).gather(1, case.local)
    case.host.scale_retained(
        case.queue,
        host.RetainedGradient(
            retained=case.retained(exps), rows=ROWS, first=FIRST, columns=1021, ids=case.ids.data_ptr(), entries=9,
            c=c.data_ptr(), base=base.data_ptr(), values=values.data_ptr(), bases=bases.data_ptr(), bases_stride=4,
            dz=dz.data_ptr(), dz_stride=dz.stride(0), factors=0, saved=0,
        ),
    )  # fmt: skip
    want = (c * (bases[:, 0] - base).exp()).double()[:, None] * exps.double() / scale
    for n, j in case.hit.nonzero():
        want[n, case.local[n, j]] = values[n, j].double()
    torch.testing.assert_close(dz.double(), want, rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-7)


@linux
@pytest.mark.parametrize("where", PLACES)
def test_top_k_of_rows_anywhere(host, where):
    case = Case(host, 1021, 1)
    case.products = PLACES[where](case.z)
    values, ids = torch.full((ROWS, 101), -torch.inf), torch.zeros(ROWS, 101, dtype=torch.int32)
    values[:, :2], ids[:, :2] = torch.tensor([50.0, -50.0]), torch.tensor([5, 6], dtype=torch.int32)
    selected, part = torch.zeros(ROWS, 9), torch.zeros(2, 1, ROWS)
    host.topk(
        case.queue, case.tile(), selected.data_ptr(), values.data_ptr(), ids.data_ptr(), 101, 2, 50,
        part[0].data_ptr(), part[1].data_ptr(),
    )  # fmt: skip
    best = case.z.topk(49, dim=1)
    assert (values[:, 0] == 50).all()
    assert torch.equal(values[:, 1:50].sort(1, descending=True).values, best.values)
    assert torch.equal(ids[:, 1:50].sort(1).values, (best.indices + FIRST).sort(1).values.int())
    rest = torch.cat([case.z.scatter(1, best.indices, -torch.inf), torch.full((ROWS, 1), -50.0)], 1)
    torch.testing.assert_close(part[0, 0] + part[1, 0].log(), rest.logsumexp(1), rtol=3e-6, atol=3e-6)


def test_what_does_not_fit_is_refused(host):
    case = Case(host, 10, 1)
    case.columns = host.COLUMNS + 1
    with pytest.raises(RuntimeError, match="does not fit into 1 segments of"):
        case.check_gradient(torch.zeros(ROWS, 10))
    with pytest.raises(RuntimeError, match="k=257 exceeds 256"):
        host.topk(case.queue, Case(host, 10, 1).tile(), 0, 0, 0, 0, 0, 257, 0, 0)

"""The float64 oracle and the tolerance every backend is held to.

Policy (QuACK's, see its tests): an error against float64 must be at most 3 times the error of the plain dense
computation in the same dtype (operands in that dtype, logits in float32), plus a few units of float32 rounding, plus,
for gradients, one rounding of the logits' gradient to the operands' dtype.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dadpo_kernels import linear_selected_logps

IGNORE = -100


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    topk_ids: Tensor | None = None
    bias: Tensor | None = None
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Problem":
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype)

        return Problem(cast(self.hidden), cast(self.weight), self.labels, self.topk_ids, cast(self.bias), self.options)


def random_problem(
    rows: int = 61, vocab: int = 1000, width: int = 40, k: int | None = 7, bias: bool = False, seed: int = 0, **options
) -> Problem:
    """Peaked logits, a third of the rows masked, the label inside the top k in half of the others, duplicate ids."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * 0.5
    labels = torch.randint(vocab, (rows,), generator=g)
    ids = None if k is None else torch.randint(vocab, (rows, k), generator=g)
    if k:
        ids[::2, 0] = labels[::2]
        ids[:, -1] = ids[:, 0]
    labels[1::3] = IGNORE
    return Problem(hidden, weight, labels, ids, torch.randn(vocab, generator=g) if bias else None, options)


def values_and_grads(
    p: Problem,
    backend: str,
    memory_budget: int | None = None,
    trained: Collection[str] = ("hidden", "weight", "bias"),
) -> dict[str, Tensor]:
    """Outputs, and gradients of a random linear function of them, by name: None of what is not trained."""
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    # Strides stay as they are.
    leaves = {k: v.detach().requires_grad_(k in trained) for k, v in leaves.items() if v is not None}
    out = linear_selected_logps(
        leaves["hidden"], leaves["weight"], p.labels, p.topk_ids, bias=leaves.get("bias"),
        backend=backend, memory_budget=memory_budget, **p.options,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(o.shape, generator=g, dtype=torch.float64) * finite(o).double()).sum() for o in out)
    loss.backward()
    return {
        **{k: v.detach() for k, v in out._asdict().items()},
        **{f"grad_{k}": v.grad for k, v in leaves.items()},
    }


def finite(t: Tensor) -> Tensor:
    """-inf (log 0) out of a sum that is to be differentiated; NaN stays."""
    return t.where(t != -torch.inf, 0.0)


@dataclass(frozen=True)
class Standard:
    """What a result of one problem in one dtype is held against."""

    plain: dict[str, Tensor]  # the dense computation in that dtype
    exact: dict[str, Tensor]  # float64
    dtype: torch.dtype

    @classmethod
    def of(cls, p: Problem, dtype: torch.dtype) -> "Standard":
        low = p.to(dtype)
        return cls(values_and_grads(low, "reference"), values_and_grads(low.to(torch.float64), "reference"), dtype)

    def check(self, got: dict[str, Tensor], where: str = "", roundings: int = 2) -> None:
        """`roundings` are those of the gradients: retained exponentials and scaled hidden states are rounded each,
        where the reference rounds dz alone."""
        eps = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
        rounding = torch.finfo(self.dtype).eps / 2
        for name, want in self.exact.items():
            place = f"{where}{name}"
            assert got[name].shape == want.shape, place
            assert torch.equal(got[name] == -torch.inf, want == -torch.inf), f"{place}: -inf at other places"
            if not want.numel():
                continue
            want = finite(want)
            scale = want.abs().max().clamp_min(1.0)  # incoming gradients and operands are of order 1
            error = (finite(got[name]).double() - want).abs().max()
            allowed = 3 * (finite(self.plain[name]).double() - want).abs().max() + 16 * eps * scale
            allowed += roundings * rounding * scale if name.startswith("grad") else 0
            assert error <= allowed, f"{place}: error {error:.2e}, allowed {allowed:.2e} (values up to {scale:.2e})"


def assert_as_good_as_dense(p: Problem, dtype: torch.dtype, backend: str, *budgets: int) -> None:
    """With each of the memory budgets."""
    standard, low = Standard.of(p, dtype), p.to(dtype)
    for budget in budgets:
        standard.check(values_and_grads(low, backend, budget), f"{backend}, budget {budget}, ")

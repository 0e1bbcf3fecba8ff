"""Products, passes and allocations of every plan against the committed counts: no machine, no clock."""

import json
from pathlib import Path

import pytest
import torch

from dadpo_kernels.ops.backends import torch_
from tools import work

COMMITTED = Path(work.__file__).with_name("work.json")


def counted(only: str = "") -> dict:
    return {"torch": torch.__version__.split("+")[0], "work": work.count(only)}


@pytest.fixture(scope="module")
def now() -> dict:
    return counted()


def test_nothing_grew(now):
    committed = json.loads(COMMITTED.read_text())
    if committed["torch"] != now["torch"]:
        pytest.skip(f"the committed counts are of torch {committed['torch']}, whose operations differ inside")
    assert work.grown(committed, now) == []


def test_plans_make_the_products_they_say(now):
    """With every PyTorch: a product is one wherever it is made."""
    for backend in work.BACKENDS:
        products = {plan: now["work"][f"{backend}/{plan}"]["products"] for plan in work.PLANS}
        assert products["recompute"] == 4
        assert 3 < products["partial"] < 4
        assert products["retain"] == 3
        assert now["work"][f"{backend}/frozen"]["products"] == 3
        assert now["work"][f"{backend}/no_grad"]["products"] == 1


@pytest.mark.parametrize(
    ("name", "extra"), [("passes", lambda z: z.add_(0.0)), ("products", lambda z: z @ z.new_ones(z.shape[1], 32))]
)
def test_an_added_pass_fails(now, monkeypatch, name, extra):
    """One more pass over each tile of logits, in place, and one more product with it."""
    original = torch_.TorchTiles.logits

    def logits(self, first, columns):
        z = original(self, first, columns)
        extra(z)
        return z

    monkeypatch.setattr(torch_.TorchTiles, "logits", logits)
    lines = work.grown(now, counted("no_grad"))
    assert any(line.startswith(f"torch/no_grad: {name} grew") for line in lines), lines
    assert not any(line.startswith("cpu/") for line in lines)


def test_other_versions_are_not_compared(now):
    with pytest.raises(ValueError, match=r"counted with torch .* and 1\.0\.0"):
        work.grown(now, now | {"torch": "1.0.0"})

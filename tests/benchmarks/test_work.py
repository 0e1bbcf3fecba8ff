"""Products, passes and allocations of every plan against the committed counts: no machine, no clock."""

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import compare, work
from dadpo_kernels.ops.backends import torch_

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "work.json"


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(COMMITTED.read_text())


def counted(only: str = "") -> dict:
    return {"torch": torch.__version__.split("+")[0], "work": work.count(only)}


def test_nothing_grew(committed):
    assert compare.grown(committed, counted()) == []


def test_plans_make_the_products_they_say(committed):
    for backend in work.BACKENDS:
        products = {plan: committed["work"][f"{backend}/{plan}"]["products"] for plan in work.PLANS}
        assert products["recompute"] == 4
        assert 3 < products["partial"] < 4
        assert products["retain"] == 3
        assert committed["work"][f"{backend}/frozen"]["products"] == 3
        assert committed["work"][f"{backend}/no_grad"]["products"] == 1


@pytest.mark.parametrize(
    ("name", "extra"), [("passes", lambda z: z.add_(0.0)), ("products", lambda z: z @ z.new_ones(z.shape[1], 32))]
)
def test_an_added_pass_fails(committed, monkeypatch, name, extra):
    """One more pass over each tile of logits, in place, and one more product with it."""
    original = torch_.TorchTiles.logits

    def logits(self, first, columns):
        z = original(self, first, columns)
        extra(z)
        return z

    monkeypatch.setattr(torch_.TorchTiles, "logits", logits)
    lines = compare.grown(committed, counted("no_grad"))
    assert any(line.startswith(f"torch/no_grad: {name} grew") for line in lines), lines
    assert not any(line.startswith("cpu/") for line in lines)


def test_other_versions_are_not_compared(committed):
    other = copy.deepcopy(committed) | {"torch": "1.0.0"}
    with pytest.raises(ValueError, match=r"counted with torch .* and 1\.0\.0"):
        compare.grown(committed, other)


def test_timings_are_compared_for_people(capsys, monkeypatch):
    path = str(COMMITTED.parent / "cpu.json")
    monkeypatch.setattr("sys.argv", ["compare", path, path])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert not ended.value.code
    assert "recompute dpo: time" in capsys.readouterr().out

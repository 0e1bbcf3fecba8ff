"""Every Triton kernel compiled ahead of time for three generations of GPUs, none of which is here.

The whole table, every configuration with all inputs, is `python -m benchmarks.static_report`.
"""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.machine_code import CHIPS
from benchmarks.static_report import FUSED, compile_fused, compile_rows

SMALL = {"absorb", "column_sums", "enter_values", "restore"}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: f"sm_{chip.capability}")
def test_fused_kernels(chip):
    compiled = list(compile_fused(chip, torch.bfloat16, variant="bias, softcap", only_first=True))
    assert {c.kernel.partition(" ")[0] for c in compiled} == set(FUSED)
    assert len(compiled) == 4  # statistics, retaining, its repair, and the gradient
    for c in compiled:
        assert not c.complaints, c
        assert c.instructions == [chip.matrix_instruction]
        assert c.blocks >= 1


def test_row_kernels():
    """On one chip: these kernels have no matrix product, and registers hardly differ between chips."""
    compiled = list(compile_rows(CHIPS[90], torch.bfloat16, 4096, variant="bias, softcap"))
    names = {c.kernel for c in compiled}
    assert names == {f"rows.{n}" for n in SMALL | {"statistics", "logit_gradient"}} | {"topk.select"}
    for c in compiled:
        assert not c.complaints, c


def test_a_spilling_configuration_is_found(monkeypatch):
    """The gate is not vacuous: a block far too large for its warps spills, and is said to."""
    from dadpo_kernels.backends import triton_tuning

    config = triton_tuning.Config(128, 256, 32, 8, 4, 2)
    monkeypatch.setattr(triton_tuning, "CONFIGS", {"gradient": {8: [config]}})
    (compiled,) = compile_fused(CHIPS[80], torch.bfloat16, variant="bias, softcap")
    assert compiled.complaints

"""Every Triton kernel compiled ahead of time for three generations of GPUs, none of which is here.

The whole table, every configuration with all inputs, is `python -m benchmarks.static_report`.
"""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import static_report
from benchmarks.machine_code import CHIPS, Chip, Compiled, readable
from benchmarks.static_report import FUSED, compile_fused, compile_rows, listed
from dadpo_kernels.backends.triton_tuning import CONFIGS, Config

SMALL = {"absorb", "column_sums", "enter_values", "restore"}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: f"sm_{chip.capability}")
def test_fused_kernels(chip):
    """The fixed choice, and one whose operands TMA copies where there is one."""
    compiled = []
    for kernel in CONFIGS:
        choices = listed(chip, kernel, torch.bfloat16, "bias, softcap")
        for config in choices[:1] + [c for c in choices if c.TMA and kernel == "gradient"][:1]:
            compiled += compile_fused(chip, torch.bfloat16, "bias, softcap", kernel, config)
    assert {c.kernel.partition(":")[0] for c in compiled} == set(FUSED)
    assert len(compiled) == 4 + (chip.capability >= 90)  # statistics, retaining, its repair, and the gradient
    for c in compiled:
        assert not c.complaints, c
        assert c.instructions[0] == chip.matrix_instruction
        assert c.blocks >= 1
    assert sum("cp.async.bulk.tensor" in c.instructions for c in compiled) == (chip.capability >= 90)


def test_row_kernels():
    """On one chip: these kernels have no matrix product, and registers hardly differ between chips."""
    compiled = list(compile_rows(CHIPS[90], torch.bfloat16, 4096, variant="bias, softcap"))
    names = {c.kernel for c in compiled}
    assert names == {f"rows.{n}" for n in SMALL | {"statistics", "logit_gradient"}} | {"topk.select"}
    for c in compiled:
        assert not c.complaints, c


def test_a_spilling_configuration_is_found():
    """The gate is not vacuous: a block far too large for its warps spills, and is said to."""
    config = Config(128, 256, 32, 8, 4, 2)
    (compiled,) = compile_fused(CHIPS[80], torch.bfloat16, "bias, softcap", "gradient", config)
    assert any("local memory" in complaint for complaint in compiled.complaints)


FINE = Compiled(
    90, "backward.logit_gradient: gradient", "bfloat16", "plain", "128x128", 128, 0, 0, 98_304, ["wgmma"], [], 2, 0.25
)  # fmt: skip


def row(**changes):
    return dataclasses.replace(FINE, **changes)


def test_complaints():
    assert row().complaints == []
    assert "2 accesses" in row(spills=2).complaints[0]
    assert "64 bytes of stack" in row(stack=64).complaints[0]
    assert "the chip has 232448" in row(shared=240_000).complaints[0]
    assert row(missing=["wgmma"]).complaints == ["no wgmma"]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "tensor_columns", "blocks"),
    [(32, 0, 4, 0, 16), (128, 96 * 1024, 8, 0, 2), (129, 96 * 1024, 8, 0, 1), (64, 110 * 1024, 8, 0, 2),
     (64, 8 * 1024, 4, 256, 2)],
)  # fmt: skip
def test_occupancy(registers, shared, warps, tensor_columns, blocks):
    """By warps, registers, shared memory or tensor memory, as the CUDA occupancy calculator has it."""
    assert Chip(90, "", 227 * 1024, 228 * 1024).blocks(registers, shared, warps, tensor_columns) == blocks


def test_markdown_shows_the_worst_and_what_must_not_be_used():
    rows = [row(), row(variant="softcap", registers=160, blocks=1, occupancy=0.125), row(chip=80, instructions=[])]
    results = {"triton": "3", "units": {"a": [dataclasses.asdict(r) for r in rows]}}
    text = static_report.markdown(results)
    assert "| 128 / 96 / 25 | 160 / 96 / 12 |  |" in text
    assert "None of the 3 spills" in text
    results["units"]["b"] = [dataclasses.asdict(row(spills=7))]
    text = static_report.markdown(results)
    assert "**1 of 4 must not be used:**" in text
    assert "7 accesses to local memory" in text


def test_an_interrupted_report_goes_on(tmp_path, monkeypatch):
    path, made = tmp_path / "static.json", []

    def unit(name, fail=False):
        def compile_unit():
            if fail:
                raise KeyboardInterrupt
            made.append(name)
            yield row(config=name)

        return compile_unit

    with pytest.raises(KeyboardInterrupt):
        static_report.run(path, {"a": unit("a"), "b": unit("b", fail=True)})
    results = static_report.run(path, {"a": unit("a"), "b": unit("b")})
    assert made == ["a", "b"]
    assert json.loads(path.read_text()) == results
    assert [r.config for r in static_report.compiled_rows(results)] == ["a", "b"]
    work = {"b": unit("b"), "sm_80, CUDA C++": unit("c")}
    assert list(static_report.run(path, work)["units"]) == list(work)
    changed = static_report.fingerprints() | {"triton": "other kernels"}
    monkeypatch.setattr(static_report, "fingerprints", lambda: changed)
    static_report.run(path, work)
    assert made == ["a", "b", "c", "b"]


def test_mangled_names():
    assert readable("_ZN5dadpo4cuda14restore_kernelI13__nv_bfloat16EEvNS0_16RetainedE") == ("cuda.restore", "bfloat16")
    assert readable("_ZN5dadpo4cuda13absorb_kernelENS0_6AbsorbE") == ("cuda.absorb", "float32")


def test_the_committed_report_covers_what_ships():
    """A configuration, and a change in a kernel, come with their compilation: `python -m benchmarks.static_report`."""
    stored = json.loads((static_report.ROOT / "benchmarks/results/static.json").read_text())
    missing = [name for name in static_report.units() if "CUDA" not in name and name not in stored["units"]]
    assert missing == []
    for language, now in static_report.fingerprints().items():  # whatever Triton's version here is
        assert stored["sources"][language].split()[-1] == now.split()[-1], f"{language}: compile its sources of today"
    assert not [str(r) for r in static_report.compiled_rows(stored) if r.complaints]

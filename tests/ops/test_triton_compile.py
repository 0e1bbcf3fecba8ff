"""Every Triton kernel compiled ahead of time for three generations of GPUs, none of which is here.

The whole table, every configuration with all inputs, is `python -m tools.static_report`.
"""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from dadpo_kernels.ops.backends.base import Coefficients, Retained, State
from dadpo_kernels.ops.backends.tuning import CONFIGS, TALL, Config
from dadpo_kernels.ops.backends.tuning import SMALL as SMALL_BLOCK
from tools import machine_code, static_report
from tools.machine_code import (
    CHIPS,
    Chip,
    Compiled,
    busy_loops,
    instructions_of,
    local_accesses,
    readable,
    serialisation,
    waits_after_each,
)
from tools.static_report import COMPILERS, CUDA, FUSED, Part, compile_fused, compile_rows, listed

SMALL = {"column_sums", "exchange"}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: f"sm_{chip.capability}")
def test_fused_kernels(chip):
    """One that takes any operands, and one whose operands TMA copies where there is one."""
    compiled = []
    for kernel in CONFIGS:
        choices = [c for c in listed(chip, kernel, torch.bfloat16, "bias, softcap") if not c.PERSISTENT]
        plain = [c for c in choices if not c.TMA][:1]
        for config in plain + [c for c in choices if c.TMA and kernel == "gradient"][:1]:
            compiled += compile_fused(chip, torch.bfloat16, "bias, softcap", kernel, config)
    assert {c.kernel for c in compiled} == {f"fused.{name}: {kernel}" for kernel, name in FUSED.items()}
    assert len(compiled) == len(CONFIGS) + (chip.capability >= 90)
    for c in compiled:
        assert not c.complaints, c
        assert c.instructions[0] == chip.matrix_instruction
        assert c.blocks >= 1
        assert c.loop_spills == 0  # so the loop was found
    assert sum("cp.async.bulk.tensor" in c.instructions for c in compiled) == (chip.capability >= 90)


def test_row_kernels():
    """On one chip: these kernels have no matrix product, and registers hardly differ between chips."""
    compiled = list(compile_rows(CHIPS[90], torch.bfloat16, 4096, variant="bias, softcap"))
    names = {c.kernel for c in compiled}
    assert names == {f"rows.{n}" for n in SMALL | {"forward", "logit_gradient"}} | {"topk.select"}
    for c in compiled:
        assert not c.complaints, c
        assert (c.loop_spills is None) == (c.kernel == "rows.exchange"), c.kernel


def test_a_width_of_one():
    """Triton makes a constant of it, in what the loop assumes too."""
    tiles = static_report.offline.problem(
        static_report.triton_.FusedTiles, torch.bfloat16, rows=16, columns=300, width=1, top_k=4
    )
    with static_report.offline.compiling(90) as compiled:
        static_report.one_pass(tiles, "forward")
    assert "fused.forward" in {name for name, _ in compiled.values()}


def test_a_configuration_that_spills_in_its_loop_is_found():
    """The gate is not vacuous: a block far too large for its warps spills there, and is said to."""
    config = Config(128, 256, 32, 8, 4, 2)
    (compiled,) = compile_fused(CHIPS[80], torch.bfloat16, "bias, softcap", "gradient", config)
    assert 0 < compiled.loop_spills < compiled.spills
    assert any("in its loop" in complaint for complaint in compiled.complaints)


def test_the_log_of_ptxas_is_read(monkeypatch):
    """Of a kernel that has just been compiled: were nothing captured, no message could be found in it."""
    logs, read = [], machine_code.ptxas_log
    monkeypatch.setattr(machine_code, "ptxas_log", lambda kernel: logs.append(read(kernel)) or logs[-1])
    (compiled,) = compile_fused(CHIPS[90], torch.bfloat16, "plain", "gradient", TALL)
    assert f"Used {compiled.registers} registers" in logs[0]


# As cuobjdump and ptxas 12.8 wrote them, with and without the assumption in `product.py`; other instructions left out.
SERIALISED = """
        /*1020*/                   IADD3 R2, R2, 0x40, RZ ;                          /* 0x0000004002027810 */
        /*1280*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*1490*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*14a0*/                   WARPGROUP.ARRIVE ;
        /*14b0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*14e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*15e0*/              @!P0 BRA 0x1020 ;                                      /* 0xfffffff800808947 */
        /*7510*/                   EXIT ;
"""
PIPELINED = """
        /*0db0*/                   STL [R1+0x8], R7 ;                                /* 0x0000080701007387 */
        /*0dc0*/                   IADD3 R2, R2, 0x40, RZ ;
        /*0e10*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7+0x18000], R3 ;
        /*0e20*/              @!P0 BRA 0x7800 ;
        /*0e30*/                   WARPGROUP.ARRIVE ;
        /*11a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24 ;
        /*1280*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*1290*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*12f0*/              @!P1 BRA 0xdc0 ;
        /*1300*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1310*/                   LDL R7, [R1+0x8] ;
        /*2940*/                   FMNMX R3, R3, R4, !PT ;
        /*54f0*/               @P1 BRA 0x2940 ;
        /*7510*/                   EXIT ;
        /*7800*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7+0x18000], R3 ;
        /*7810*/              @!P0 BRA 0x7800 ;
        /*7820*/                   BRA 0xe30 ;
"""
MESSAGE = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma "
    "instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the "
    "function 'statistics'\n"
)
OTHER_LOSS = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored\n"


def test_the_loop_is_between_a_branch_back_and_its_target():
    """Beside a product, neither the loop over entries nor the jump back from behind the exit counts."""
    code = instructions_of(PIPELINED)
    (loop,) = busy_loops(code)
    assert (loop[0][0], loop[-1][0]) == (0xDC0, 0x12F0)
    assert local_accesses(code) == 2
    assert local_accesses(loop) == 0
    (loop,) = busy_loops(instructions_of(PIPELINED.replace("IADD3", "STL")))
    assert local_accesses(loop) == 1


def test_a_jump_into_a_loop_closes_none():
    """As from behind a persistent kernel's exit, which depends on whether there is another tile."""
    text = PIPELINED.replace("                   EXIT", "               @P0 EXIT")
    assert "@P0 EXIT" in text
    (loop,) = busy_loops(instructions_of(text))
    assert (loop[0][0], loop[-1][0]) == (0xDC0, 0x12F0)


def test_a_wait_after_every_wgmma_is_found():
    assert waits_after_each(*busy_loops(instructions_of(SERIALISED)))
    assert not waits_after_each(*busy_loops(instructions_of(PIPELINED)))
    assert serialisation(OTHER_LOSS + MESSAGE)
    assert not serialisation(OTHER_LOSS)


@pytest.mark.parametrize("unit", ["HMMA.16816.F32.BF16 R4, R8, R12, R4", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]"])
def test_loops_of_other_matrix_units(unit):
    text = f"/*0010*/ MOV R1, R2 ;\n/*0020*/ {unit} ;\n/*0030*/ @P0 BRA 0x10 ;\n/*0040*/ EXIT ;"
    assert len(busy_loops(instructions_of(text))) == 1


def test_without_a_product_every_loop_counts():
    """Outermost, so that nothing is counted twice; straight code has none."""
    text = """
        /*0010*/ MOV R1, R2 ;
        /*0020*/ LDL R3, [R1] ;
        /*0030*/ STL [R1], R3 ;
        /*0040*/ @P0 BRA 0x30 ;
        /*0050*/ @P1 BRA 0x20 ;
        /*0060*/ EXIT ;
    """
    (loop,) = busy_loops(instructions_of(text))
    assert [at for at, _ in loop] == [0x20, 0x30, 0x40, 0x50]
    assert local_accesses(loop) == 2
    assert busy_loops(instructions_of(text.replace("BRA", "NOP"))) == []


FINE = Compiled(
    90, "fused.logit_gradient: gradient", "bfloat16", "plain", "128x128", registers=128, stack=0, spills=0,
    loop_spills=0, serialised=False, shared=98_304, instructions=["wgmma"], missing=[], blocks=2, occupancy=0.25,
)  # fmt: skip


def row(**changes):
    return dataclasses.replace(FINE, **changes)


def test_complaints():
    assert row().complaints == []
    assert row(spills=50, stack=64).complaints == []  # outside of the product's loop
    assert row(loop_spills=2, spills=50).complaints == ["2 accesses to local memory in its loop"]
    assert "2 accesses" in row(spills=2, loop_spills=None).complaints[0]
    assert "64 bytes of stack" in row(stack=64, loop_spills=None).complaints[0]
    assert "serialised" in row(serialised=True).complaints[0]
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


def part(*rows, source="same"):
    return {"source": source, "units": {"a": [dataclasses.asdict(r) for r in rows]}}


def test_markdown_shows_the_worst_of_each_compiler_and_what_must_not_be_used():
    old = part(row(), row(variant="softcap", registers=160, blocks=1, occupancy=0.125), row(chip=80, instructions=[]))
    results = {"Triton 3.6.0": old, "Triton 3.9.0": part(row(spills=7, registers=255))}
    text = static_report.report(results)
    assert "Compiled with Triton 3.6.0 and Triton 3.9.0 " in text
    assert "| sm_80, 3.6.0 | sm_80, 3.9.0 | sm_90, 3.6.0 | sm_90, 3.9.0 | sm_100, 3.6.0 | sm_100, 3.9.0 |" in text
    assert "| 128 / 96 / 25 |  | 160 / 96 / 12 | 255 / 96 / 25 / 7 |  |  |" in text
    assert "None of the 4 accesses local memory" in text
    results[CUDA] = part(row(kernel="cuda.topk", spills=9, loop_spills=None))
    text = static_report.report(results)
    assert "**1 of 5 must not be used:**" in text
    assert "- CUDA C++: sm_90 cuda.topk bfloat16, plain, 128x128: 9 accesses to local memory" in text


def unit(made, name, fail=False):
    def compile_unit():
        if fail:
            raise KeyboardInterrupt
        made.append(name)
        yield row(config=name)

    return {name: compile_unit}


def test_an_interrupted_report_goes_on(tmp_path):
    path, made = tmp_path / "static.json", []
    with pytest.raises(KeyboardInterrupt):
        static_report.run(path, {"Triton 1": Part("now", unit(made, "a") | unit(made, "b", fail=True))})
    work = {"Triton 1": Part("now", unit(made, "a") | unit(made, "b"))}
    results = static_report.run(path, work)
    assert made == ["a", "b"]
    assert json.loads(path.read_text()) == results
    assert [r.config for r in static_report.compiled_rows(results["Triton 1"])] == ["a", "b"]
    fewer = static_report.run(path, {"Triton 1": Part("now", unit(made, "b"))})
    assert made == ["a", "b"]
    assert list(fewer["Triton 1"]["units"]) == ["b"]
    assert json.loads(path.read_text()) == fewer


def test_a_run_replaces_its_own_parts_alone(tmp_path):
    """What another Triton gave, and the extension where nvcc is not, stay with the sources that they were made of."""
    path, made = tmp_path / "static.json", []
    before = {"Triton 1": Part("old", unit(made, "a")), CUDA: Part("old", unit(made, "c"))}
    old = static_report.run(path, before)
    results = static_report.run(path, {"Triton 2": Part("now", unit(made, "a"))})
    assert {name: results[name] for name in before} == old
    assert results["Triton 2"]["source"] == "now"
    results = static_report.run(path, {"Triton 1": Part("now", unit(made, "a"))})
    assert made == ["a", "c", "a", "a"]
    assert [(name, part["source"]) for name, part in results.items()] == [
        ("Triton 1", "now"), (CUDA, "old"), ("Triton 2", "now"),
    ]  # fmt: skip


@pytest.mark.parametrize("architectures", [{}, {90: "sm_90a"}, {c: f"sm_{c}" for c in CHIPS}])
def test_an_extension_that_lacks_a_chip_makes_no_part(monkeypatch, tmp_path, architectures):
    (tmp_path / "_cuda.so").touch()
    extension = type("Module", (), {"__file__": str(tmp_path / "_cuda.so")})
    monkeypatch.setattr(static_report.cuda, "_cuda", extension)
    monkeypatch.setattr(static_report, "architectures", lambda module: architectures)
    assert (CUDA in static_report.parts()) == (len(architectures) == len(CHIPS))
    monkeypatch.setattr(static_report.cuda, "_cuda", None)
    assert CUDA not in static_report.parts()


def test_mangled_names():
    prefix = "_ZN5dadpo4cuda"
    assert readable(f"{prefix}14forward_kernelI13__nv_bfloat16Li2EEEvNS0_7ForwardE") == ("cuda.forward", "bfloat16", 2)
    assert readable(f"{prefix}15exchange_kernelIfEEvNS0_8ExchangeE") == ("cuda.exchange", "float32", 1)
    assert readable(f"{prefix}11topk_kernelILi4EEEvNS0_4TopKE") == ("cuda.topk", "float32", 4)
    assert readable(f"{prefix}13column_kernelENS0_6ColumnE") == ("cuda.column", "float32", 1)


PYTHON = 'def f(x):\n    """Says."""\n    # why\n    return g(x, "a # b")\n'
CPP = '/* a\n   b */\nint f() {  // why\n    return g("// no comment");\n}\n'


@pytest.mark.parametrize(
    ("bare", "source", "same", "other"),
    [
        (static_report.without_words, PYTHON, 'def f(x): return g(x,\n  "a # b")', PYTHON.replace("# b", "# c")),
        (static_report.without_words, "x = None", "x = (None)  # why", "x = 0"),
        (static_report.without_words, "f(a, b)", "f(a,\n  b)", "f(b, a)"),
        (static_report.without_comments, CPP, 'int f() {\n  return g("// no comment");\n}', CPP.replace("no c", "c")),
        (static_report.without_comments, "a / b", "a /  b // c", "a // b"),
    ],
)
def test_words_beside_the_code_do_not_age_a_report(bare, source, same, other):
    assert bare(source) == bare(same)
    assert bare(source) != bare(other)


@pytest.fixture(scope="module")
def committed():
    return json.loads((static_report.COMMITTED).read_text())


def test_the_committed_report_covers_what_ships(committed):
    """A configuration, and a change in a kernel, come with their compilation: `python -m tools.static_report`."""
    ships = static_report.triton_part()
    assert set(committed) == {CUDA, *(f"Triton {version}" for version in COMPILERS)}
    for version in COMPILERS:
        stored = committed[f"Triton {version}"]
        assert stored["source"] == ships.source, f"Triton {version}: compile the sources of today"
        assert stored["units"].keys() == ships.units.keys(), f"Triton {version}"
    assert committed[CUDA]["units"].keys() == {f"sm_{capability}" for capability in CHIPS}
    assert all(rows for stored in committed.values() for rows in stored["units"].values())
    assert static_report.complaints(committed) == []


def test_the_committed_report_is_of_the_extension_of_today(committed):
    if CUDA not in static_report.parts():
        pytest.skip("the extension has no kernels for all three chips here: nvcc builds them")
    assert committed[CUDA]["source"] == static_report.fingerprint("cuda"), "read the extension of today"


def test_shared_memory_is_what_the_configurations_say(committed):
    """At most: `candidates` cuts its lists by it."""
    configs = {str(c): c for chips in CONFIGS.values() for choices in chips.values() for c in choices}
    configs[str(SMALL_BLOCK)] = SMALL_BLOCK
    fused = [
        r for version in COMPILERS for r in static_report.compiled_rows(committed[f"Triton {version}"])
        if r.kernel.startswith(("fused.", "hopper."))
    ]  # fmt: skip
    assert fused
    for r in fused:
        assert r.shared <= configs[r.config].shared(r.kernel.rpartition(" ")[2], getattr(torch, r.dtype)), str(r)


def test_row_kernels_store_16_bytes_at_a_time():
    """What is retained behind other columns, and the gradient: Triton must see that they are aligned."""
    tiles = static_report.problem(static_report.triton_.TritonTiles, torch.bfloat16, 4096, "plain")
    rows = len(tiles.hidden)
    state = State.new(rows, tiles.entries.ids.shape[1], tiles.hidden)
    retained = Retained(tiles.hidden.new_zeros(rows, 8192), torch.zeros(rows))
    with static_report.offline.compiling(90) as compiled:
        tiles.forward(0, 4096, state, retained)
        tiles.logit_gradient(0, 4096, Coefficients(state.max, state.max, state.selected))
    ptx = {name: kernel.asm["ptx"] for name, kernel in compiled.values()}
    assert ptx.keys() == {"rows.forward", "rows.logit_gradient"}
    for name, text in ptx.items():
        assert "st.global.v4.b32" in text, name

"""Rows survive their file, tables and pages show them, and the comparison makes them."""

import json

import pytest
from safetensors.torch import load_file

from benchmarks import compare, comparison, rows, run
from benchmarks.cases import load_inputs, peaked_head, save_inputs, with_teacher
from benchmarks.floor import measure_floor
from benchmarks.measure import measure
from benchmarks.process import child
from benchmarks.rows import Rows, measured

HERE = {
    "cpu": "a processor", "cpu_capability": "AVX2", "threads": 2, "memory_gib": 8, "python": "3", "platform": "",
    "versions": {"torch": "2"}, "commit": "one", "date": "today",
}  # fmt: skip
THERE = HERE | {"commit": "two", "threads": 1}


@pytest.fixture
def some():
    measured_here = measured("a", HERE, {"tokens": 1024})
    measured_here += measured("a", HERE, {"time, s": [3.0, 1.0, 2.0], "peak, MiB": None}, plan="x", dtype="float32")
    return Rows(measured_here + measured("a", THERE, {"time, s": [[4.0], [6.0]]}, plan="y"))


def test_a_file_keeps_rows_and_replaces_those_that_are_measured_again(some, tmp_path):
    path = tmp_path / "rows.json"
    rows.save(path, some)
    assert rows.load(path) == some
    assert len(json.loads(path.read_text())["environments"]) == 2
    rows.save(path, measured("a", THERE, {"time, s": [9.0]}, dtype="float32", plan="x"))
    loaded = rows.load(tmp_path)
    assert len(loaded) == len(some)
    assert (loaded[1].value, loaded[1].environment) == ([9.0], THERE)
    (tmp_path / "gpu-h100-first.json").write_text("no rows")
    assert rows.load(tmp_path) == loaded


def test_tables_choose_what_makes_lines_and_columns(some):
    assert some.get("tokens", plan=None) == 1024
    assert some.get("time", plan="z") is None
    with pytest.raises(ValueError, match="2 values: say more"):
        some.get("time")
    columns = [("plan", rows.of("plan")), ("s", rows.show("time", ".1f")), ("best", rows.show("time", ".0f", min))]
    columns.append(("peak", rows.show("peak", ".0f")))
    table = rows.table(some.where(plan="x"), ["plan", "dtype"], columns)
    assert table == "| plan | s | best | peak |\n| --- | ---: | ---: | ---: |\n| x | 2.0 | 1 | – |"
    assert "| y | 5.0 |" in rows.table(some, ["plan"], columns[:2])
    assert rows.caption(some, "run") == (
        "Measured on a processor (AVX2), 2 threads, 8 GiB; Python 3, torch 2; today, commit one; a processor (AVX2), "
        "1 thread, 8 GiB; Python 3, torch 2; today, commit two; `python -m benchmarks.run`."
    )


def test_pages_are_filled_between_their_markers():
    page = "above\n<!-- table a -->\nold\n<!-- /table -->\n<!-- table b-c -->\n<!-- /table -->\nbelow\n"
    full = rows.fill(page, str.upper)
    assert full == page.replace("old\n", "A\n").replace("b-c -->\n", "b-c -->\nB-C\n")
    assert rows.fill(full, str.upper) == full
    for broken in ("<!-- table a -->\n", page + "<!-- /table -->", page.replace("<!-- /table -->", "", 1)):
        with pytest.raises(ValueError, match="both its markers"):
            rows.fill(broken, str.upper)


def test_two_files_are_compared(some, tmp_path, monkeypatch, capsys):
    rows.save(tmp_path / "a.json", some)
    rows.save(tmp_path / "b.json", measured("a", HERE, {"time, s": 5.0, "tokens": 4}, plan="y"))
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    compare.main()
    assert capsys.readouterr().out == "y time: 5 -> 5 s (1.00x)\n"


def in_process(inputs, variant, threads, calls, *options):
    """In the place of a process of its own."""
    given = dict(zip(options[::2], options[1::2], strict=True))
    read = load_inputs(inputs)
    if variant == "floor":
        return measure_floor(read.hidden.flatten(0, 1)[read.valid], read.weight, calls)
    exact = load_file(given["--exact"]) if "--exact" in given else None
    floor = json.loads(given["--floor"]) if "--floor" in given else None
    return measure(variant, given["--objective"], read, calls, exact, floor)


@pytest.mark.usefixtures("one_thread")
def test_the_comparison_makes_rows_and_tables(tmp_path, monkeypatch):
    """Really measured, if not each in a process of its own but for the floor."""
    inputs = with_teacher(*peaked_head(4 * 24, hidden_size=32, vocab_size=301), top_k=8)
    save_inputs(inputs, tmp_path / "inputs.safetensors")
    assert child(tmp_path / "inputs.safetensors", "floor", 1, 1).keys() == {"logits", "dhidden", "dweight"}
    monkeypatch.setattr(run, "child", in_process)

    problem = {"head": "smollm2", "dtype": "float32", "floor": "float32", "tokens": run.TOKENS}
    first = run.compare(inputs, ["recompute", "torch-lce"], 2, 1, 1, problem)

    def also(**changes):
        return Rows(row._replace(variant=row.variant | changes) for row in first)

    emulated, longer = also(dtype="bfloat16"), also(tokens=8192)
    assert first.get("valid_tokens", plan=None) == 48
    assert len(first.get("time", plan="recompute", loss="dpo")) == 2
    assert first.get("weight_grad_error", plan="recompute", loss="dpo") < 1e-4
    text = comparison.comparison(Rows(first + emulated + longer))
    assert text.count("| --- |") == 2
    assert "on a processor without bfloat16 products" in text
    assert f" | {first.get('ratio', plan='recompute', loss='dpo+kl'):.2f} |" in text
    assert text.count("(CE: ") == 2
    assert "8,192" in comparison.lengths(Rows(first + longer))


def test_a_call_is_compared_with_the_floor_around_it():
    assert run.ratios({"seconds": [3.0, 3.0], "floor_seconds": [1.0, 2.0, 4.0]}) == [2.0, 1.0]

"""The report says what the results say: fits, tables, and that what is committed is not stale."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import phases, run, scaling, style
from benchmarks.cases import load_inputs, peaked_head, save_inputs, with_teacher
from benchmarks.gpu_suite import tables as gpu_tables
from benchmarks.measure import measure
from benchmarks.oracle import float64_gradients
from benchmarks.process import child
from benchmarks.report import __main__ as command
from benchmarks.report import comparison, document, parts, studies
from benchmarks.report import scaling as fitted
from benchmarks.variants import VARIANTS

ROOT = Path(__file__).parents[2]
REPORT, RESULTS = ROOT / "benchmarks" / "REPORT.md", ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def committed():
    return document.read_results(RESULTS)


def test_the_committed_report_is_what_the_results_generate(committed):
    again = "stale: run `python -m benchmarks.report`"
    assert document.markdown(committed) == REPORT.read_text(), again
    readme = (ROOT / "README.md").read_text()
    assert document.readme(readme, committed) == readme, again
    plots = document.plots(committed)
    for plot in plots:
        assert style.stored_digest(RESULTS / plot.name) == style.digest(plot.data), again
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", REPORT.read_text())
    assert {f"results/{plot.name}" for plot in plots} <= set(images)
    assert all((REPORT.parent / image).exists() for image in images)


def test_what_is_missing_is_said_to_be():
    text = document.markdown({})
    assert text.count("Not measured yet") == len(document.PARTS)
    assert document.plots({}) == []


def test_fits_find_exponent_and_slope():
    points = [{"n": n, "seconds": [3 * n**1.25, 9 * n], "peak_mib": 7 + 2 * n, "gradient_mib": 7} for n in (1, 4, 64)]
    power, off = fitted.exponent(points, "n")
    assert power == pytest.approx(1.25)
    assert off == pytest.approx(0, abs=1e-12)
    assert fitted.slope(points, "n", fitted.beside_gradients) == pytest.approx(2)
    points[1]["seconds"] = [1.5 * points[1]["seconds"][0]]
    assert 0.2 < fitted.exponent(points, "n")[1] < 0.5


@pytest.fixture(scope="module")
def sweeps():
    """Every sweep in small, really measured, if not each point in a process of its own: `{name: section}`."""

    def here(inputs, variant, threads, calls, option, objective):
        assert option == "--objective"
        return measure(variant, objective, load_inputs(inputs), calls)

    tiny = scaling.Shape(tokens=64, vocab_size=4_096, top_k=4)
    small = {
        "tokens": scaling.Sweep((tiny, tiny._replace(tokens=128)), ("recompute",)),
        "top_k": scaling.Sweep((tiny._replace(top_k=0), tiny), ("recompute",)),
        "masked": scaling.Sweep((tiny._replace(masked=0.75),), ("dense",)),
        "budget": scaling.Sweep((tiny,), ("budget=65536",)),
        "frozen": scaling.Sweep((tiny,), ("retain", "retain,frozen")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "SWEEPS", small)
        patch.setattr(scaling, "child", here)
        patch.setattr(scaling, "CALLS_UP_TO", 64 * 4_096)
        section = {"environment": run.environment(1), "hidden_size": scaling.HIDDEN_SIZE}
        made = {name: section | {"points": list(scaling.new_points(name, 1, []))} for name in small}
        assert not list(scaling.new_points("frozen", 1, made["frozen"]["points"]))  # nothing is measured twice
    return json.loads(json.dumps(made))


def test_sweeps_measure_what_they_say(sweeps):
    first, big = sweeps["tokens"]["points"]
    assert (first["tokens"], first["valid_tokens"], first["vocab_size"], first["top_k"]) == (64, 64, 4_096, 4)
    assert (len(first["seconds"]), len(big["seconds"])) == (2, 1)  # a big problem is called once
    assert first["units"] == 4
    assert first["logits_mib"] == 64 * 4_096 * 4 / 2**20
    assert first["gradient_mib"] == (64 + 4_096) * 256 * 4 / 2**20
    assert sweeps["masked"]["points"][0]["valid_tokens"] == 16
    assert sweeps["masked"]["points"][0]["units"] is None
    trained, frozen = sweeps["frozen"]["points"]
    assert (trained["units"], frozen["units"]) == (3, 2)
    assert frozen["gradient_mib"] == 64 * 256 * 4 / 2**20


def test_the_sweeps_reach_the_issues_ranges():
    found = {name: sweep.shapes for name, sweep in scaling.SWEEPS.items()}
    for name, axis, least, most in (
        ("tokens", "tokens", 1_024, 65_536),
        ("vocabulary", "vocab_size", 32_768, 262_144),
        ("top_k", "top_k", 0, 256),
        ("masked", "masked", 0, 7 / 8),
    ):
        values = [getattr(shape, axis) for shape in found[name]]
        assert (min(values), max(values)) == (least, most)
    units = [
        scaling.estimate(scaling.SWEEPS["budget"].shapes[0], scaling.find_variant(name)).plan.units
        for name in scaling.SWEEPS["budget"].variants
    ]
    assert units == sorted(units, reverse=True)
    assert (units[0], units[-1]) == (4, 3)


def test_the_reports_scaling_part_holds_the_points(sweeps, tmp_path):
    text = fitted.markdown(sweeps)
    point = sweeps["tokens"]["points"][0]
    assert f"| 64 | 1 | {min(point['seconds']):.2f} |" in text
    assert f"commit {sweeps['tokens']['environment']['commit']}" in text
    assert "--scaling frozen --out" in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1  # a rectangle
    for plot in fitted.plots(sweeps):
        style.save(plot.draw(plot.data), tmp_path / plot.name, plot.source, style.digest(plot.data))
        assert style.stored_digest(tmp_path / plot.name) == style.digest(plot.data)


def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    here, made = {"commit": "abc", "date": "today"}, []

    def two_points(name, threads, known):
        for number in range(len(known), 2):
            made.append((name, number))
            yield {"number": number}
            if len(made) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(run, "environment", lambda threads: dict(here))
    monkeypatch.setattr(run, "new_points", two_points)
    out = tmp_path / "cpu.json"
    monkeypatch.setattr("sys.argv", ["run", "--out", str(out), "--scaling"])
    with pytest.raises(KeyboardInterrupt):
        run.main()
    here["date"] = "tomorrow"
    run.main()
    assert made == [(name, number) for name in scaling.SWEEPS for number in (0, 1)]
    assert json.loads(out.read_text())["scaling"]["frozen"]["points"] == [{"number": 0}, {"number": 1}]
    run.main()
    assert len(made) == 2 * len(scaling.SWEEPS)  # all of it was there
    here["commit"] = "abc-dirty"  # whatever that is
    run.main()
    assert len(made) == 4 * len(scaling.SWEEPS)


@pytest.fixture(scope="module")
def results(tmp_path_factory, sweeps):
    """A results file as `benchmarks.run` writes it, from two variants really measured."""
    hidden, weight, labels = peaked_head(4 * 24, hidden_size=32, vocab_size=301)
    inputs = with_teacher(hidden, weight, labels, top_k=8)
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    save_inputs(inputs, path)
    floor = child(path, "floor", 1, 1)
    arrangements = {product: best["arrangement"] for product, best in floor.items()}
    dense = child(path, "dense", 1, 2, "--objective", "dpo+kl", "--floor", json.dumps(arrangements))
    assert (len(dense["seconds"]), len(dense["floor_seconds"])) == (2, 3)
    assert dense["first_seconds"] > 0
    assert dense["peak_mib"] >= 0
    rows = []
    for name in ("recompute", "torch-lce"):
        for objective in VARIANTS[name].objectives:
            measured = measure(name, objective, inputs, 1, float64_gradients(inputs, objective), arrangements)
            rows.append(run.row(name, objective, inputs, [measured]))
    section = run.describe("smollm2", "float32", inputs, threads=1)
    section |= {"floor": floor, "floor_seconds": dense["floor_seconds"][0], "rows": rows}
    lengths = {f"smollm2/float32/{tokens}": section | {"tokens": tokens} for tokens in (8_192, 512)}
    return json.loads(json.dumps({"comparison": {"smollm2/float32": section}, "lengths": lengths, "scaling": sweeps}))


def test_one_command_rewrites_the_table_and_writes_report_and_plots(results, tmp_path, monkeypatch):
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    readme, report = tmp_path / "README.md", tmp_path / "REPORT.md"
    markers = (comparison.BEGIN, comparison.END, gpu_tables.BEGIN, gpu_tables.END)
    readme.write_text("above\n{}\nold table\n{}\nbelow\n{}\n{}\n".format(*markers))
    arguments = ["report", str(tmp_path / "cpu.json"), "--readme", str(readme), "--report", str(report)]
    monkeypatch.setattr("sys.argv", arguments)
    for _ in range(2):  # the second time over its own output
        command.main()
    text = readme.read_text()
    assert text.startswith(f"above\n{comparison.BEGIN}\n")
    text, gpus = text.split(f"{comparison.END}\nbelow\n")
    assert gpus == f"{gpu_tables.BEGIN}\n{gpu_tables.readme([])}\n{gpu_tables.END}\n"
    assert "old table" not in text
    line = next(line for line in text.splitlines() if "recompute" in line)
    ratio = next(r["ratio"] for r in results["comparison"]["smollm2/float32"]["rows"] if r["objective"] == "dpo+kl")
    assert f"| {ratio:.2f} |" in line
    assert line in report.read_text()
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1  # a rectangle
    assert text.count("(CE: ") == 1
    section = results["lengths"]["smollm2/float32/512"]
    row = next(r for r in section["rows"] if (r["variant"], r["objective"]) == ("recompute", "dpo+kl"))
    beside = f"{row['peak_mib'][0] - section['gradient_mib']:,.0f}"
    ends = [f"| {tokens} | {section['valid_tokens']} | {ratio:.2f} | {beside} |" for tokens in ("512", "8,192")]
    of_it = f"| {row['label']} | DPO + KL |"
    found = [line for line in report.read_text().splitlines() if of_it in line and line.endswith(tuple(ends))]
    assert [line.endswith(end) for line, end in zip(found, ends, strict=True)] == [True, True]  # short ones first
    for name in ("cpu.png", "scaling.png", "options.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report_needs_markers_and_one_machine(results, tmp_path, monkeypatch):
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("no markers")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "cpu.json"), "--readme", str(tmp_path / "README.md")])
    with pytest.raises(ValueError, match="needs one <!-- benchmark:cpu -->"):
        command.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "cpu.json"]

    section = results["comparison"]["smollm2/float32"]
    emulated = section | {"dtype": "bfloat16"}
    elsewhere = emulated | {"floor_dtype": "bfloat16", "environment": section["environment"] | {"threads": 64}}
    here, there = comparison.tables({"smollm2/float32": section, "smollm2/bfloat16": elsewhere}).splitlines()[-3::2]
    assert "in float32: " in here
    assert "in bfloat16: " in there
    assert "64 threads" in there
    together, apart = (
        comparison.tables({"smollm2/float32": section, "other": other}) for other in (elsewhere, emulated)
    )
    assert together.count("| --- |") == 1
    assert "without" not in together
    assert apart.count("| --- |") == 2
    assert "on a processor without bfloat16 products" in apart
    with pytest.raises(ValueError, match="no comparison section"):
        comparison.tables({})


def test_sections_go_by_the_number_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "make_inputs", lambda case, dtype, tokens: tokens)
    monkeypatch.setattr(
        run, "describe", lambda case, dtype, tokens, threads: {"floor_dtype": "float32", "tokens": tokens}
    )
    monkeypatch.setattr(run, "compare", lambda *_: {})
    out = tmp_path / "cpu.json"
    for options in (["float32"], ["float32", "--tokens", "512"], ["bfloat16"]):
        arguments = ["run", "--case", "smollm2", "--out", str(out), "--dtype", *options]
        monkeypatch.setattr("sys.argv", arguments)
        run.main()
    section = {"floor_dtype": "float32", "tokens": run.TOKENS}
    assert json.loads(out.read_text()) == {
        "comparison": {f"smollm2/{name}": section for name in ("float32", "bfloat16 emulated")},
        "lengths": {"smollm2/float32/512": section | {"tokens": 512}},
    }


def test_phases_are_measured_and_reported(tmp_path, monkeypatch):
    inputs = with_teacher(*peaked_head(4 * 24, hidden_size=32, vocab_size=301), top_k=8)
    monkeypatch.setattr(phases, "make_inputs", lambda *_: inputs)
    out = tmp_path / "phases.json"
    monkeypatch.setattr("sys.argv", ["phases", "--rounds", "2", "--out", str(out)])
    phases.main()
    measured = json.loads(out.read_text())
    assert measured["tokens"] == 48
    assert {len(times) for plan in measured["plans"].values() for times in plan.values()} == {2}
    assert measured["product_flops"] == 2 * 48 * 301 * 32
    assert len(measured["fma_peak"]) == 2
    assert min(measured["fma_peak"]) > 1e8  # operations per second, not billions of them
    seconds = {"forward": [1.0, 2.0], "backward": [2.0, 4.0], "fresh": [4.0, 8.0], "step": [5.0, 10.0]}
    known = {"floor": [1.0, 2.0], "fma_peak": [2e9, 4e9], "product_flops": 1e9, "plans": {"retain": seconds}}
    text = studies.phases(measured | known)
    assert "| PyTorch's products | 3 | – | – | 1.00 | 0.75 | – | – |" in text
    assert "| retain | 3 | 1.00 | 2.00 | 3.00 | 0.25 | 4.00 | 5.00 |" in text
    assert "4 GFLOP/s at most" in text
    assert "four products alone would take 1.00 of the fastest floor and three 0.75" in text


def test_a_source_names_every_commit_and_machine(results):
    here = results["comparison"]["smollm2/float32"]["environment"]
    line = parts.source([here | {"commit": "one"}, here | {"commit": "two"}, here | {"threads": 64}], "measure it")
    assert "commit one, two;" in line
    assert "64 threads" in line
    assert line.endswith("; measure it")

"""Every study runs on a tiny problem and makes the rows that its tables are of."""

from pathlib import Path

import pytest
import torch

from benchmarks.cases import peaked_head, with_teacher
from benchmarks.rows import Rows, load, measured, save
from benchmarks.studies import capture, live_cost, live_training, phases, scaling, trl_step
from benchmarks.studies.recovery import experiment, measures
from benchmarks.studies.recovery import report as recovery
from benchmarks.studies.recovery.settings import METHODS, SETTINGS, Point
from tests.benchmarks.test_rows import HERE, in_process
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def inputs():
    return with_teacher(*peaked_head(4 * 24, hidden_size=32, vocab_size=301), top_k=8)


def stored(rows: Rows, directory: Path) -> Rows:
    save(directory / "rows.json", rows)
    return load(directory / "rows.json")


def test_scaling(tmp_path, monkeypatch):
    tiny = scaling.Shape(tokens=64, vocabulary=4_096, top_k=4)
    plans = ("recompute", "dense")
    for sweep, shapes, of in (
        ("tokens", (tiny, tiny._replace(tokens=128)), plans),
        ("vocabulary", (tiny, tiny._replace(vocabulary=2_048)), plans),
        ("top_k", (tiny._replace(top_k=0), tiny), plans),
        ("masked", (tiny._replace(masked=0.75),), plans),
        ("budget", (tiny,), ("budget=0", "budget=65536")),
        ("frozen", (tiny,), ("recompute", "recompute,frozen")),
    ):
        monkeypatch.setitem(scaling.SWEEPS, sweep, scaling.Sweep(shapes, of))
    monkeypatch.setattr(scaling, "child", in_process)
    monkeypatch.setattr(scaling, "CALLS_UP_TO", 64 * 4_096)
    rows = stored(
        Rows(row for sweep in scaling.SWEEPS for point in scaling.points(sweep, 1) for row in point), tmp_path
    )
    big = rows.where(sweep="tokens", tokens=128, plan="recompute")
    assert (len(big.get("time")), big.get("products")) == (1, 4)
    assert rows.get("products", sweep="frozen", plan="recompute,frozen") == 3
    assert rows.get("valid_tokens", sweep="masked", plan="dense") == 16
    assert scaling.power([1, 4, 64], [3 * n**1.25 for n in (1, 4, 64)]) == pytest.approx((1.25, 0))
    assert all(text(rows) for text in scaling.TABLES.values())
    assert all(draw(rows) for draw in scaling.PLOTS.values())


def test_phases(inputs, tmp_path):
    rows = stored(phases.study(inputs, 2, 1), tmp_path)
    assert len(rows.get("time", plan="retain", part="step")) == 2
    assert min(rows.get("fma_peak")) > 1e8  # operations per second, not billions of them
    assert "| retain | 3 |" in phases.phases(rows)


def test_live_cost(inputs, tmp_path):
    rows = stored(live_cost.study(inputs, 1, 1), tmp_path)
    assert "| live, chunks of 512 | 0.001 |" in live_cost.live_cost(rows)
    assert live_cost.draw(rows)


def test_live_training():
    data = torch.randint(64, (8, 9), generator=torch.Generator().manual_seed(0))
    runs = {
        live_training.name(tolerance): [
            live_training.cross_entropy(64, data, data, seed, 2, tolerance)[1] for seed in range(2)
        ]
        for tolerance in (None, 1e-2)
    }
    rows = live_training.collect("cross_entropy", runs, HERE)
    text = live_training.live_training(rows)
    assert "| cross entropy, 2 steps, 2 seeds | exact | live 0.01 |" in text
    assert "| matrix products | – |" in text


def test_capture(inputs, monkeypatch):
    labels = torch.zeros(96, dtype=torch.int64)
    monkeypatch.setattr(capture, "smollm2_hidden", lambda *_: (inputs.hidden.flatten(0, 1), inputs.weight, labels))
    rows = capture.head([32, 64], "float32", HERE)
    text = capture.capture(rows)
    assert "| 64 | float32 |" in text


def test_trl_step():
    metrics = {name: [[8.0, 2.0], [1.0, 3.0]] for name in trl_step.MEASURED}
    rows = measured("trl_step", HERE, dict.fromkeys(trl_step.BATCH, 4)) + measured(
        "trl_step", HERE, metrics, trainer="ours"
    )
    text = trl_step.trl_step(Rows(rows))
    assert "| ours | 2.5 s (1.0 to 8.0) | 2.5 s (1.0 to 8.0) | 2 MiB (1 to 8) |" in text
    assert "2 processes with 2 steps each" in text


def test_recovery():
    """The measures on real tokens, then the tables of a made-up result."""
    tokenizer, teacher, records = tiny_tokenizer(), tiny_llama(), chat_records(3)
    prompts, answers = [r["prompt"] for r in records], [r["chosen"][0]["content"] for r in records]
    means, lengths = measures.likelihood(teacher, tokenizer, prompts, answers)
    assert (means < 0).all()
    assert (lengths > 0).all()
    assert measures.preference_rate(means - 1, means) == -1
    assert measures.texture(["a b c d a b c d a b c d"])["repetition"] == pytest.approx(5 / 9)

    def run(method, point, seed, **figures):
        seconds = {"training_seconds": 36.0, "measuring_seconds": 9.0}
        return {"method": method, "point": point._asdict(), "seed": seed, "figures": figures} | seconds

    names = [name for name, *_ in recovery.COLUMNS]
    final = [
        run(method, Point(1e-4), seed, **dict.fromkeys(names, i + seed / 8))
        for i, method in enumerate([*recovery.FIXED, *METHODS]) for seed in range(3)
    ]  # fmt: skip
    tuning = [
        run(method, point, 0, kl=1.0 + i, reverse_kl=1.0)
        for method in METHODS for i, point in enumerate(METHODS[method].grid)
    ]  # fmt: skip
    assert experiment.best(tuning[:4]) == METHODS["sft"].grid[0]
    rows = measured("recovery", HERE, {"setting": "cpu", **vars(SETTINGS["cpu"])})
    rows += experiment.rows_of("tuning", tuning, HERE) + experiment.rows_of("final", final, HERE)
    text = recovery.recovery(Rows(rows))
    assert "**1e-05, 0.1: 2.000**" in text
    line = next(line for line in text.splitlines() if line.startswith("| daDPO minus dDPO"))
    # Paired by seed, daDPO is exactly 2 above dDPO: certain, better where more is better and worse where less is.
    assert (line.count("**+**"), line.count("**-**")) == (3, 3)
    assert recovery.draw(Rows(rows))

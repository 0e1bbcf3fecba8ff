"""The restore experiment: its measures against plain arithmetic, its choice of points, its report."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import style
from benchmarks.restore import measures, report
from benchmarks.restore.experiment import Run, best, measured
from benchmarks.restore.settings import METHODS, SETTINGS, TUNING_SEED, Point
from benchmarks.restore.stages import Stage
from dadpo_kernels.capture.pairs import tokenize_pairs
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_likelihood_is_the_mean_over_an_answers_tokens():
    tokenizer, teacher, records = tiny_tokenizer(), tiny_llama(), chat_records(5)
    prompts, answers = [r["prompt"] for r in records], [r["chosen"][0]["content"] for r in records]
    means, lengths = measures.likelihood(teacher, tokenizer, prompts, answers)
    teacher.double()
    for i, pair in enumerate(tokenize_pairs(records, tokenizer).pairs):
        prompt, answer = pair.prompt_ids.tolist(), torch.tensor(pair.chosen_ids).long()
        logps = teacher(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert means[i].item() == pytest.approx(logps.gather(1, answer[:, None]).mean().item(), rel=1e-5)
        assert lengths[i] == len(answer)


def test_preference_rate_counts_wins_minus_losses():
    own = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    assert measures.preference_rate(torch.tensor([-0.5, -2.0, -2.0, -1.0]), own) == -0.25


def test_texture_sees_repetition():
    same = measures.texture(["a b c d a b c d a b c d"])
    varied = measures.texture(["the quick brown fox jumps over a lazy dog"])
    assert same["repetition"] == pytest.approx(5 / 9)  # nine 4-grams, four of them new
    assert varied["repetition"] == 0
    assert varied["distinct_2"] == 1 > same["distinct_2"] == pytest.approx(4 / 11)
    assert measures.texture(["", "one"])["repetition"] == 0


def test_the_point_with_the_smallest_divergence_both_ways_is_chosen():
    tried = [
        {"point": p._asdict(), "figures": {"kl": kl, "reverse_kl": reverse}}
        for p, kl, reverse in ((Point(1.0, 2.0), 0.1, 0.9), (Point(3.0, 4.0), 0.4, 0.5), (Point(5.0, 6.0), 0.9, 0.2))
    ]
    assert best(tried) == Point(3.0, 4.0)


def test_every_method_is_tuned_over_as_many_points():
    assert {len(m.grid) for m in METHODS.values()} == {4}
    options = METHODS["dadpo"].options(Point(1e-4, 0.1))
    assert options["beta_ref"] == options["beta_teacher"] == 0.05
    assert METHODS["ddpo"].options(Point(1e-4, 0.1))["beta_teacher"] == 0


def test_a_run_that_is_done_is_read_and_not_repeated(tmp_path):
    stage = Stage(tmp_path, SETTINGS["smoke"])
    stage.runs.mkdir()
    run = Run("dadpo", Point(1e-4, 0.1), TUNING_SEED)
    (stage.runs / f"{run.name}.json").write_text(json.dumps({"figures": {"kl": 0.5}}))
    assert measured(run, stage=stage, threads=torch.get_num_threads()) == {"figures": {"kl": 0.5}}


def made_up(seeds: int = 3) -> dict:
    names = [name for name, *_ in report.COLUMNS]
    runs = [
        {"method": m, "point": Point(1e-4)._asdict(), "seed": s, "training_seconds": 36.0, "measuring_seconds": 9.0,
         "figures": dict.fromkeys(names, i + s / 8)}
        for i, m in enumerate([*report.FIXED, *METHODS]) for s in range(seeds)
    ]  # fmt: skip
    tuning = [
        {"method": m, "point": p._asdict(), "seed": 0, "training_seconds": 36.0, "measuring_seconds": 9.0,
         "figures": {"kl": 1.0 + i, "reverse_kl": 1.0}}
        for m in METHODS for i, p in enumerate(METHODS[m].grid)
    ]  # fmt: skip
    environment = {"cpu": "some processor", "threads": 2, "commit": "abc", "date": "2026-01-01"}
    setting = {"name": "cpu", **vars(SETTINGS["cpu"])}
    return {"setting": setting, "environment": environment, "tuning": tuning, "runs": runs}


def test_intervals_are_students():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5)


def test_the_report_tells_certain_differences_from_chance(tmp_path: Path):
    results = made_up()
    text = report.markdown(results)
    assert "**1e" not in text.split("tuning (KL")[0]
    assert "**1e-05, 0.1: 2.000**" in text
    line = next(line for line in text.splitlines() if line.startswith("| daDPO minus dDPO"))
    # Paired by seed, daDPO is exactly 2 above dDPO: certain, better where more is better and worse where less is.
    assert line.count("**+**") == 3
    assert line.count("**-**") == 3
    style.save(report.draw(results), tmp_path / "restore.png")
    assert (tmp_path / "restore.png").stat().st_size > 10_000

"""The quickstart's parts that take seconds: its pairs, the pruning, its measure, and the README's code."""

import json
import re
from pathlib import Path

import pytest
import torch

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_teacher
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from dadpo_kernels.cli.train import parse_config
from examples.quickstart.evaluate import evaluate, evaluate_teacher, reward_accuracy
from examples.quickstart.make_pairs import split
from examples.quickstart.prune import DATA, DROPPED, drop_layers
from examples.quickstart.run import captured
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def test_pairs_are_those_of_the_split():
    prompts = split()
    assert not set(prompts["train"]) & set(prompts["heldout"])
    for name, asked in prompts.items():
        pairs = read_pairs(DATA / f"{name}.jsonl")
        assert len(pairs) > 0.95 * len(asked)
        assert {p["prompt"][0]["content"] for p in pairs} <= set(asked)
        assert all(p["chosen"] != p["rejected"] for p in pairs)


def test_a_fifth_of_the_layers_is_dropped():
    assert len(set(DROPPED)) == 30 // 5
    model = tiny_llama()
    first, _ = model.model.layers
    drop_layers(model, [1])
    assert list(model.model.layers) == [first]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_measure_against_dense(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.quickstart.evaluate.bfloat16_is_fast", lambda: False)
    tokenizer, student = tiny_tokenizer(), tiny_llama(seed=1)
    student.config.pad_token_id = 0
    student.save_pretrained(tmp_path / "student")
    pairs = tokenize_pairs(chat_records(11), tokenizer, 64)
    capture_teacher(tiny_llama(), tokenizer, pairs, tmp_path / "cache", k=6)
    got = evaluate(tmp_path / "student", tmp_path / "cache")
    tiny_llama().save_pretrained(tmp_path / "teacher")
    again, cached = evaluate(tmp_path / "teacher", tmp_path / "cache"), evaluate_teacher(tmp_path / "cache")
    assert (cached["kl"], cached["reverse_kl"]) == (0, 0)
    assert abs(again["kl"]) < 1e-3  # top-k log-probabilities are cached in float16
    for name in ("nll", "margin"):
        assert cached[name] == pytest.approx(again[name], rel=1e-4)
    assert reward_accuracy({"log_ratios": [1.0, -2.0, 3.0, 0.0]}, {"log_ratios": [0.5, -1.0, 3.0, -4.0]}) == 0.625
    nll, tokens, margins, log_ratios = 0.0, 0, [], []
    for item in (PairDataset(tmp_path / "cache")[i] for i in range(11)):
        means = []
        for answer in (item["pair"].chosen_ids, item["pair"].rejected_ids):
            ids = torch.tensor([[*item["pair"].prompt_ids, *answer]])
            logps = student.double()(ids).logits[0, len(item["pair"].prompt_ids) - 1 : -1].log_softmax(-1)
            means.append(logps.gather(1, torch.tensor(answer).long()[:, None]).mean().item())
        nll -= means[0] * len(item["pair"].chosen_ids)
        tokens += len(item["pair"].chosen_ids)
        margins.append(means[0] - means[1])
        log_ratios.append(means[0] * len(item["pair"].chosen_ids) - means[1] * len(item["pair"].rejected_ids))
    assert got["log_ratios"] == pytest.approx(log_ratios, rel=1e-4)
    assert got["nll"] == pytest.approx(nll / tokens, rel=1e-4)
    assert got["margin"] == pytest.approx(sum(margins) / 11, rel=1e-4)
    assert got["kl"] > 0.1


def test_an_interrupted_capture_is_not_done(tmp_path):
    pairs = tokenize_pairs(chat_records(3), tiny_tokenizer(), 64)
    assert not captured(tmp_path / "cache", "teacher")
    capture_teacher(tiny_llama(), tiny_tokenizer(), pairs, tmp_path / "cache", k=6)
    assert captured(tmp_path / "cache", "teacher")
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"shards": []}))
    assert not captured(tmp_path / "cache", "teacher")


@pytest.mark.parametrize("name", ["sft", "dadpo"])
def test_configurations_are_valid(name):
    words = ["--model", "m", "--cache", "c", "--output_dir", "o"]
    _, config = parse_config(ROOT / "examples" / "quickstart" / f"{name}.yaml", words)
    assert config.kl_weight > 0
    assert (config.beta_teacher > 0) == (name == "dadpo")


def test_readme_code_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(block, {})

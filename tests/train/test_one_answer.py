"""Distilled SFT on caches of one answer each: as on the chosen answers of pairs."""

import pytest
import torch

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
PAIRS = chat_records(6)
ONE = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    for name, records in (("two", PAIRS), ("one", ONE)):
        capture_teacher(tiny_llama(), TOKENIZER, tokenize_pairs(records, TOKENIZER), root / name, k=4)
    return {name: PairDataset(root / name) for name in ("one", "two")}


def trainer(tmp_path, train, evaluation=None, **options):
    options = {"sft_weight": 0.5, "kl_weight": 1.0, **options}
    config = DaDPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip
    return DaDPOTrainer(tiny_llama(seed=1), config, train, evaluation, TOKENIZER)


def trained(tmp_path, *sets, **options):
    run = trainer(tmp_path, *sets, **options)
    run.train()
    return run


def test_as_on_the_chosen_answers_of_pairs(caches, tmp_path):
    both = trained(tmp_path, caches["one"], caches["one"], kl_on="both")  # all answers there are
    chosen = trained(tmp_path, caches["two"], caches["two"], kl_on="chosen")
    start = dict(tiny_llama(seed=1).named_parameters())
    for (name, a), b in zip(both.model.named_parameters(), chosen.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert not torch.equal(a, start[name])
    assert both.evaluate()["eval_loss"] == pytest.approx(chosen.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_teacher": 0.1}, "train_dataset has no rejected answers, and .*beta_teacher=0.1"),
        ({"kl_on": "rejected"}, "kl_on='rejected' need them"),
    ],
)
def test_options_that_need_rejected_answers(caches, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, caches["one"], **options)


def test_sets_of_both_kinds(caches, tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no rejected answers, and another set has"):
        trainer(tmp_path, caches["one"], caches["two"])
    with pytest.raises(ValueError, match="eval_dataset has no rejected answers, and another set has"):
        trainer(tmp_path, caches["two"]).evaluate(caches["one"])
    assert trainer(tmp_path, caches["one"], kl_on="chosen").evaluate(caches["two"])["eval_loss"] > 0


def test_trl_refuses_them(caches):
    as_trl_dataset = pytest.importorskip("dadpo_kernels.train.trl.dataset").as_trl_dataset
    with pytest.raises(ValueError, match="has no rejected answers, which DPO needs"):
        as_trl_dataset(caches["one"])

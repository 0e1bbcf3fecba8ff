"""Caches of pairs with one answer each, for distilled SFT."""

import numpy as np
import pytest

from dadpo_kernels.cache.convert import convert_cache
from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.cache.errors import CacheReferenceError
from dadpo_kernels.cache.summary import format_summary, summarize
from dadpo_kernels.cache.verify import problems
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
PAIRS = chat_records(5)
ONE = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    for name, records in (("two", PAIRS), ("one", ONE)):
        capture_teacher(tiny_llama(), TOKENIZER, tokenize_pairs(records, TOKENIZER), root / name, k=4, shard_tokens=40)
    return root


def test_the_answers_are_scored_as_those_of_pairs(caches):
    one, two = PairDataset(caches / "one"), PairDataset(caches / "two")
    assert (one.has_rejected, two.has_rejected) == (False, True)
    for item, other in zip(one, two, strict=True):
        assert item["pair"].rejected_ids.size == 0
        for name in ("label_logps", "topk_ids", "topk_logps", "topk_tail"):
            np.testing.assert_allclose(item[f"chosen_{name}"], other[f"chosen_{name}"], atol=1e-4)
            assert len(item[f"rejected_{name}"]) == 0
    batch, whole = PairCollator(0)([one[0], one[1]]), PairCollator(0)([two[0], two[1]])
    width = batch["labels"].shape[1]
    assert batch["labels"].shape == (4, width)
    assert (batch["labels"][2:] == -100).all()
    assert batch["labels"][:2].tolist() == whole["labels"][:2, :width].tolist()


def test_commands_on_such_a_cache(caches, tmp_path, capsys):
    assert list(problems(caches / "one")) == []
    assert summarize(PairDataset(caches / "one")).tokens["rejected"] == 0
    assert format_summary(summarize(PairDataset(caches / "one")))
    converted = convert_cache(caches / "one", tmp_path / "smaller", k=2, student_vocab_size=310)
    assert converted.sides == ("chosen",)
    assert list(problems(tmp_path / "smaller")) == []
    with pytest.raises(CacheReferenceError, match="has no rejected answers"):
        capture_reference(tiny_llama(), TOKENIZER, caches / "one")
    assert main(["cache", "info", str(caches / "one"), "--png", str(tmp_path / "k.png")]) == 0


def test_all_pairs_have_one_or_none(tmp_path):
    data = tokenize_pairs(PAIRS, TOKENIZER)
    alone = tokenize_pairs(ONE, TOKENIZER).pairs[1]
    with pytest.raises(ValueError, match="pair 1 has no rejected answer, and others have one"):
        capture_teacher(tiny_llama(), TOKENIZER, data._replace(pairs=[data.pairs[0], alone]), tmp_path, k=4)


def test_a_teacher_with_more_ids_than_the_student(tmp_path):
    """Ids that never occur need no option; ids that do are an error that names it."""
    data = tokenize_pairs(PAIRS, TOKENIZER)
    teacher = tiny_llama(vocab_size=328)
    capture_teacher(teacher, TOKENIZER, data, tmp_path / "occurs", k=200)
    with pytest.raises(ValueError, match=r"the student's vocabulary has 320: .*--student-vocab-size 320"):
        PairDataset(tmp_path / "occurs", vocab_size=320)
    teacher.lm_head.weight.data[320:] = 0
    capture_teacher(teacher, TOKENIZER, data, tmp_path / "never", k=4)
    dataset = PairDataset(tmp_path / "never", vocab_size=320)
    assert dataset.manifest.settings["vocab_size"] == 328
    assert len(list(dataset)) == 5
    with pytest.raises(ValueError, match="student_vocab_size must be at least 1, got 0"):
        capture_teacher(teacher, TOKENIZER, data, tmp_path / "x", k=4, student_vocab_size=0)

"""A sample of a cache compared with a local pass of its teacher, or of a model that is not."""

import pytest
import torch

from dadpo_kernels.cache.errors import CacheVocabularyError
from dadpo_kernels.capture.compare import TOLERANCE, compare_with_teacher
from dadpo_kernels.capture.local import capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()


def sharp(**options):
    """A teacher with logits of about 20, as large models have."""
    model = tiny_llama(**options)
    model.lm_head.weight.data *= 12
    return model


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    data = tokenize_pairs(chat_records(6), TOKENIZER)
    capture_teacher(sharp(), TOKENIZER, data, root / "exact", k=4)
    return root


def test_the_teacher_itself(caches):
    apart = compare_with_teacher(sharp(), TOKENIZER, caches / "exact", sample=4)
    assert (apart.pairs, apart.same_ids) == (4, 1.0)
    assert apart.tokens > 40
    assert apart.mean <= apart.rms <= apart.most < 1e-3
    assert apart.tail < 1e-4


def test_another_model_and_another_dtype(caches):
    other = compare_with_teacher(sharp(seed=1), TOKENIZER, caches / "exact")
    assert other.pairs == 6
    assert other.rms > 1
    assert other.same_ids < 0.5
    assert 0 <= other.worst < 6
    rounded = compare_with_teacher(sharp(dtype=torch.bfloat16), TOKENIZER, caches / "exact")
    assert TOLERANCE < rounded.rms < other.rms


def test_what_is_refused(caches):
    with pytest.raises(CacheVocabularyError, match="320 ids or more, and this model has 310"):
        compare_with_teacher(sharp(vocab_size=310), TOKENIZER, caches / "exact")
    with pytest.raises(ValueError, match="sample must be at least 1, got 0"):
        compare_with_teacher(sharp(), TOKENIZER, caches / "exact", sample=0)


def test_command(caches, tmp_path, capsys):
    for name, seed in (("teacher", 0), ("other", 1)):
        sharp(seed=seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    words = ["cache", "verify", str(caches / "exact"), "--sample", "2"]
    assert main([*words, "--model", str(tmp_path / "teacher")]) == 0
    assert "labels of 2 pairs" in capsys.readouterr().out
    assert main([*words, "--model", str(tmp_path / "other")]) == 1
    assert "root mean square above 0.02" in capsys.readouterr().out
    assert main([*words, "--model", str(tmp_path / "other"), "--tolerance", "1e9"]) == 0
    assert main([*words, "--model", str(tmp_path / "other"), "--tolerance", "nan"]) == 2

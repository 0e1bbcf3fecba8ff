"""Token ids of pairs are those of TRL's own code, wherever that keeps all of the prompt."""

import random
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from dadpo_kernels.capture.pairs import tokenize_pairs
from examples.smollm2 import smollm2_dir
from tests.support.tiny import WORDS, tiny_tokenizer

datasets = pytest.importorskip("datasets")
DPOTrainer = pytest.importorskip("trl").DPOTrainer


def by_trl(records, tokenizer):
    rows = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        datasets.Dataset.from_list(records),
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
        "train",
    )
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


def text(rng, longest):
    """Words and parts of words, spaces and line breaks, also where a text begins and ends."""
    pieces = [
        rng.choice([*WORDS, "an", "s", "\n", " ", " ", "\n\n", "é", "字"]) for _ in range(rng.randint(1, longest))
    ]
    return "".join(pieces)


def conversations(rng, n):
    def said(role):
        return [{"role": role, "content": text(rng, 9)}]

    return [{"prompt": said("user"), "chosen": said("assistant"), "rejected": said("assistant")} for _ in range(n)]


def standard(rng, n):
    return [{name: text(rng, 9) for name in ("prompt", "chosen", "rejected")} for _ in range(n)]


def in_the_answers(rng, n):
    """As HH-RLHF: the answers differ within a word, too."""
    begun = ["\n\nHuman: " + text(rng, 9) + "\n\nAssistant:" for _ in range(n)]
    return [{"chosen": b + text(rng, 5), "rejected": b + text(rng, 5)} for b in begun]


@pytest.mark.parametrize("make", [conversations, standard, in_the_answers])
@pytest.mark.parametrize("model", ["tiny", "SmolLM2"])
def test_tokens_are_those_of_trl(model, make, tmp_path):
    from dadpo_kernels.capture.forms import as_pair

    tokenizer = tiny_tokenizer() if model == "tiny" else AutoTokenizer.from_pretrained(smollm2_dir())
    records = make(random.Random(0), 40)
    expected = by_trl(records, tokenizer)
    data = tokenize_pairs([as_pair("", record) for record in records], tokenizer, on_error="skip")
    assert len(data.pairs) + len(data.refused) == len(records)
    assert len(data.pairs) > 0.9 * len(records), data.refused
    for pair in data.pairs:
        assert tuple(ids.tolist() for ids in pair.ids) == expected[pair.index]

"""Imports records, and reads what the cache then holds."""

import json

import numpy as np
import yaml

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cache.verify import problems
from dadpo_kernels.capture.teacher_data.importing import import_teacher_data
from tests.support import foreign
from tests.support.foreign import VOCAB
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MAKE = {
    "axolotl": foreign.axolotl,
    "distillkit": foreign.distillkit,
    "trl": lambda sequence: foreign.trl([sequence]),
    "verl": foreign.verl,
}


def run(directory, data_format, records, packing=foreign.PACKING, **options):
    """Import records from a JSONL file, with the packing beside it, to `directory/cache`."""
    source = directory / "data.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in records))
    if data_format == "distillkit":
        (directory / "compression_config.yaml").write_text(yaml.safe_dump(packing))
    return import_teacher_data(
        source, directory / "cache", data_format=data_format, tokenizer=TOKENIZER, vocab_size=VOCAB, **options
    )


def rows(directory):
    """The pairs of a cache without problems, in the order of the source: `{column: array}` of the chosen answer."""
    assert list(problems(directory / "cache")) == []
    dataset = PairDataset(directory / "cache", tokenizer=TOKENIZER)
    assert not dataset.has_rejected
    found = []
    for number in range(len(dataset)):
        item = dataset[number]
        pair = item.pop("pair")
        found.append({**item, "prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids})
    return found


def assert_true(row, sequence, k, start, end=None, *, atol=1e-5, half=4e-3):
    """The row holds what the teacher said about the tokens from `start` to `end`."""
    end = len(sequence.ids) if end is None else end
    ids, logps = (values[start:end] for values in sequence.top(k))
    outside = np.log1p(-np.exp(logps).sum(1))
    np.testing.assert_array_equal(row["prompt_ids"], sequence.ids[:start])
    np.testing.assert_array_equal(row["chosen_ids"], sequence.ids[start:end])
    np.testing.assert_array_equal(row["chosen_topk_ids"], ids)
    np.testing.assert_allclose(row["chosen_topk_logps"], logps, atol=atol + half)
    np.testing.assert_allclose(row["chosen_label_logps"], sequence.label_logps()[start:end], atol=atol)
    np.testing.assert_allclose(row["chosen_topk_tail"], outside, atol=10 * atol)

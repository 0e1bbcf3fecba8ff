"""Imports records, and reads what the cache then holds."""

import json

import numpy as np
import yaml

from dadpo_kernels.cache.format import TEACHER_SCHEMA, unpack
from dadpo_kernels.cache.reader import RowReader
from dadpo_kernels.cache.shards import read_manifest
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
    """The pairs of a cache, by index: `{column: array}`."""
    manifest = read_manifest(directory / "cache", "teacher")
    reader = RowReader(directory / "cache", TEACHER_SCHEMA)
    names = {name: name.removeprefix("chosen_").removeprefix("prompt_") for name in TEACHER_SCHEMA.names[1:]}
    found = {}
    for shard in manifest.shards:
        for number, index in enumerate(shard.index):
            row = reader.read(shard, number)
            found[index] = {
                name: unpack(row[name], short) for name, short in names.items() if not name.startswith("rejected")
            }
    return [found[index] for index in sorted(found)]


def assert_true(row, sequence, k, start, end=None, *, atol=1e-5, half=4e-3):
    """The row holds what the teacher said about the tokens from `start` to `end`."""
    end = len(sequence.ids) if end is None else end
    ids, logps = (values[start:end] for values in sequence.top(k))
    outside = np.log1p(-np.exp(logps).sum(1))
    np.testing.assert_array_equal(row["prompt_ids"], sequence.ids[:start])
    np.testing.assert_array_equal(row["chosen_ids"], sequence.ids[start:end])
    np.testing.assert_array_equal(row["chosen_topk_ids"].reshape(-1, k), ids)
    np.testing.assert_allclose(row["chosen_topk_logps"].reshape(-1, k), logps, atol=atol + half)
    np.testing.assert_allclose(row["chosen_label_logps"], sequence.label_logps()[start:end], atol=atol)
    np.testing.assert_allclose(row["chosen_topk_tail"], outside, atol=10 * atol)

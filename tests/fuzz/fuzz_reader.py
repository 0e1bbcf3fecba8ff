"""Coverage-guided fuzzing of what this package reads: caches, responses of a server, pairs, answers that an unfinished
capture has stored, and configurations.

    pip install atheris
    python -m tests.fuzz.fuzz_reader -max_total_time=60 -len_control=0 -max_len=64

An input damages one file. In a small cache, the manifest's sizes and checksums are then corrected, as a faulty program
that writes caches could. The reader must raise a typed error or give valid numbers; stored answers must be what was
stored. Other arguments are libFuzzer's. This file is not part of the test run: the `test_*` files check the same
properties with hypothesis.
"""

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["dadpo_kernels.cache", "dadpo_kernels.capture"]):
    from dadpo_kernels.cache import dataset, verify
    from dadpo_kernels.cache.errors import CacheError
    from dadpo_kernels.capture import pairs, prompt_logprobs, scored_sequences, server
    from dadpo_kernels.capture.errors import ResponseError
    from dadpo_kernels.cli import yaml_file

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dadpo_kernels.cache.format import pack
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from tests.capture.test_forms import FORMS
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.support.vllm_server import as_json, as_sglang
from tests.support.vllm_server import prompt_logprobs as true_prompt_logprobs

K, V = 4, 320
IDS = [1, 17, 42, 5]
MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()
ENTRIES = true_prompt_logprobs(MODEL, IDS, K)
RESPONSES = {
    engine: json.dumps(response).encode()
    for engine, response in (("vllm", as_json(ENTRIES)), ("sglang", as_sglang(ENTRIES, IDS, 0, K)))
}
ROOT = Path(tempfile.mkdtemp(prefix="fuzz-"))
capture_teacher(MODEL, TOKENIZER, pairs.tokenize_pairs(chat_records(2), TOKENIZER, 40), ROOT, k=K)
capture_reference(MODEL, TOKENIZER, ROOT)
FILES = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(ROOT.rglob("*.*")) if path.is_file()}


# Files outside the cache, by the names that tell their readers.
OTHER = Path(tempfile.mkdtemp(prefix="fuzz-"))
TARGETS = prompt_logprobs.answer_targets(as_json(ENTRIES), IDS, 1, K, V)
SETTINGS = {"k": K}
(OTHER / "pairs.json").write_text(json.dumps([record for record, _ in FORMS.values()]))
for number, (record, _) in enumerate(FORMS.values()):
    (OTHER / f"{number}.jsonl").write_text(json.dumps(record))
pq.write_table(pa.Table.from_pylist(chat_records(2)), OTHER / "pairs.parquet")
with contextlib.closing(scored_sequences.ScoredSequences(OTHER / "answers", SETTINGS)) as store:
    for number in range(3):
        store.write(number, IDS, 1, TARGETS)
(OTHER / "config.yaml").write_text("model: a\ncache: 'b'\nlearning_rate: 1e-4\nfsdp: {x: [1, 2.5, true]}\n")
OTHERS = {path.name: path.read_bytes() for path in sorted(OTHER.iterdir())}


def read_other(name: str, content: bytes) -> None:
    path = OTHER / name
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        if name == "answers":
            with contextlib.closing(scored_sequences.ScoredSequences(path, SETTINGS)) as store:
                for number in range(3):
                    stored = store.read(number, IDS, 1)
                    assert stored is None or all(
                        pack(stored[column], column) == pack(TARGETS[column], column) for column in TARGETS
                    )
        elif name == "config.yaml":
            yaml_file.read_settings(path)
        else:
            data = pairs.tokenize_pairs(pairs.read_pairs(path, on_error="skip"), TOKENIZER, 50, on_error="skip")
            for pair in data.pairs:
                assert len(pair.prompt_ids) > 0 < len(pair.chosen_ids)


def damage(original: bytes, data: atheris.FuzzedDataProvider) -> bytes:
    content = bytearray(original)
    for _ in range(data.ConsumeIntInRange(1, 4)):
        at = data.ConsumeIntInRange(0, len(content))
        content[at : at + data.ConsumeIntInRange(0, 8)] = data.ConsumeBytes(data.ConsumeIntInRange(0, 8))
    return bytes(content)


def with_right_sums(name: str, content: bytes) -> None:
    """Write the file, and correct the manifest in the same directory."""
    (ROOT / name).write_bytes(content)
    manifest = (ROOT / name).with_name("manifest.json")
    document = json.loads(FILES[manifest.relative_to(ROOT).as_posix()])
    digest = hashlib.sha256(content).hexdigest()
    for shard in document["shards"]:
        if shard["file"] == Path(name).name:
            shard.update(bytes=len(content), sha256=digest)
    if name == "vocabulary.json":
        document["settings"]["tokenizer_sha256"] = digest
    manifest.write_text(json.dumps(document))


def read_cache(name: str, content: bytes) -> None:
    if name.endswith("manifest.json"):
        (ROOT / name).write_bytes(content)
    else:
        with_right_sums(name, content)
    try:
        list(verify.problems(ROOT))
        with contextlib.suppress(CacheError):
            cache = dataset.PairDataset(ROOT, tokenizer=TOKENIZER)
            for position in range(len(cache)):
                item = cache[position]
                for column, values in item.items():
                    if column.endswith("_ids"):
                        assert values.min(initial=0) >= 0
                        assert values.max(initial=0) < cache.vocab_size
                    elif column != "pair":
                        assert (np.asarray(values) <= 1e-3).all(), column
    finally:
        for path, original in FILES.items():
            (ROOT / path).write_bytes(original)


def read_response(engine: str, content: bytes) -> None:
    with contextlib.suppress(ResponseError):
        response = server._json_object(b'{"a": ' + content + b"}")["a"]
        if engine == "sglang":
            response = prompt_logprobs.from_sglang(response, IDS, 1, K)
        targets = prompt_logprobs.answer_targets(response, IDS, 1, K, V)
        mass = np.exp(targets["topk_logps"].astype(float)).sum(1) + np.exp(targets["topk_tail"].astype(float))
        np.testing.assert_allclose(mass, 1, atol=5e-3)


def one_input(content: bytes) -> None:
    data = atheris.FuzzedDataProvider(content)
    name = data.PickValueInList([*FILES, *RESPONSES, *OTHERS])
    if name in OTHERS:
        read_other(name, damage(OTHERS[name], data))
    elif name in RESPONSES:
        read_response(name, damage(RESPONSES[name], data))
    else:
        read_cache(name, damage(FILES[name], data))


if __name__ == "__main__":
    try:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
    finally:
        shutil.rmtree(ROOT)
        shutil.rmtree(OTHER)

"""The cache's format: what is written is read back, and each kind of damage has a separate error."""

import hashlib
import itertools
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dadpo_kernels.cache import errors
from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.cache.format import TEACHER_SCHEMA, pack, read_pair, read_targets, teacher_row, unpack
from dadpo_kernels.cache.pairs import Pair
from dadpo_kernels.cache.sampler import ShardSampler
from dadpo_kernels.cache.shards import MANIFEST, writing
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
N, K, V = 6, 4, 320


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    data = tokenize_pairs(chat_records(N), TOKENIZER, 40)
    capture_teacher(tiny_llama(), TOKENIZER, data, directory, k=K, shard_tokens=25)
    capture_reference(tiny_llama(seed=1), TOKENIZER, directory)
    return directory


@pytest.fixture
def cache(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "cache")


def edit(directory, change):
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def load_everything(directory, **options):
    return list(PairDataset(directory, tokenizer=TOKENIZER, vocab_size=V, require_reference=True, **options))


# ---- reading ---------------------------------------------------------------------------------------------------


def test_batches_are_laid_out_for_the_loss(cache):
    dataset = PairDataset(cache)
    items = [dataset[i] for i in (4, 0, 3)]
    batch = PairCollator(pad_token_id=9)(items)
    valid = batch["labels"] != -100
    assert batch["input_ids"].shape == batch["teacher_topk_tail"].shape == valid.shape
    assert batch["teacher_topk_ids"].shape == batch["teacher_topk_logps"].shape == (*valid.shape, K)
    assert batch["teacher_topk_ids"].dtype == torch.int32
    assert batch["input_ids"][batch["attention_mask"] == 0].eq(9).all()
    row = 0
    for side in ("chosen", "rejected"):
        for item in items:
            for name in ("label_logps", "topk_ids", "topk_logps", "topk_tail"):
                values = batch[f"teacher_{name}"][row]
                np.testing.assert_array_equal(values[valid[row]].numpy(), item[f"{side}_{name}"])
                assert not values[~valid[row]].any()
            assert batch["labels"][row][valid[row]].tolist() == list(getattr(item["pair"], f"{side}_ids"))
            assert batch["ref_logps"][row] == np.float32(item[f"ref_{side}_logps"]) < -1
            row += 1


def test_a_loader_with_workers_gives_the_same_batches(cache):
    dataset = PairDataset(cache)
    dataset[0]  # opens a file, which is not pickled with the data set
    assert pickle.loads(pickle.dumps(dataset))[1]["pair"].index == 1
    batches = [list(DataLoader(dataset, 2, collate_fn=PairCollator(0), num_workers=n)) for n in (0, 1)]
    assert len(batches[0]) == N // 2
    for alone, worker in zip(*batches, strict=True):
        assert alone.keys() == worker.keys()
        assert all(torch.equal(alone[name], worker[name]) for name in alone)


def test_without_reference_the_batch_has_none(cache):
    shutil.rmtree(cache / "reference")
    dataset = PairDataset(cache)
    assert not dataset.has_reference
    assert "ref_logps" not in PairCollator(0)([dataset[0]])
    with pytest.raises(errors.CacheReferenceError, match="dadpo reference --model STUDENT"):
        PairDataset(cache, require_reference=True)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (2, 2), (4, 99)])
def test_the_sampler_gives_each_process_its_share_once(finished, replicas, shards):
    dataset = PairDataset(finished)
    by_shard = dataset.positions_by_shard()
    assert len(by_shard) > 1
    assert sorted(position for positions in by_shard for position in positions) == list(range(N))
    samplers = [ShardSampler(dataset, num_replicas=replicas, rank=rank, shards=shards) for rank in range(replicas)]
    orders = []
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert [len(share) for share in shares] == [len(sampler) for sampler in samplers] == [N // replicas] * replicas
        order = [position for turn in zip(*shares, strict=True) for position in turn]
        assert len(set(order)) == len(order)
        orders.append(order)
        if shards == 1 and replicas == 1:  # one shard after the other
            files = [next(i for i, positions in enumerate(by_shard) if p in positions) for p in order]
            assert sum(a != b for a, b in itertools.pairwise(files)) == len(by_shard) - 1
    assert orders[0] == [p for turn in zip(*map(list, reset(samplers)), strict=True) for p in turn]
    assert any(order != orders[0] for order in orders)
    with pytest.raises(ValueError, match=r"rank=2 is outside \[0, 2\)"):
        ShardSampler(dataset, num_replicas=2, rank=2)


def reset(samplers):
    for sampler in samplers:
        sampler.set_epoch(0)
    return samplers


ANSWER = st.integers(1, 5)


@given(st.data(), ANSWER, ANSWER, ANSWER, st.integers(0, 3))
def test_rows_round_trip(data, prompt, chosen, rejected, k):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))

    def ids(*shape):
        return rng.integers(0, V, shape).astype(np.int32)

    def targets(length):
        tail = np.where(rng.random(length) < 0.3, -np.inf, -rng.random(length)).astype(np.float32)
        logps = -rng.random((length, k)).astype(np.float16)
        label = -rng.random(length).astype(np.float32)
        return {"label_logps": label, "topk_ids": ids(length, k), "topk_logps": logps, "topk_tail": tail}

    pair = Pair(7, ids(prompt), ids(chosen), ids(rejected))
    sides = {"chosen": targets(chosen), "rejected": targets(rejected)}
    (row,) = pa.Table.from_pylist([teacher_row(pair, *sides.values())], TEACHER_SCHEMA).to_pylist()
    again = read_pair(row)
    assert again.index == 7
    for ids_read, expected in zip(again.ids, pair.ids, strict=True):
        np.testing.assert_array_equal(ids_read, expected)
    for column, values in read_targets(row, again, k, V).items():
        side, name = column.split("_", 1)
        np.testing.assert_array_equal(values, sides[side][name], strict=True)


# ---- what can be wrong -----------------------------------------------------------------------------------------


def test_not_a_cache(tmp_path):
    with pytest.raises(errors.CacheFormatError, match="is not a teacher cache"):
        PairDataset(tmp_path)
    with pytest.raises(errors.CacheFormatError, match="is not a teacher cache"):
        PairDataset(tmp_path / "nowhere")


def test_a_reference_is_not_a_teacher(cache):
    with pytest.raises(errors.CacheFormatError, match="'teacher' is needed"):
        PairDataset(cache / "reference")


def test_other_version(cache):
    edit(cache, lambda manifest: manifest.update(version=2))
    with pytest.raises(errors.CacheVersionError, match=r"version 2 .* reads version 1"):
        PairDataset(cache)


def test_unfinished(cache):
    edit(cache, lambda manifest: manifest["shards"].pop())
    with pytest.raises(errors.CacheIncompleteError, match="run the same `dadpo teacher` command again"):
        PairDataset(cache)


def test_pairs_listed_twice(cache):
    edit(cache, lambda manifest: manifest["shards"].append(manifest["shards"][0]))
    with pytest.raises(errors.CacheFormatError, match="more than once"):
        PairDataset(cache)


def test_truncated_and_missing_shards(cache):
    shard = cache / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(errors.CacheTruncatedError, match=r"has \d+ bytes, \d+ bytes were written"):
        PairDataset(cache, verify=False)
    shard.unlink()
    with pytest.raises(errors.CacheTruncatedError, match="is missing"):
        PairDataset(cache)


def renamed(number):
    tokenizer = tiny_tokenizer()
    vocabulary = {**tokenizer.get_vocab()}
    tokenizer.get_vocab = lambda: {("other" if n == number else token): n for token, n in vocabulary.items()}
    return tokenizer


def test_wrong_tokenizer(cache):
    """An id that occurs must be the same token, in an answer or in a top k; others may be renamed."""
    dataset = PairDataset(cache)
    tokens = {int(i) for item in dataset for ids in item["pair"].ids for i in ids}
    topk = {int(i) for item in dataset for side in ("chosen", "rejected") for i in item[f"{side}_topk_ids"].ravel()}
    unused = sorted(set(range(250)) - tokens - topk)
    for number in (min(tokens), min(topk - tokens)):
        with pytest.raises(
            errors.CacheTokenizerError,
            match=rf"id {number}, which occurs in pair \d+, is '.*' in the cache and 'other' in the given tokenizer",
        ):
            PairDataset(cache, tokenizer=renamed(number))
    assert len(PairDataset(cache, tokenizer=renamed(unused[0]))) == len(dataset)


def test_ids_outside_the_students_vocabulary(cache):
    high = max(shard["max_id"] for shard in json.loads((cache / MANIFEST).read_text())["shards"])
    PairDataset(cache, vocab_size=high + 1)
    with pytest.raises(errors.CacheVocabularyError, match=f"holds id {high}, the student's vocabulary has {high}"):
        PairDataset(cache, vocab_size=high)


def rewrite(cache, change):
    """Change a row of a shard and write it with the right size and checksum, as another program would."""
    path = cache / "shard-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows[0])
    shards = json.loads((cache / MANIFEST).read_text())["shards"]
    path.unlink()
    edit(cache, lambda manifest: manifest["shards"].clear())
    settings = json.loads((cache / MANIFEST).read_text())["settings"]
    with writing(cache, "teacher", settings, {}) as writer:
        writer.write_shard(0, pa.Table.from_pylist(rows, TEACHER_SCHEMA), tokens=1, max_id=0)
    edit(cache, lambda manifest: manifest["shards"].extend(shards[1:]))
    return rows[0]["index"]


def patched(content, name, value):
    values = unpack(content, name)
    values[-1] = value
    return pack(values, name)


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("chosen_topk_ids", -1, errors.CacheVocabularyError),
        ("rejected_topk_ids", V, errors.CacheVocabularyError),
        ("prompt_ids", V, errors.CacheVocabularyError),
        ("chosen_label_logps", np.nan, errors.CacheFormatError),
        ("rejected_topk_logps", 0.5, errors.CacheFormatError),
        ("chosen_topk_tail", np.inf, errors.CacheFormatError),
    ],
)
def test_the_error_for_a_bad_value_names_the_pair(cache, column, value, error):
    name = "ids" if column == "prompt_ids" else column.split("_", 1)[1]
    index = rewrite(cache, lambda row: row.update({column: patched(row[column], name, value)}))
    dataset = PairDataset(cache)
    with pytest.raises(error, match=f"pair {index}"):
        dataset[index]


@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "chosen_topk_ids", "rejected_topk_tail"])
@pytest.mark.parametrize("cut", [1, 4, 10_000])
def test_the_error_for_a_column_of_the_wrong_length_names_the_pair(cache, column, cut):
    if (column, cut) == ("prompt_ids", 4):
        cut = 2  # a prompt may have any number of tokens
    index = rewrite(cache, lambda row: row.update({column: row[column][:-cut]}))
    dataset = PairDataset(cache)
    with pytest.raises(errors.CacheFormatError, match=f"pair {index}"):
        dataset[index]


def test_reference_of_other_pairs(cache):
    edit(cache / "reference", lambda manifest: manifest["settings"].update(tokens_sha256="0"))
    with pytest.raises(errors.CacheReferenceError, match="belongs to other pairs"):
        PairDataset(cache)


@given(data=st.data())
def test_a_flipped_bit_anywhere_is_detected(finished, data):
    names = sorted(
        p.relative_to(finished) for p in finished.rglob("*") if p.suffix == ".parquet" or p.name == "vocabulary.json"
    )
    path = finished / data.draw(st.sampled_from(names))
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        with pytest.raises(errors.CacheChecksumError, match=path.name):
            load_everything(finished)
    finally:
        path.write_bytes(original)


@given(data=st.data())
def test_a_damaged_shard_with_right_checksums_gives_a_cache_error_or_sane_values(finished, data):
    """A program may write a damaged file with the right checksum, so a right checksum is not enough for the reader."""
    path = finished / data.draw(st.sampled_from(["shard-00000.parquet", "reference/shard-00000.parquet"]))
    manifest = path.with_name(MANIFEST)
    originals = {file: file.read_bytes() for file in (path, manifest)}
    content = bytearray(originals[path])
    for _ in range(data.draw(st.integers(1, 3))):
        # The last bytes hold the schema and the offsets of the columns.
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(max(0, len(content) - 600), len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit(path.parent, lambda m: m["shards"][0].update(bytes=len(content), sha256=digest))
    try:
        for item in load_everything(finished):
            for name in item.keys() - {"pair"}:
                assert np.isfinite(item[name]).all() or "topk" in name
                assert not np.isnan(item[name]).any()
    except errors.CacheError:
        pass
    finally:
        for file, original in originals.items():
            file.write_bytes(original)


ODD = [None, True, -1, 0, 1, 10**30, 1.5, float("nan"), "", "..", "0" * 64, [], [0], [None], {}, {"k": 1}]


def leaves(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


@given(data=st.data())
def test_a_malformed_manifest_gives_a_cache_error_or_the_right_data(finished, data):
    path = finished / data.draw(st.sampled_from([MANIFEST, f"reference/{MANIFEST}"]))
    original = path.read_bytes()
    document = json.loads(original)
    expected = load_everything(finished)
    where = data.draw(st.sampled_from([p for p in leaves(document) if p]))
    target = document
    for key in where[:-1]:
        target = target[key]
    if data.draw(st.booleans()):
        target[where[-1]] = data.draw(st.sampled_from(ODD))
    else:
        del target[where[-1]]
    path.write_text(json.dumps(document))
    try:
        items = load_everything(finished)
    except errors.CacheError:
        return
    finally:
        path.write_bytes(original)
    for item, other in zip(items, expected, strict=True):
        for name in item.keys() - {"pair"}:
            np.testing.assert_array_equal(item[name], other[name])


@given(st.binary(max_size=60))
def test_a_manifest_of_arbitrary_bytes_gives_a_cache_error(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("bytes")
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(errors.CacheError):
        PairDataset(directory)

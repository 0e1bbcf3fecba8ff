"""A cache of another program: written with pyarrow alone from docs/cache-format.md, and read by this package."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.cache.verify import problems

K, V = 3, 50
TYPES = {"ids": "<i4", "label_logps": "<f4", "topk_ids": "<i4", "topk_logps": "<f2", "topk_tail": "<f4"}


def pack(values, dtype):
    return np.asarray(values, dtype).reshape(-1, 1).view(np.uint8).T.tobytes()


def answer(rng, length):
    """Targets of a random softmax over V ids."""
    logits = rng.normal(size=(length, V)) * 3
    logps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = rng.integers(0, V, length)
    order = (-logps).argsort(1)
    return {
        "ids": ids,
        "label_logps": np.take_along_axis(logps, ids[:, None], 1)[:, 0],
        "topk_ids": order[:, :K],
        "topk_logps": np.take_along_axis(logps, order[:, :K], 1),
        "topk_tail": np.log(np.exp(np.take_along_axis(logps, order[:, K:], 1)).sum(1)),
    }


@pytest.fixture
def written(tmp_path):
    """`(directory, pairs)`; a pair is `{"prompt": ids, "chosen": {...}, "rejected": {...}}`."""
    rng = np.random.default_rng(0)
    pairs = [
        {"prompt": rng.integers(0, V, 4), "chosen": answer(rng, 6), "rejected": answer(rng, 2 + i)} for i in range(5)
    ]
    (tmp_path / "vocabulary.json").write_text(json.dumps([f"token{i}" for i in range(V)]))
    fields = [pa.field("index", pa.int64(), False), pa.field("prompt_ids", pa.binary(), False)]
    fields += [pa.field(f"{side}_{name}", pa.binary(), False) for side in ("chosen", "rejected") for name in TYPES]
    shards = []
    for number, index in enumerate(([4, 1], [0, 2, 3])):
        rows = []
        for i in index:
            row = {"index": i, "prompt_ids": pack(pairs[i]["prompt"], "<i4")}
            for side in ("chosen", "rejected"):
                row |= {f"{side}_{name}": pack(pairs[i][side][name], dtype) for name, dtype in TYPES.items()}
            rows.append(row)
        path = tmp_path / f"part{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), path, row_group_size=1, use_dictionary=False)
        everything = [pairs[i]["prompt"].max() for i in index]
        everything += [
            pairs[i][s][n].max() for i in index for s in ("chosen", "rejected") for n in ("ids", "topk_ids")
        ]
        shards.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "index": index,
                "tokens": sum(len(pairs[i][side]["ids"]) for i in index for side in ("chosen", "rejected")),
                "max_id": int(max(everything)),
            }
        )
    tokens = hashlib.sha256()
    for i, pair in enumerate(pairs):
        ids = [pair["prompt"], pair["chosen"]["ids"], pair["rejected"]["ids"]]
        for numbers in ([i, *map(len, ids)], *ids):
            tokens.update(np.asarray(numbers, "<i8").tobytes())
    settings = {
        "pairs": 5,
        "k": K,
        "vocab_size": V,
        "tokens_sha256": tokens.hexdigest(),
        "tokenizer_sha256": hashlib.sha256((tmp_path / "vocabulary.json").read_bytes()).hexdigest(),
    }
    manifest = {"format": "dadpo-cache", "version": 1, "kind": "teacher", "settings": settings, "info": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shards": shards}))
    return tmp_path, pairs


def test_a_cache_written_by_another_program_is_read(written):
    directory, pairs = written
    assert list(problems(directory)) == []
    dataset = PairDataset(directory)
    assert len(dataset) == 5
    for i, pair in enumerate(pairs):
        item = dataset[i]
        np.testing.assert_array_equal(item["pair"].prompt_ids, pair["prompt"])
        for side in ("chosen", "rejected"):
            np.testing.assert_array_equal(getattr(item["pair"], f"{side}_ids"), pair[side]["ids"])
            for name in ("label_logps", "topk_ids", "topk_logps", "topk_tail"):
                np.testing.assert_array_equal(item[f"{side}_{name}"], pair[side][name].astype(TYPES[name]))
    assert PairCollator(0)([dataset[0], dataset[4]])["teacher_topk_ids"].shape[-1] == K


def test_its_reference_too(written):
    directory, pairs = written
    reference = directory / "reference"
    reference.mkdir()
    sides = ("chosen", "rejected")
    fields = [pa.field("index", pa.int64(), False)]
    fields += [pa.field(f"{side}_logps", pa.float64(), False) for side in sides]
    fields += [pa.field(f"{side}_tokens", pa.int64(), False) for side in sides]
    rows = [
        {"index": i, **{f"{s}_logps": -i - 1.5 for s in sides}, **{f"{s}_tokens": len(pair[s]["ids"]) for s in sides}}
        for i, pair in enumerate(pairs)
    ]
    path = reference / "all.parquet"
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), path, row_group_size=1)
    teacher = json.loads((directory / "manifest.json").read_text())
    shard = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "index": list(range(5)),
        "tokens": sum(shard["tokens"] for shard in teacher["shards"]),
        "max_id": max(shard["max_id"] for shard in teacher["shards"]),
    }
    settings = {"pairs": 5, "tokens_sha256": teacher["settings"]["tokens_sha256"]}
    manifest = {**teacher, "kind": "reference", "settings": settings, "shards": [shard]}
    (reference / "manifest.json").write_text(json.dumps(manifest))
    assert list(problems(directory)) == []
    assert PairDataset(directory, require_reference=True)[3]["ref_chosen_logps"] == -4.5

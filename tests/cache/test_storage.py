"""What a disk, a directory or another program's file can do to a cache: a CacheError in one line."""

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dadpo_kernels.cache import shards
from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cache.errors import CacheError, CacheFormatError
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
DATA = tokenize_pairs(chat_records(3), TOKENIZER)


def capture(directory):
    return capture_teacher(tiny_llama(), TOKENIZER, DATA, directory, k=4, shard_tokens=60)


@pytest.fixture
def cache(tmp_path):
    capture(tmp_path)
    return tmp_path


def directory_at(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def edited(path, change):
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def replaced(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


FAULTS = {
    "a directory as manifest": ("manifest.json", directory_at, "Is a directory"),
    "an integer of 5,000 digits": ("manifest.json", replaced(b'"k": 4', b'"k": ' + b"4" * 5000), "not JSON .*digits"),
    "deep": ("manifest.json", lambda path: path.write_bytes(b"[" * 100_000), "is not JSON"),
    "another encoding": ("manifest.json", lambda path: path.write_bytes("é".encode("latin-1")), "is not JSON"),
    "not a number": ("manifest.json", replaced(b'"k": 4', b'"k": NaN'), "settings.k must be of type int"),
    "a long file name": (
        "manifest.json",
        lambda path: edited(path, lambda d: d["shards"][0].update(file="x" * 300)),
        "File name too long",
    ),
    "other sides": (
        "manifest.json",
        lambda path: edited(path, lambda d: d["settings"].update(sides=["rejected"])),
        r"settings.sides must be \[\"chosen\"\]",
    ),
    "one side": (
        "manifest.json",
        lambda path: edited(path, lambda d: d["settings"].update(sides=["chosen"])),
        "rejected_ids is not empty",
    ),
    "a directory as vocabulary": ("vocabulary.json", directory_at, "vocabulary.json is missing"),
    "a directory as shard": ("shard-00000.parquet", directory_at, "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_reading(name, cache):
    file, damage, message = FAULTS[name]
    damage(cache / file)
    with pytest.raises(CacheError, match=message) as error:
        list(PairDataset(cache, tokenizer=TOKENIZER))
    assert "\n" not in str(error.value)


def without_manifest(path):
    """A capture that is going on: the shards are not listed yet."""
    (path.parent / "manifest.json").unlink()
    return path


WRITING = {
    "a directory as lock": (".lock", directory_at, r"\.lock: Is a directory: move this directory"),
    "a file as cache": ("", lambda path: (path.rmdir(), path.write_text("")), "File exists|Not a directory"),
    "a long name": ("x" * 300, lambda path: None, "File name too long: choose a shorter name"),
    "a directory as vocabulary": ("vocabulary.json", directory_at, "vocabulary.json: .*directory"),
    "a record of a shard that was cut": (
        ".shard-00001.parquet.json",
        lambda path: path.write_text('{"file": "sha'),
        "is not JSON .*delete it, its shard is captured again",
    ),
}


@pytest.mark.parametrize("name", WRITING)
def test_writing(name, tmp_path):
    file, damage, message = WRITING[name]
    out = tmp_path / "out"
    out.mkdir()
    if file.endswith(".json") and file.startswith("."):  # which matters to a capture that is resumed
        (out / "manifest.json").write_bytes(shards.Manifest("teacher", settings_of_capture(tmp_path / "x"), {}).dump())
    damage(out / file if file else out)
    with pytest.raises(CacheError, match=message) as error:
        capture(out / file if len(file) == 300 else out)
    assert "\n" not in str(error.value)


def settings_of_capture(directory):
    return capture(directory).settings


def test_a_full_disk_and_then_space_again(tmp_path, monkeypatch):
    capture(tmp_path / "whole")
    sync, calls = os.fsync, 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CacheError, match="No space left on device: free some space and run the same command again"):
        capture(tmp_path / "full")
    assert capture(tmp_path / "full").dump() == (tmp_path / "whole" / "manifest.json").read_bytes()


def test_a_finished_capture_writes_nothing(cache, monkeypatch):
    """So it can be run again where nothing can be written."""
    capture_reference(tiny_llama(), TOKENIZER, cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    (cache / ".lock").unlink()
    (cache / "reference" / ".lock").unlink()

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(os, "fsync", read_only)
    manifest = capture(cache)
    capture_reference(tiny_llama(), TOKENIZER, cache)
    assert len(manifest.index()) == 3
    now = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert now == {path: time for path, time in before.items() if path in now}
    (cache / "shard-00000.parquet").unlink()
    with pytest.raises(CacheError, match="Read-only file system"):
        capture(cache)


def rewritten(cache, change):
    """All shards, written anew by another program, with the right sizes and checksums."""
    manifest = shards.read_manifest(cache, "teacher")
    for number, shard in enumerate(manifest.shards):
        path = cache / shard.file
        pq.write_table(change(pq.read_table(path)), path, row_group_size=1)
        content = path.read_bytes()
        digest = shards.hashlib.sha256(content).hexdigest()
        manifest.shards[number] = shards.Shard(**{**vars(shard), "bytes": len(content), "sha256": digest})
    (cache / "manifest.json").write_bytes(manifest.dump())


def as_types(kind):
    def change(table):
        fields = [pa.field(f.name, kind if f.type == pa.binary() else f.type) for f in table.schema]  # nullable
        return table.cast(pa.schema(fields)).append_column("__index_level_0__", [[0] * len(table)])

    return change


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_files_of_pandas_and_polars(cache, kind):
    expected = [item["chosen_topk_ids"].tolist() for item in PairDataset(cache)]
    rewritten(cache, as_types(kind))
    assert [item["chosen_topk_ids"].tolist() for item in PairDataset(cache)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("chosen_ids"), "has no column chosen_ids"),
        (
            lambda t: t.set_column(1, "prompt_ids", [["text"] * len(t)]),
            "prompt_ids is of type string, binary is needed",
        ),
        (
            lambda t: t.set_column(1, "prompt_ids", pa.array([None] * len(t), pa.binary())),
            "row 0: prompt_ids is null",
        ),
    ],
)
def test_other_columns_are_named(cache, change, message):
    rewritten(cache, change)
    with pytest.raises(CacheFormatError, match=message):
        list(PairDataset(cache))

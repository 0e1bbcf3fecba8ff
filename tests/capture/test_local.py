"""Captured values against dense float64, and captures that are killed."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cache.errors import (
    CacheBusyError,
    CacheReferenceError,
    CacheSettingsError,
    CacheTokenizerError,
    CacheVocabularyError,
)
from dadpo_kernels.cache.shard_run import plan_shards
from dadpo_kernels.cache.shards import MANIFEST, read_manifest, writing
from dadpo_kernels.capture import local as capture
from dadpo_kernels.capture.local import batches, capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
K = 8


def data(n=12, max_length=48):
    return tokenize_pairs(chat_records(n), TOKENIZER, max_length)


@torch.no_grad()
def dense_logps(model, prompt, answer):
    """`[T, V]` float64 log-probabilities at the answer's positions, of the sequence on its own."""
    ids = torch.tensor([*prompt, *answer])[None]
    return model.double()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [1, 400, 100_000])
def test_values_are_the_dense_ones_whatever_the_batches(tmp_path, batch_tokens):
    capture_teacher(tiny_llama(), TOKENIZER, data(), tmp_path, k=K, batch_tokens=batch_tokens, shard_tokens=150)
    capture_reference(tiny_llama(seed=1), TOKENIZER, tmp_path, batch_tokens=batch_tokens, shard_tokens=100)
    teacher, reference = tiny_llama(), tiny_llama(seed=1)
    dataset = PairDataset(tmp_path, tokenizer=TOKENIZER, vocab_size=320, require_reference=True)
    assert [item["pair"].index for item in dataset] == list(range(12))
    for item in dataset:
        for side, answer in (("chosen", item["pair"].chosen_ids), ("rejected", item["pair"].rejected_ids)):
            logps = dense_logps(teacher, item["pair"].prompt_ids, answer)
            ids = torch.from_numpy(item[f"{side}_topk_ids"].copy()).long()
            label = logps.gather(1, torch.tensor(answer).long()[:, None])[:, 0]
            outside = logps.scatter(1, ids, -torch.inf).logsumexp(-1)
            close(item[f"{side}_label_logps"], label, 1e-4)
            close(item[f"{side}_topk_tail"], outside, 1e-4)
            close(item[f"{side}_topk_logps"], logps.gather(1, ids), 1e-4 + 2**-11 * 16)  # float16 below 16
            close(logps.gather(1, ids), logps.topk(K).values, 1e-4)  # the ids are the top k, most probable first
            expected = dense_logps(reference, item["pair"].prompt_ids, answer)
            expected = expected.gather(1, torch.tensor(answer).long()[:, None]).sum()
            close(np.array(item[f"ref_{side}_logps"]), expected, 1e-3)


def close(values, expected, atol):
    np.testing.assert_allclose(np.asarray(values, np.float64), expected.numpy(), rtol=0, atol=atol)


def test_k_zero_stores_the_labels_only(tmp_path):
    capture_teacher(tiny_llama(), TOKENIZER, data(3), tmp_path, k=0)
    item = PairDataset(tmp_path)[1]
    assert item["chosen_topk_ids"].shape == (len(item["pair"].chosen_ids), 0)
    assert (item["chosen_label_logps"] < 0).all()


def test_plan_sorts_by_length_and_fills_shards_and_batches():
    pairs = data(40).pairs
    shards = plan_shards(pairs, 200)
    planned = [pair for shard in shards for pair in shard]
    assert sorted(pair.index for pair in planned) == [pair.index for pair in pairs]
    assert [pair.length for pair in planned] == sorted((pair.length for pair in pairs), reverse=True)
    for shard in shards[:-1]:
        assert sum(p.answer_tokens for p in shard[:-1]) < 200 <= sum(p.answer_tokens for p in shard)
    for batch in batches(planned, 300):
        assert len(batch) == 1 or 2 * len(batch) * max(pair.length for pair in batch) <= 300
    assert [pair for batch in batches(planned, 300) for pair in batch] == planned
    assert plan_shards(pairs[::-1], 200) == shards


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 4}, "k was 8 and is 4 now"),
        ({"shard_tokens": 77}, "shard_tokens"),
        ({"model": tiny_llama(seed=1)}, "model_sha256"),
        ({"model": tiny_llama(dtype=torch.bfloat16)}, "dtype was 'float32' and is 'bfloat16' now"),
        ({"data": data(max_length=47)}, "max_length was 48 and is 47 now"),
        ({"data": data(11)}, "source_sha256"),
        ({"tokenizer": tiny_tokenizer(280)}, "tokenizer_sha256"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(tmp_path, change, named):
    first = {
        "model": tiny_llama(),
        "tokenizer": TOKENIZER,
        "data": data(),
        "out": tmp_path,
        "k": K,
        "shard_tokens": 99,
    }
    capture_teacher(**first)
    before = content(tmp_path)
    with pytest.raises(CacheSettingsError, match=named):
        capture_teacher(**{**first, **change})
    capture_teacher(**first, batch_tokens=128)  # may change; the capture is already complete
    assert content(tmp_path) == before


def test_a_run_that_failed_at_once_does_not_block_the_next(tmp_path):
    with pytest.raises(ValueError, match="k=321"):
        capture_teacher(tiny_llama(), TOKENIZER, data(), tmp_path, k=321)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        capture_teacher(tiny_llama(), TOKENIZER, data(), tmp_path, k=K, batch_tokens=0)
    run(tmp_path)
    assert len(PairDataset(tmp_path)) == 12


def test_a_finished_shard_that_was_lost_is_captured_again(tmp_path, caplog):
    whole = run(tmp_path)
    shard = next(tmp_path.glob("shard-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with caplog.at_level("DEBUG", "dadpo_kernels"):
        assert run(tmp_path) == whole
    assert "shards; 1 were lost" in caplog.text


def test_another_writer_is_refused(tmp_path):
    def again():
        return writing(tmp_path, "reference", {"pairs": 1, "tokens_sha256": ""}, {})

    with again(), pytest.raises(CacheBusyError, match="another process"), again():
        pass
    with again() as writer:
        assert writer.manifest.shards == []


def test_nan_from_the_model_is_refused_and_not_written(tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.weight.data[data().pairs[3].rejected_ids[0]] = torch.nan
    with pytest.raises(ValueError, match=r"gives NaN or infinite log-probabilities .* of the pairs \["):
        capture_teacher(model, TOKENIZER, data(), tmp_path, k=K)
    assert not list(tmp_path.glob("shard-*"))


def test_dropout_is_off_and_training_mode_is_restored(tmp_path):
    model = tiny_llama()
    model.config.attention_dropout = 0.5
    expected = run(tmp_path / "eval")
    capture_teacher(model.train(), TOKENIZER, data(), tmp_path / "train", k=K, shard_tokens=100, batch_tokens=200)
    assert model.training
    shards = {name: value for name, value in content(tmp_path / "train").items() if name.endswith("parquet")}
    assert shards == {name: value for name, value in expected.items() if name.endswith("parquet")}


def test_the_reference_checks_the_pairs(tmp_path):
    run(tmp_path)
    other = tiny_tokenizer()
    other.add_tokens(["new"])  # above the ids of the cache, so it does not contradict them
    capture_reference(tiny_llama(), other, tmp_path, tmp_path / "ref")
    with pytest.raises(CacheSettingsError, match="model_sha256"):
        capture_reference(tiny_llama(seed=2), TOKENIZER, tmp_path, tmp_path / "ref")
    with pytest.raises(
        CacheTokenizerError,
        match=r"id \d+, which occurs in pair \d+, is .* in the cache",
    ):
        capture_reference(tiny_llama(), shuffled_tokenizer(), tmp_path)
    with pytest.raises(CacheVocabularyError, match="outside the vocabulary of 100"):
        capture_reference(tiny_llama(vocab_size=100), TOKENIZER, tmp_path)
    run(tmp_path / "elsewhere", n=11)
    with pytest.raises(CacheReferenceError, match="other pairs"):
        PairDataset(tmp_path / "elsewhere", reference_dir=tmp_path / "ref")


def shuffled_tokenizer():
    """Another tokenizer of the same size."""
    from tests.support import tiny

    text, tiny.TEXT = tiny.TEXT, "quite another text about nothing that was ever learnt before this one"
    try:
        return tiny_tokenizer()
    finally:
        tiny.TEXT = text


# ---- killed captures -------------------------------------------------------------------------------------------


def content(directory):
    return {
        path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file() and path.name[0] != "."
    }


def run(directory, n=12):
    capture_teacher(tiny_llama(), TOKENIZER, data(n), directory, k=K, shard_tokens=100, batch_tokens=200)
    return content(directory)


def run_and_die(directory, fatal_event):
    """Capture in a process that kills itself at the n-th step of writing files. A step is the moment before or after a
    sync or rename."""
    torch.set_num_threads(1)
    events = 0

    def fatal(function):
        def wrapped(*args):
            nonlocal events
            for step in (lambda: None, lambda: function(*args)):
                result = step()
                events += 1
                if events == fatal_event:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    os.fsync, Path.replace = fatal(os.fsync), fatal(Path.replace)
    run(directory)


def run_slowly(directory):
    torch.set_num_threads(1)
    score = capture._score_batch
    capture._score_batch = lambda *args: (time.sleep(0.1), score(*args))[1]
    run(directory)


@pytest.fixture(scope="module")
def processes():
    """Context whose processes start with all imports done, and without the threads of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the fork server needs this path to import this file
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def test_killed_at_every_step_of_writing(tmp_path, processes):
    expected = run(tmp_path / "whole")
    deaths = 0
    for fatal_event in range(1, 100):
        process = processes.Process(target=run_and_die, args=(tmp_path / "killed", fatal_event))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        if (tmp_path / "killed" / MANIFEST).exists():  # the listed shards must be complete and right
            for shard in read_manifest(tmp_path / "killed", "teacher").shards:
                assert (tmp_path / "killed" / shard.file).read_bytes() == expected[shard.file]
    assert deaths > 10
    assert content(tmp_path / "killed") == expected


def test_killed_at_20_random_moments(tmp_path, processes):
    expected = run(tmp_path / "whole")
    directory = tmp_path / "killed"
    rng = random.Random(0)
    deaths = finished = 0
    while deaths < 20:
        process = processes.Process(target=run_slowly, args=(directory,))
        process.start()
        process.join(rng.uniform(0.05, 0.6))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        deaths += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # the capture is complete after several resumptions
            finished += 1
            assert content(directory) == expected
            shutil.rmtree(directory)
    run(directory)
    assert content(directory) == expected

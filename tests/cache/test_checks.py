"""`dadpo cache`: damage and impossible values are reported, the summary is right, and the mass of what is left out
goes to the tail."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dadpo_kernels.cache.convert import convert_cache
from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cache.errors import CacheVocabularyError
from dadpo_kernels.cache.fold import fold
from dadpo_kernels.cache.format import unpack
from dadpo_kernels.cache.shards import MANIFEST
from dadpo_kernels.cache.summary import format_summary, plot_summary, summarize
from dadpo_kernels.cache.verify import problems
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.capture.remote import capture_from_server
from dadpo_kernels.capture.server import CompletionsServer
from dadpo_kernels.cli.main import main
from tests.cache.test_cache import patched, rewrite
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.support.vllm_server import serving

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
RECORDS = chat_records(6)
K = 8


def outside_model():
    """A teacher that gives ids above the tokenizer's 300 a high probability."""
    model = tiny_llama()
    model.lm_head.weight.data[300:] *= 2
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    data = tokenize_pairs([*RECORDS, RECORDS[0]], TOKENIZER, 60)
    capture_teacher(outside_model(), TOKENIZER, data, directory, k=K, shard_tokens=100)
    capture_reference(tiny_llama(seed=1), TOKENIZER, directory)
    return directory


@pytest.fixture
def cache(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "cache")


# ---- verify ----------------------------------------------------------------------------------------------------


def test_a_right_cache_has_no_problems(cache, capsys):
    assert list(problems(cache)) == []
    assert main(["cache", "verify", str(cache)]) == 0
    assert "no problem found" in capsys.readouterr().out


def problem_of(cache, path, content):
    """The only problem of a cache after one of its files got another content."""
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        (problem,) = problems(cache)
    finally:
        path.write_bytes(original)
    return problem


@given(st.data())
def test_a_flipped_bit_anywhere_is_found(finished, data):
    files = sorted(p for p in finished.rglob("*") if p.suffix == ".parquet" or p.name == "vocabulary.json")
    path = data.draw(st.sampled_from(files))
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert path.name in problem_of(finished, path, damaged)


def test_a_column_name_that_is_not_text_is_found(finished):
    """One changed bit of the footer makes the name `index` invalid UTF-8."""
    path = next((finished / "reference").glob("*.parquet"))
    assert path.name in problem_of(finished, path, path.read_bytes().replace(b"index", b"\xe9ndex"))


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("chosen_topk_tail", lambda v: v[-1:] + 0.5, "do not sum to one"),
        ("chosen_topk_logps", lambda v: v[-1:] - 9, "do not sum to one"),
        ("rejected_label_logps", lambda v: v[-1:] - 1, "the label"),
        ("rejected_label_logps", lambda v: v[-1:] * 0, "the label"),
        ("rejected_topk_ids", lambda v: v[-2:-1], "an id occurs twice"),
        ("chosen_ids", lambda v: (v[-1:] + 1) % 300, "SHA-256"),
    ],
)
def test_values_that_no_softmax_gives_are_found(cache, capsys, column, change, message):
    name = column.split("_", 1)[1]

    def edit(row):
        value = change(unpack(row[column], name).astype(float))
        row[column] = patched(row[column], name, value.item())

    index = rewrite(cache, edit)
    assert main(["cache", "verify", str(cache)]) == 1
    matching = [line for line in capsys.readouterr().out.splitlines() if message in line]
    assert matching
    assert "tokens have" in matching[0] or f"pair {index}, {column.split('_')[0]}: " in matching[0]


def test_wrong_counts_in_the_manifest_are_found(cache):
    manifest = json.loads((cache / MANIFEST).read_text())
    manifest["shards"][0]["tokens"] += 1
    manifest["shards"][1]["max_id"] -= 1
    (cache / MANIFEST).write_text(json.dumps(manifest))
    tokens, max_id = problems(cache)
    assert "shard-00000.parquet: tokens is" in tokens
    assert "shard-00001.parquet: max_id is" in max_id


def test_a_damaged_reference_is_found(cache):
    path = cache / "reference" / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (problem,) = problems(cache)
    assert "reference" in problem


# ---- info ------------------------------------------------------------------------------------------------------


def test_the_summary_counts_all_tokens(cache, tmp_path, capsys):
    dataset = PairDataset(cache)
    summary = summarize(dataset)
    ranks, masses = {"chosen": [], "rejected": []}, []
    for i in range(len(dataset)):
        item = dataset[i]
        for side in ranks:
            for t, token in enumerate(getattr(item["pair"], f"{side}_ids")):
                ids = item[f"{side}_topk_ids"][t].tolist()
                ranks[side].append(ids.index(token) if token in ids else K)
                masses.append(np.exp(item[f"{side}_topk_logps"][t].astype(float)).cumsum())
    for side, expected in ranks.items():
        assert summary.label_ranks[side].tolist() == np.bincount(expected, minlength=K + 1).tolist()
    np.testing.assert_allclose(summary.mass, np.mean(masses, 0))
    assert summary.histogram.sum(0).tolist() == [len(masses)] * K
    worst = np.quantile(masses, 0.05, axis=0, method="inverted_cdf")
    assert (summary.lowest <= worst).all()
    assert (worst < summary.lowest + 0.02 + 1e-9).all()
    assert summary.repeated_pairs == 1
    assert len(format_summary(summary).splitlines()) == 5  # k = 1, 2, 4, 8 and the heading
    assert main(["cache", "info", str(cache), "--png", str(tmp_path / "k.png")]) == 0
    assert (tmp_path / "k.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "bytes per token" in out
    assert "repeated pairs       1" in out


def test_the_summary_of_k_zero(tmp_path):
    capture_teacher(tiny_llama(), TOKENIZER, tokenize_pairs(RECORDS, TOKENIZER, 60), tmp_path / "cache", k=0)
    summary = summarize(PairDataset(tmp_path / "cache"))
    assert summary.mass.shape == (0,)
    assert sum(summary.tokens.values()) == summary.label_ranks["chosen"][0] + summary.label_ranks["rejected"][0]
    plot_summary(summary, tmp_path / "k.png")
    assert list(problems(tmp_path / "cache")) == []


# ---- folding ---------------------------------------------------------------------------------------------------


def exact(model, item, side, k, vocab_size):
    """Top k among the ids below `vocab_size`, under the whole softmax, in float64."""
    pair = item["pair"]
    answer = getattr(pair, f"{side}_ids")
    ids = torch.tensor([*pair.prompt_ids, *answer])[None]
    with torch.no_grad():
        logps = model.double()(ids).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
    top = logps[:, :vocab_size].topk(k)
    return top.indices, top.values, logps.scatter(1, top.indices, -torch.inf).logsumexp(1)


def check_folded(directory, k, vocab_size):
    dataset = PairDataset(directory, vocab_size=vocab_size, require_reference=False)
    assert dataset.k == k
    model = outside_model()
    for i in range(len(dataset)):
        for side in ("chosen", "rejected"):
            item = dataset[i]
            ids, logps, tail = exact(model, item, side, k, vocab_size)
            np.testing.assert_array_equal(item[f"{side}_topk_ids"], ids)
            np.testing.assert_allclose(item[f"{side}_topk_logps"], logps, atol=1e-2, rtol=0)
            np.testing.assert_allclose(item[f"{side}_topk_tail"], tail, atol=2e-3, rtol=0)
    assert list(problems(directory)) == []
    return dataset


def test_a_smaller_student_is_refused_with_the_command_that_converts(cache, tmp_path, capsys):
    with pytest.raises(CacheVocabularyError, match=r"dadpo cache convert .* --student-vocab-size 300"):
        PairDataset(cache, vocab_size=300)
    out = tmp_path / "converted"
    assert main(["cache", "convert", str(cache), "--student-vocab-size", "300", "--out", str(out)]) == 0
    fewest = min(
        int((PairDataset(cache)[i][f"{side}_topk_ids"] < 300).sum(1).min())
        for i in range(7)
        for side in ("chosen", "rejected")
    )
    assert 0 < fewest < K
    dataset = check_folded(out, fewest, 300)
    assert dataset.has_reference
    assert f"{out}: 7 pairs" in capsys.readouterr().out


def test_a_smaller_k(cache, tmp_path):
    manifest = convert_cache(cache, tmp_path / "three", k=3, shard_tokens=50)
    assert len(manifest.shards) > len(PairDataset(cache).manifest.shards)
    check_folded(tmp_path / "three", 3, 320)
    with pytest.raises(ValueError, match=r"k=9 is outside \[0, 8\]"):
        convert_cache(cache, tmp_path / "nine", k=9)
    with pytest.raises(CacheVocabularyError, match="k=8 are needed"):
        convert_cache(cache, tmp_path / "eight", k=8, student_vocab_size=300)
    with pytest.raises(CacheVocabularyError, match="outside the vocabulary of 100"):
        convert_cache(cache, tmp_path / "hundred", student_vocab_size=100)


def test_capture_for_a_smaller_student(tmp_path):
    data = tokenize_pairs(RECORDS, TOKENIZER, 60)
    model = outside_model()
    capture_teacher(model, TOKENIZER, data, tmp_path / "model", k=4, student_vocab_size=300)
    check_folded(tmp_path / "model", 4, 300)
    with serving(model) as vllm:
        server = CompletionsServer(vllm.url)
        capture_from_server(server, TOKENIZER, data, tmp_path / "server", k=4, vocab_size=320, student_vocab_size=300)
        server.close()
    check_folded(tmp_path / "server", 4, 300)
    with pytest.raises(ValueError, match=r"k=301 is outside \[0, 300\]"):
        capture_teacher(model, TOKENIZER, data, tmp_path / "x", k=301, student_vocab_size=300)
    larger = capture_teacher(tiny_llama(), TOKENIZER, data, tmp_path / "larger", k=4, student_vocab_size=400)
    assert larger.settings["vocab_size"] == 320


def test_fold_adds_what_it_leaves_out():
    p = np.array([[0.4, 0.3, 0.2, 0.05]])
    targets = {
        "label_logps": np.log(p[:, 0]),
        "topk_ids": np.array([[9, 3, 1, 2]]),
        "topk_logps": np.log(p),
        "topk_tail": np.log([0.05]),
    }
    folded = fold("pair 7", targets, 2, 9)
    assert folded["topk_ids"].tolist() == [[3, 1]]
    np.testing.assert_allclose(np.exp(folded["topk_logps"]), [[0.3, 0.2]])
    np.testing.assert_allclose(np.exp(folded["topk_tail"]), 0.5, rtol=1e-6)
    same = fold("pair 7", {**targets, "topk_tail": np.array([-np.inf])}, 4, 10)
    assert same["topk_tail"].tolist() == [-np.inf]
    with pytest.raises(CacheVocabularyError, match="pair 7: at a position only 3 of"):
        fold("pair 7", targets, 4, 9)

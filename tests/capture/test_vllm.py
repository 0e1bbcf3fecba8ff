"""Captures from an inference engine: compared with captures of the same local model, with a failing server, and with
malformed responses."""

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cache.errors import CacheError, CacheSettingsError
from dadpo_kernels.cache.shard_run import plan_shards
from dadpo_kernels.capture.checked_lines import CheckedLines, storage_errors
from dadpo_kernels.capture.errors import ResponseError, ServerError
from dadpo_kernels.capture.local import capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.capture.probe import COMPANY
from dadpo_kernels.capture.prompt_logprobs import answer_targets
from dadpo_kernels.capture.remote import _sequences, capture_from_server, capture_from_vllm
from dadpo_kernels.capture.scored_sequences import ScoredSequences
from dadpo_kernels.capture.server import CompletionsServer
from dadpo_kernels.cli.main import main
from tests.capture.test_local import processes  # noqa: F401  # a fixture
from tests.support import vllm_server
from tests.support.damage import flip_bit
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.support.vllm_server import flat, prompt_logprobs, serving

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama()
DATA = tokenize_pairs(chat_records(8), TOKENIZER, 60)
K, V = 5, 320
IDS = [1, 17, 42, 5]
QUICK = {"backoff": 0.01, "timeout": 10.0}


@pytest.fixture
def vllm():
    with serving(MODEL) as server:
        yield server


def capture(vllm, out, *, concurrency=3, **options):
    with closing(CompletionsServer(vllm.url, **{**QUICK, **options})) as server:
        return capture_from_server(
            server, TOKENIZER, DATA, out, k=K, vocab_size=V, concurrency=concurrency, shard_tokens=100
        )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    directory = tmp_path_factory.mktemp("expected")
    capture_teacher(MODEL, TOKENIZER, DATA, directory, k=K, shard_tokens=100)
    return list(PairDataset(directory, tokenizer=TOKENIZER))


def check(directory, expected):
    dataset = PairDataset(directory, tokenizer=TOKENIZER)
    assert len(dataset) == len(expected) == 8
    for item, other in zip(dataset, expected, strict=True):
        for side in ("chosen", "rejected"):
            np.testing.assert_array_equal(item[f"{side}_topk_ids"], other[f"{side}_topk_ids"])
            np.testing.assert_allclose(item[f"{side}_label_logps"], other[f"{side}_label_logps"], atol=1e-4, rtol=0)
            np.testing.assert_allclose(item[f"{side}_topk_tail"], other[f"{side}_topk_tail"], atol=1e-4, rtol=0)
            np.testing.assert_allclose(item[f"{side}_topk_logps"], other[f"{side}_topk_logps"], atol=2e-2, rtol=0)
    assert not list(directory.glob(".answers*"))


def prompts():
    return sorted((*p.prompt_ids.tolist(), *ids.tolist()) for p in DATA.pairs for ids in p.ids[1:])


def check_sent(vllm, probes):
    """All sequences were scored once, and the first one of each probe twice."""
    assert set(vllm.served) == set(prompts())
    assert len(vllm.served) == len(prompts()) + probes


# ---- the server ------------------------------------------------------------------------------------------------


def test_a_server_gives_the_cache_of_the_model_itself(vllm, tmp_path, expected):
    manifest = capture(vllm, tmp_path, api_key="key")
    check(tmp_path, expected)
    assert manifest.info["model"] == "teacher"
    check_sent(vllm, probes=1)
    assert 1 < vllm.most <= 3
    path, headers, body = vllm.requests[0]
    assert path == "/v1/completions"
    assert headers["Authorization"] == "Bearer key"
    assert body["model"] == "teacher"
    assert (body["prompt_logprobs"], body["max_tokens"]) == (K, 1)
    capture(vllm, tmp_path)
    check_sent(vllm, probes=1)  # the second call does not send a request


FAULTS = [
    vllm_server.drop,
    vllm_server.status(429, [("Retry-After", "0")]),
    vllm_server.status(500),
    vllm_server.status(503, [("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")]),
    vllm_server.half_a_body,
    vllm_server.one_token_less,
]


def test_faults_are_retried_and_scored_sequences_are_not_sent_again(vllm, tmp_path, expected):
    vllm.faults = [*FAULTS, None, *FAULTS[::-1], None, None, *FAULTS]
    capture(vllm, tmp_path)
    check(tmp_path, expected)
    check_sent(vllm, probes=1)
    assert len(vllm.requests) == 17 + 3 * len(FAULTS)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (vllm_server.drop, ServerError, r"cannot be reached: \w+ .*\(tried 2 times\)"),
        (vllm_server.status(500), ServerError, r"responds with status 500: .*requested fault.*\(tried 2 times\)"),
        (vllm_server.half_a_body, ServerError, "cannot be reached"),
        (vllm_server.one_token_less, ResponseError, r"prompt_logprobs of 1 tokens, \d+ were sent"),
        (vllm_server.drip, ServerError, r"no complete response after 0.5 s"),
        (vllm_server.endless, ResponseError, r"more than \d+ bytes"),
    ],
)
def test_a_permanent_fault_raises_its_error(vllm, tmp_path, fault, error, message):
    vllm.faults = [fault] * 1000
    with pytest.raises(error, match=message):
        capture(vllm, tmp_path, attempts=2, timeout=0.5)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (400, r"responds with status 400: .*--max-logprobs 5 or more"),
        (401, "needs an API key"),
        (501, "responds with status 501: .*--max-logprobs"),
        (404, "Check the URL"),
        (413, "accepts no requests of this size: raise its limit, or cut the sequences with a smaller --max-length"),
        (
            307,
            r"It redirects to http://127.0.0.1:\d+/there, and redirects are not followed: give the URL of the server",
        ),
    ],
)
def test_a_refusal_is_not_tried_again(vllm, tmp_path, code, message):
    vllm.faults = [vllm_server.status(code, [("Location", "/there?token=SECRET")] if code == 307 else [])] * 1000
    with pytest.raises(ServerError, match=message):
        capture(vllm, tmp_path)
    sent = [tuple(body["prompt"]) for _, _, body in vllm.requests]
    assert len(sent) == 1


@pytest.mark.parametrize("fault", [vllm_server.status(400), vllm_server.drop], ids=["refusal", "death"])
def test_an_interrupted_run_keeps_all_scored_sequences(vllm, tmp_path, expected, fault):
    for _ in range(3):
        vllm.faults = [None] * 6 + [fault] * 99
        with pytest.raises(ServerError):
            capture(vllm, tmp_path, attempts=2)
    vllm.faults = []
    capture(vllm, tmp_path)
    check(tmp_path, expected)
    assert len(vllm.served) <= 16 + 4 * (1 + COMPANY)  # a probe sends stored sequences where few are missing


def test_the_probe_comes_before_the_first_request_of_a_later_shard(vllm, tmp_path, interrupted):
    """The first shard is stored as a whole, and the server has changed since."""
    part, _ = interrupted
    (name,) = (path.name for path in part.glob(".answers*"))
    first, *_ = plan_shards(DATA.pairs, 100)
    settings = json.loads((part / name).read_text().splitlines()[0].partition(" ")[2])["settings"]
    with closing(ScoredSequences(tmp_path / name, settings)) as store:
        for i, (ids, start) in _sequences(first).items():
            store.write(i, ids, start, answer_targets(prompt_logprobs(MODEL, ids, K), ids, start, K, V))
    vllm.prefix_cache = "unsalted"
    with pytest.raises(ServerError, match="gives other log-probabilities"):
        capture(vllm, tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_killed_at_random_moments(vllm, tmp_path, expected, processes):  # noqa: F811
    rng = random.Random(0)
    deaths = 0
    while deaths < 5:
        process = processes.Process(target=capture, args=(SimpleNamespace(url=vllm.url), tmp_path))
        vllm.faults = [vllm_server.slow] * 99
        process.start()
        process.join(rng.uniform(0.6, 1.5))
        process.kill()
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    vllm.faults = []
    capture(vllm, tmp_path)
    check(tmp_path, expected)
    assert set(vllm.served) == set(prompts())
    # Only a probe's sequences, and requests that were active at a kill, are sent again.
    assert len(vllm.served) <= 16 + (1 + COMPANY) + (3 + 2 + COMPANY) * deaths


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """An interrupted capture, whose first shard is scored but for one sequence, and the shards of a finished one."""
    directory = tmp_path_factory.mktemp("interrupted")
    with serving(MODEL) as server:
        capture(server, directory / "whole")
        server.faults = [None] * 5 + [vllm_server.status(400)] * 99
        with pytest.raises(ServerError):
            capture(server, directory / "part", concurrency=1)
    return directory / "part", [path.read_bytes() for path in sorted((directory / "whole").glob("*.parquet"))]


def test_a_flipped_bit_in_scored_sequences_changes_nothing(vllm, tmp_path, interrupted, caplog):
    part, shards = interrupted
    (store,) = part.glob(".answers*")
    content, rng = store.read_bytes(), random.Random(0)
    assert content.count(b"\n") == 5
    for number in range(20):
        out = tmp_path / str(number)
        shutil.copytree(part, out)
        (out / store.name).write_bytes(flip_bit(content, rng))
        vllm.served.clear()
        capture(vllm, out)
        assert [path.read_bytes() for path in sorted(out.glob("*.parquet"))] == shards
        assert len(vllm.served) <= 16 - 3 + 1 + COMPANY
    assert "1 damaged lines are removed, what they held is computed again" in caplog.text


def test_a_store_that_is_no_store_is_scored_again(vllm, tmp_path, interrupted, caplog):
    part, shards = interrupted
    (store,) = part.glob(".answers*")
    content = store.read_bytes()
    for number, damaged in enumerate((b"", b"SQLite format 3", b"\n\n", content[:-5000], content[200:])):
        out = tmp_path / str(number)
        shutil.copytree(part, out)
        (out / store.name).write_bytes(damaged)
        capture(vllm, out)
        assert [path.read_bytes() for path in sorted(out.glob("*.parquet"))] == shards
    assert "or its beginning is damaged: move it. It is deleted, its sequences are scored again" in caplog.text


def test_a_stored_sequence_with_other_tokens_is_not_used(tmp_path):
    targets = answer_targets(prompt_logprobs(MODEL, IDS, K), IDS, 2, K, V)
    with closing(ScoredSequences(tmp_path / "store", {"k": K})) as store:
        store.write(3, IDS, 2, targets)
    with closing(ScoredSequences(tmp_path / "store", {"k": K})) as store:
        for name, values in store.read(3, IDS, 2).items():
            np.testing.assert_array_equal(values, targets[name].astype(values.dtype))
        for number, ids, start in ((4, IDS, 2), (3, IDS[::-1], 2), (3, IDS, 1)):
            assert store.read(number, ids, start) is None
    with closing(ScoredSequences(tmp_path / "store", {"k": 4})) as store:
        assert store.read(3, IDS, 2) is None


def test_a_directory_in_place_of_the_store(vllm, tmp_path, interrupted):
    part, _ = interrupted
    (store,) = part.glob(".answers*")
    (tmp_path / store.name).mkdir()
    with pytest.raises(CacheError, match=f"{store.name}: Is a directory: move this directory"):
        capture(vllm, tmp_path)


def test_a_full_disk(vllm, tmp_path, interrupted, monkeypatch):
    """The third sequence cannot be stored; the run goes on when there is space again."""
    _, shards = interrupted
    results = iter([0] * 3)

    def append(lines, record, real=CheckedLines.append):
        with storage_errors(lines._path):
            if next(results, errno.ENOSPC):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(lines, record)

    monkeypatch.setattr(CheckedLines, "append", append)
    with pytest.raises(CacheError, match="No space left on device: free some space and run the same command again"):
        capture(vllm, tmp_path)
    monkeypatch.undo()
    vllm.served.clear()
    capture(vllm, tmp_path)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.parquet"))] == shards


def test_another_model_or_k_is_refused(vllm, tmp_path):
    capture(vllm, tmp_path)
    with pytest.raises(CacheSettingsError, match="served_model was 'teacher' and is 'other' now"):
        capture(vllm, tmp_path, model="other")


def test_one_of_several_models_must_be_named(tmp_path):
    with serving(MODEL, models=("a", "b")) as vllm:
        with pytest.raises(ServerError, match="serves 2 models, give the name of one of them: a, b"):
            capture(vllm, tmp_path)
        capture(vllm, tmp_path, model="b")
        assert vllm.requests[0][2]["model"] == "b"


def test_no_server(tmp_path):
    for url in (
        "localhost:8000",
        "http://",
        "ftp://host",
        "http://h:99999",
        "http://h:x",
        "http://[::1",
        "http://a..b",
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"must begin with http:// or https:// and name a host, got {url!r}")
        ):
            CompletionsServer(url)
    with pytest.raises(ServerError, match="cannot be reached: ConnectError"):
        CompletionsServer("http://127.0.0.1:9", attempts=1)


def test_the_command(vllm, tmp_path, expected, capsys, monkeypatch):
    MODEL.config.save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in chat_records(8)))
    arguments = ["teacher", "--model", tmp_path / "teacher", "--data", tmp_path / "pairs.jsonl", "--out",
                 tmp_path / "cache", "--k", K, "--max-length", 60, "--server", vllm.url + "/v1/"]  # fmt: skip
    assert main([*map(str, arguments), "--api-key-env", "NOT_SET"]) == 2
    assert "NOT_SET is not set" in capsys.readouterr().err
    monkeypatch.setenv("A_KEY", "key")
    assert main([*map(str, arguments), "--api-key-env", "A_KEY"]) == 0
    check(tmp_path / "cache", expected)
    assert vllm.requests[0][1]["Authorization"] == "Bearer key"


# ---- the Python API --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat_logprobs", [True, False])
def test_vllm_in_this_process(tmp_path, expected, monkeypatch, flat_logprobs):
    given_params, salts = {}, []

    def sampling_params(**options):
        given_params.update(options)
        return options

    class LLM:
        def generate(self, prompts, params, use_tqdm):
            for prompt in prompts:
                ids = prompt["prompt_token_ids"]
                salts.append(prompt["cache_salt"])
                entries = prompt_logprobs(MODEL, ids, params["prompt_logprobs"])
                yield SimpleNamespace(prompt_logprobs=flat(entries, ids) if flat_logprobs else entries)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=sampling_params))
    options = {"k": K, "vocab_size": V, "model": "teacher", "shard_tokens": 100, "flat_logprobs": flat_logprobs}
    capture_from_vllm(LLM(), TOKENIZER, DATA, tmp_path, **options)
    check(tmp_path, expected)
    assert given_params.get("flat_logprobs", False) == flat_logprobs
    assert len(set(salts)) == 16


def test_nothing_is_tried_again_after_a_stop(vllm):
    vllm.faults = [vllm_server.status(500)] * 9
    stopped = threading.Event()
    stopped.set()
    with closing(CompletionsServer(vllm.url, backoff=60)) as server, pytest.raises(ServerError, match="tried 1 times"):
        server.score(IDS, 1, K, lambda logprobs: logprobs, stopped)


def test_one_answer_each(vllm, tmp_path):
    """As by the local capture, and without a request for the answers that are not there."""
    records = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in chat_records(3)]
    data = tokenize_pairs(records, TOKENIZER)
    capture_teacher(MODEL, TOKENIZER, data, tmp_path / "local", k=K)
    with closing(CompletionsServer(vllm.url, **QUICK)) as server:
        capture_from_server(server, TOKENIZER, data, tmp_path / "server", k=K, vocab_size=V)
    for item, other in zip(PairDataset(tmp_path / "local"), PairDataset(tmp_path / "server"), strict=True):
        np.testing.assert_allclose(item["chosen_label_logps"], other["chosen_label_logps"], atol=1e-4, rtol=0)
        assert other["rejected_topk_ids"].shape == (0, K)
    prompts = {(*pair.prompt_ids, *pair.chosen_ids) for pair in data.pairs}
    assert set(vllm.served) == prompts

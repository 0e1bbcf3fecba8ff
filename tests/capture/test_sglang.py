"""Captures from SGLang's `/generate`: compared with a capture of the same local model, and malformed responses."""

import json
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadpo_kernels.capture.errors import ResponseError, ServerError
from dadpo_kernels.capture.prompt_logprobs import answer_targets, from_sglang
from dadpo_kernels.capture.remote import capture_from_server
from dadpo_kernels.capture.server import SGLangServer
from dadpo_kernels.cli.main import main
from tests.capture.test_prompt_logprobs import JSON
from tests.capture.test_vllm import DATA, IDS, MODEL, QUICK, TOKENIZER, K, V, check, check_sent, expected, vllm  # noqa: F401
from tests.support import vllm_server
from tests.support.tiny import chat_records
from tests.support.vllm_server import as_sglang, prompt_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")
START = 2
GOOD = as_sglang(prompt_logprobs(MODEL, IDS, K), IDS, START - 1, K)


def capture(server, out, k=K, **options):
    with closing(SGLangServer(server.url, **{**QUICK, **options})) as client:
        return capture_from_server(client, TOKENIZER, DATA, out, k=k, vocab_size=V, concurrency=3, shard_tokens=100)


def test_sglang_gives_the_cache_of_the_model_itself(vllm, tmp_path, expected):  # noqa: F811
    vllm.faults = [vllm_server.status(500), vllm_server.drop, None, vllm_server.half_a_body]
    capture(vllm, tmp_path)
    check(tmp_path, expected)
    check_sent(vllm, probes=1)
    path, _, body = vllm.requests[0]
    assert path == "/generate"
    prompt = next(p for p in DATA.pairs if [*p.prompt_ids] == body["input_ids"][: len(p.prompt_ids)]).prompt_ids
    assert body["logprob_start_len"] == len(prompt) - 1  # the server does not compute log-probabilities of the prompt


def test_no_top_k_at_all(vllm, tmp_path):  # noqa: F811
    manifest = capture(vllm, tmp_path, k=0)
    assert manifest.settings["k"] == 0
    assert "input_top_logprobs" not in as_sglang(prompt_logprobs(MODEL, IDS, 0), IDS, 0, 0)


def test_a_refusal_names_the_limit_of_sglang(vllm, tmp_path):  # noqa: F811
    vllm.faults = [vllm_server.status(400)] * 99
    with pytest.raises(
        ServerError, match=r"responds with status 400: .*SGLang must .* --context-length above \d+ tokens"
    ):
        capture(vllm, tmp_path)


def test_the_command(vllm, tmp_path, expected):  # noqa: F811
    MODEL.config.save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in chat_records(8)))
    words = ["teacher", "--model", tmp_path / "teacher", "--data", tmp_path / "pairs.jsonl", "--out",
             tmp_path / "cache", "--k", K, "--max-length", 60, "--server", vllm.url, "--engine", "sglang"]  # fmt: skip
    assert main([*map(str, words)]) == 0
    check(tmp_path / "cache", expected)
    assert {path for path, _, _ in vllm.requests} == {"/generate"}


def targets(meta_info, ids=IDS, start=START, k=K):
    return answer_targets(from_sglang(meta_info, ids, start, k), ids, start, k, V)


def test_special_values():
    """A label outside the top k, -inf as null, and the last id, which SGLang reports as 0."""
    labels = [[None, 1, None], [0.0, 9, "x"], [-2.0, 0, None]]
    best = [None, [[0.0, 9, "x"], [None, 3, "y"]], [[-0.5, 7, None], [-1.5, 8, None]]]
    converted = targets({"input_token_logprobs": labels, "input_top_logprobs": best}, [1, 9, V - 1], 1, 2)
    assert converted["topk_ids"].tolist() == [[9, 3], [7, 8]]
    np.testing.assert_array_equal(converted["topk_logps"], [[0.0, -np.inf], [-0.5, -1.5]])
    np.testing.assert_array_equal(converted["label_logps"], [0.0, -2.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: None, "input_token_logprobs of no tokens"),
        (lambda m: {}, "input_token_logprobs of no tokens, 3 were requested"),
        (lambda m: {**m, "input_token_logprobs": m["input_token_logprobs"][1:]}, "of 2 tokens, 3 were requested"),
        (lambda m: {**m, "input_top_logprobs": m["input_top_logprobs"] * 2}, "input_top_logprobs of 6 tokens"),
        (lambda m: {**m, "input_token_logprobs": [None, [-1.0, 41], [-1.0, 5]]}, "is token 42, the server scored 41"),
        (lambda m: {**m, "input_top_logprobs": [None, None, None]}, "position 2 is malformed"),
        (lambda m: {**m, "input_top_logprobs": [None, [[-1.0]], []]}, "position 2 is malformed"),
        (lambda m: {**m, "input_top_logprobs": [None, [], []]}, "has 1 log-probabilities"),
        (lambda m: {**m, "input_token_logprobs": [None, [None, 42], [-1.0, 5]]}, "label of probability 0"),
    ],
)
def test_malformed_responses_are_refused(change, message):
    with pytest.raises(ResponseError, match=message):
        targets(change(GOOD))


@given(st.data())
def test_a_changed_response_gives_an_error_or_log_probabilities(data):
    """One value of a valid response is replaced by arbitrary JSON."""
    document = json.loads(json.dumps(GOOD))
    target, key = document, data.draw(st.sampled_from(sorted(document)))
    for _ in range(data.draw(st.integers(0, 3))):
        if not isinstance(target[key], list) or not target[key]:
            break
        target, key = target[key], data.draw(st.integers(0, len(target[key]) - 1))
    target[key] = data.draw(JSON)
    try:
        converted = targets(document)
    except ResponseError:
        return
    mass = np.exp(converted["topk_logps"].astype(float)).sum(1) + np.exp(converted["topk_tail"].astype(float))
    np.testing.assert_allclose(mass, 1, atol=5e-3)


def test_both_forms_of_a_response_give_the_same_targets():
    direct = answer_targets(prompt_logprobs(MODEL, IDS, K), IDS, START, K, V)
    for name, values in targets(GOOD).items():
        np.testing.assert_array_equal(values, direct[name])

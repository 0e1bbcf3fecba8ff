"""The content of a server's responses: right, malformed, changed in one place, or arbitrary."""

import json
import math
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadpo_kernels.capture.errors import ResponseError
from dadpo_kernels.capture.prompt_logprobs import answer_targets
from dadpo_kernels.capture.server import CompletionsServer
from tests.support.tiny import tiny_llama
from tests.support.vllm_server import as_json, prompt_logprobs, serving

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = tiny_llama()
K, V = 5, 320


def entry(logps):
    return {i: SimpleNamespace(logprob=x) for i, x in logps.items()}


def one(logps, token, k, vocab_size=100):
    """Targets of a single answer token after a prompt of one."""
    targets = answer_targets([None, entry(logps)], [1, token], 1, k, vocab_size)
    return {name: values[0].tolist() for name, values in targets.items()}


def test_the_label_inside_and_outside_the_top_k():
    inside = one({7: math.log(0.2), 3: math.log(0.5)}, 7, 2)
    assert inside["topk_ids"] == [3, 7]
    assert inside["topk_logps"] == pytest.approx([math.log(0.5), math.log(0.2)], abs=1e-3)
    assert inside["label_logps"] == pytest.approx(math.log(0.2))
    assert inside["topk_tail"] == pytest.approx(math.log(0.3))
    outside = one({9: math.log(0.1), 3: math.log(0.5), 7: math.log(0.2)}, 9, 2)
    assert outside == {**inside, "label_logps": pytest.approx(math.log(0.1))}
    assert one({9: math.log(0.1)}, 9, 0)["topk_tail"] == 0  # k = 0: the label only, all mass is outside
    equal = one({9: math.log(0.2), 3: math.log(0.2), 7: math.log(0.2)}, 9, 2)
    assert equal["topk_ids"] == [3, 7]  # equal entries are sorted by id


def test_minus_infinity_comes_as_a_number():
    values = one({3: -9999.0, 2: 0.0}, 2, 2)
    assert values["topk_logps"] == [0.0, -math.inf]
    assert values["topk_tail"] == pytest.approx(math.log(98) - 9999)
    with pytest.raises(ResponseError, match="label of probability 0"):
        one({3: -9999.0, 2: 0.0}, 3, 2)


def test_the_tail_of_a_confident_teacher_is_bounded_by_what_is_known():
    confident = one({2: -1e-9, 3: -40.0}, 2, 2)
    assert confident["topk_tail"] <= math.log(98) - 40 + 1e-4  # 98 ids of at most exp(-40), not float32's 6e-8
    known = one({2: 0.0, 3: -14.0, 4: -15.0}, 4, 2)
    assert known["topk_tail"] == pytest.approx(-15.0)  # the label is outside, and more than what rounding hides
    assert one({1: 1e-7, 0: -20.0}, 1, 2, vocab_size=2)["topk_tail"] == -math.inf  # no id is outside


@pytest.mark.parametrize(
    ("logps", "token", "k", "message"),
    [
        ({3: -1.0, 4: -2.0}, 5, 2, "that of token 5 is missing"),
        ({3: -1.0, 4: -2.0, 5: -3.0, 6: -3.0}, 5, 2, "has 4 log-probabilities"),
        ({5: -1.0}, 5, 2, "has 1 log-probabilities"),
        ({5: math.nan, 3: -1.0}, 5, 2, "not log-probabilities"),
        ({5: 0.5, 3: -1.0}, 5, 2, "not log-probabilities"),
        ({5: -0.1, 3: -0.1}, 5, 2, "probabilities sum to 1.8"),
        ({3: -1.0, 5: -9.0}, 5, 2, r"top 2 sum to 0.3680, .* one of the top k is missing"),
        ({5: -1.0, 100: -1.0}, 5, 2, "outside the vocabulary of 100"),
        ({5: -1.0, -1: -1.0}, 5, 2, "outside the vocabulary"),
        ({5: -1.0, 3: -2.0, 4: -2.0}, 5, 2, "a label outside the top k is more probable"),
        ({5: "-1.0", 3: -2.0}, 5, 2, "is not an id with a logprob"),
        ({5: True, 3: -2.0}, 5, 2, "is not an id with a logprob"),
        ({5: 10**400, 3: -2.0}, 5, 2, "not log-probabilities"),
        ({"5 ": -1.0, 3: -2.0}, 5, 2, "is not an id with a logprob"),
        ({"5_0": -1.0, 3: -2.0}, 5, 2, "is not an id with a logprob"),
        ({"05": -1.0, "5": -2.0}, 5, 2, "has 1 log-probabilities"),
    ],
)
def test_malformed_responses_are_refused(logps, token, k, message):
    with pytest.raises(ResponseError, match=message):
        one(logps, token, k)


def test_responses_of_other_lengths_are_refused():
    for wrong in (None, "", [], [None], [None] * 3, {"1": 1}, 5):
        with pytest.raises(ResponseError, match=r"prompt_logprobs of (no|\d) tokens, 2 were sent"):
            answer_targets(wrong, [1, 2], 1, 0, 9)
    with pytest.raises(ResponseError, match="position 1 does not have log-probabilities"):
        answer_targets([None, None], [1, 2], 1, 0, 9)


IDS = [1, 17, 42, 5]
GOOD = as_json(prompt_logprobs(MODEL, IDS, K))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("0123456789.-", max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.data())
def test_a_changed_response_gives_an_error_or_log_probabilities(data):
    """One value of a valid response is replaced by arbitrary JSON."""
    document = json.loads(json.dumps(GOOD))
    at = data.draw(st.integers(1, len(IDS) - 1))
    where = data.draw(st.sampled_from(["position", "entry", "logprob", "key"]))
    value = data.draw(JSON)
    key = data.draw(st.sampled_from(sorted(document[at])))
    if where == "position":
        document[at] = value
    elif where == "entry":
        document[at][key] = value
    elif where == "logprob":
        document[at][key]["logprob"] = value
    else:
        document[at][data.draw(st.text("0123456789 _+-", max_size=5))] = document[at].pop(key)
    try:
        targets = answer_targets(document, IDS, 1, K, V)
    except ResponseError:
        return
    for name, values in targets.items():
        assert not np.isnan(values.astype(float)).any()
        assert (values <= 1e-3).all() or name == "topk_ids"
    mass = np.exp(targets["topk_logps"].astype(float)).sum(1) + np.exp(targets["topk_tail"].astype(float))
    np.testing.assert_allclose(mass, 1, atol=5e-3)


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_an_arbitrary_body_gives_a_typed_error(arbitrary, body):
    server, client = arbitrary
    server.change = lambda _: body
    with pytest.raises(ResponseError):
        client.score(IDS, 1, K, lambda logprobs: answer_targets(logprobs, IDS, 1, K, V))


@pytest.fixture(scope="module")
def arbitrary():
    with serving(MODEL) as server, closing(CompletionsServer(server.url, attempts=1)) as client:
        yield server, client

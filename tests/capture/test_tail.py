"""The mass outside the top k, which servers do not return: compared with that in float64, in each engine's form."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dadpo_kernels.cache.fold import fold
from dadpo_kernels.capture.prompt_logprobs import answer_targets, from_sglang
from tests.support.vllm_server import as_json, as_sglang, flat

LENGTH = 60


def float32_log_softmax(logits):
    """Rounded after each step, as an engine does it; its sum is correctly rounded."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted.astype(np.float64)).sum(-1, keepdims=True).astype(np.float32)
    return shifted - np.log(total)


def teacher(vocab_size, seed):
    """Float32 logits of `LENGTH` positions, from an even teacher to one that is certain up to exp(-40), and labels
    inside and outside the top k."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.5, 4, (LENGTH, 1)), (LENGTH, vocab_size))
    best = rng.integers(vocab_size, size=LENGTH)
    logits[np.arange(LENGTH), best] = logits.max(1) + rng.uniform(0, 40, LENGTH)
    labels = np.where(rng.random(LENGTH) < 0.3, rng.integers(vocab_size, size=LENGTH), best)
    return logits.astype(np.float32), labels.tolist()


def entries(logps, labels, k):
    """vLLM's `prompt_logprobs` after a prompt of one token."""
    positions = [None]
    for row, token in zip(logps, labels, strict=True):
        order = np.argsort(-row, kind="stable")
        rank = {i: n for n, i in enumerate(order.tolist(), 1)}
        listed = dict.fromkeys([token, *order[:k].tolist()])
        positions.append({i: SimpleNamespace(logprob=float(row[i]), rank=rank[i], decoded_token="x") for i in listed})
    return positions


def mass_outside(logits, topk_ids):
    exact = logits.astype(np.float64)
    p = np.exp(exact - exact.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.put_along_axis(p, topk_ids, 0, 1)
    return p.sum(1)


@pytest.mark.parametrize("k", [1, 4, 64])
@pytest.mark.parametrize("vocab_size", [65, 300, 3000])
def test_the_tail_is_finite_and_as_near_as_float32_allows(vocab_size, k):
    lost = 0
    for seed in range(20):
        logits, labels = teacher(vocab_size, seed)
        logps = float32_log_softmax(logits)
        ids = [0, *labels]
        targets = answer_targets(entries(logps, labels, k), ids, 1, k, vocab_size)
        topk = np.take_along_axis(logps, targets["topk_ids"].astype(np.int64), 1).astype(np.float64)
        tail, p = targets["topk_tail"].astype(np.float64), np.exp(topk)
        lost += (p.sum(1) >= 1).sum()
        assert np.isfinite(tail).all()
        assert (tail <= np.log(vocab_size - k) + topk[:, -1] + 1e-4).all()
        outside = (targets["topk_ids"] != np.array(labels)[:, None]).all(1)
        assert (tail >= targets["label_logps"])[outside].all()
        bound = 2**-23 * (1 + (p * abs(topk)).sum(1))
        error = abs(np.exp(tail) - mass_outside(logits, targets["topk_ids"].astype(np.int64)))
        assert (error <= bound + 1e-6 * np.exp(tail)).all()  # the tail is stored as float32
    assert lost > 20  # rounding hid the whole tail this often


def test_all_forms_of_a_response_have_a_finite_tail():
    vocab_size, k = 300, 8
    logits, labels = teacher(vocab_size, 1)
    logps = float32_log_softmax(logits)
    listed, ids = entries(logps, labels, k), [0, *labels]
    targets = answer_targets(listed, ids, 1, k, vocab_size)
    assert (np.exp(targets["topk_logps"].astype(np.float64)).sum(1) >= 1).any()
    sglang = from_sglang(as_sglang(listed, ids, 0, k), ids, 1, k)
    for form in (as_json(listed), flat(listed, ids), sglang):
        for name, values in answer_targets(form, ids, 1, k, vocab_size).items():
            np.testing.assert_array_equal(values, targets[name])
    for kept, student in ((2, 290), (k, vocab_size)):
        folded = fold("pair 0", targets, kept, student)
        assert np.isfinite(folded["topk_tail"]).all()
        assert (folded["topk_tail"] >= targets["topk_tail"]).all()


def one(logps, k, vocab_size):
    positions = [None, {str(i): {"logprob": x} for i, x in logps.items()}]
    return answer_targets(positions, [1, next(iter(logps))], 1, k, vocab_size)["topk_tail"].item()


def test_what_rounding_hides():
    """What SmolLM2 returned where its tails are exp(-16.84) and exp(-17.06)."""
    assert one({2: 0.0, 3: -16.0}, 2, 49152) == pytest.approx(math.log(2**-23 * (1 + 16 * math.exp(-16))))
    assert one({2: 0.0, 3: -30.0}, 2, 49152) == pytest.approx(math.log(49150) - 30)  # no token outside has more
    assert one({2: 0.0, 3: -9999.0}, 2, 49152) == pytest.approx(math.log(49150) - 9999)
    assert one({2: 0.0, 1: -16.0}, 2, 3) == pytest.approx(-16)  # a single id is outside
    assert one({1: 0.0, 0: -16.0}, 2, 2) == -math.inf  # none is

"""A record that cannot be used is refused with its place, whatever is wrong with it."""

import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dadpo_kernels.capture.teacher_data.scored import TeacherDataError
from tests.capture.teacher_data.imported import MAKE, rows, run
from tests.support import foreign
from tests.support.foreign import VOCAB


def set_(name, value):
    """Replace a column, or a value at a place in it."""

    def change(record):
        *path, last = name if isinstance(name, tuple) else (name,)
        for step in path:
            record = record[step]
        record[last] = value

    return change


FAULTS = [
    ("axolotl", set_("labels", None), "missing or null: labels; the record has: input_ids"),
    ("axolotl", set_("labels", [-100] * 24), "target_mask fits labels neither"),
    ("axolotl", set_(("labels", 9), 5), "labels must be the 24 tokens of input_ids"),
    ("axolotl", set_("position_ids", [*range(12), *range(12)]), "several sequences are packed"),
    ("axolotl", set_("target_token_ids", [[1] * 8] * 5), "target_token_ids has 5 rows, 24 are needed"),
    ("axolotl", set_("input_ids", "12 3"), "input_ids must be a list of integers"),
    ("axolotl", set_("input_ids", [1.5] * 24), "input_ids must be a list of integers"),
    ("axolotl", set_(("input_ids", 2), 10**30), "input_ids must be a list of integers"),
    ("axolotl", set_(("target_logprobs", 9, 0), "a"), "target_logprobs must hold lists of numbers"),
    ("axolotl", set_(("target_logprobs", 9, 0), None), "target_logprobs must hold lists of numbers"),
    ("axolotl", set_(("target_logprobs", 9), [-1.0]), "row 9 has 8 target_token_ids and 1 target_logprobs"),
    ("axolotl", set_(("target_logprobs", 9), -1.0), "target_logprobs must be a list of lists"),
    ("verl", set_("input_ids", [0] * 3 + [VOCAB] * 24 + [0] * 2), "token 300 is outside the vocabulary of 300"),
    ("verl", set_(("teacher_ids", 15, 3), VOCAB), "an entry with id 300 is outside the vocabulary"),
    ("verl", set_(("teacher_ids", 15, 3), -1), "an entry with id -1 is outside the vocabulary"),
    ("verl", set_(("teacher_logprobs", 15, 3), float("nan")), "an entry of nan, which is not a log-probability"),
    ("verl", set_(("teacher_logprobs", 15, 3), 0.5), "token 13 has an entry of 0.5, which is not a log-probability"),
    ("verl", set_(("teacher_logprobs", 15), [-0.1] * 8), "probabilities sum to 7.2387"),
    ("verl", set_(("teacher_logprobs", 15), [-50.0] * 8), "one of the top k is missing"),
    ("verl", set_(("attention_mask", 15), 0), "attention_mask must be one run"),
    ("verl", set_("response_mask", [1] * 50), "do not belong together"),
    ("verl", set_("response_mask", [0] * 5), "has no target that can be used"),
    ("trl", set_(("actual_token_ids", 0, 3, 0), 299), "these tokens: the server scored others"),
    ("trl", set_(("prompt_lengths", 0), 6), "logprob_token_ids has 17 rows, 18 are needed"),
    ("trl", set_(("prompt_lengths", 0), 24), "a prompt_length of 24"),
    ("trl", set_(("prompt_lengths", 0), 0), "a prompt_length of 0"),
    ("trl", set_("prompt_lengths", [7, 7]), "1 sequences, 2 prompt_lengths"),
    ("trl", set_(("actual_logprobs", 0, 3, 0), float("-inf")), None),  # known from its entry
    ("trl", set_(("logprobs", 0, 3), [float("-inf")] * 8), "token 10 has 0 entries"),
    ("distillkit", set_(("compressed_logprobs", 3), [0] * 31), "the configuration gives 32"),
    ("distillkit", set_(("bytepacked_indices", 3, 0), 256), "bytepacked_indices holds values that are not bytes"),
    ("distillkit", set_("compressed_logprobs", []), "0 rows of compressed_logprobs for 24 tokens"),
    ("distillkit", set_("attention_mask", [0] * 24), "attention_mask has zeros"),
    ("distillkit", set_("labels", [5] * 24), "labels must be the 24 tokens of input_ids"),
    ("distillkit", set_("labels", [5] * 3), "labels must be the 24 tokens of input_ids"),
    ("axolotl", set_("attention_mask", [1] * 23 + [0]), "attention_mask has zeros"),
]  # fmt: skip


@pytest.mark.parametrize(("data_format", "change", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_refused_with_their_place(data_format, change, message, tmp_path):
    record = MAKE[data_format](foreign.scored())
    change(record)
    if message is None:
        run(tmp_path, data_format, [record])
        return
    with pytest.raises(TeacherDataError) as error:
        run(tmp_path, data_format, [record])
    assert message in str(error.value)
    assert f"{tmp_path / 'data.jsonl'}" in str(error.value)
    assert "\n" not in str(error.value)
    good = MAKE[data_format](foreign.scored(5))
    result = run(tmp_path, data_format, [record, good, good], on_error="skip")
    assert len(result.skipped) == (0 if "no target" in message else 1)
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("record", ["text", 5, None, {}])
@pytest.mark.parametrize("data_format", MAKE)
def test_records_of_another_kind(data_format, record, tmp_path):
    with pytest.raises(TeacherDataError, match=r"line 1: missing or null: .*; the record has:"):
        run(tmp_path, data_format, [record])


def test_an_entry_twice(tmp_path):
    record = foreign.verl(foreign.scored())
    record["teacher_ids"][15][3] = record["teacher_ids"][15][2]
    with pytest.raises(TeacherDataError, match="token 13 has two entries with the same id"):
        run(tmp_path, "verl", [record])


ODD = [
    None, True, -1, 0, 1, 2**31, 2**64, 10**400, 1.5, 1e-9, -0.0, -300.0, -9998.0, -1e9,
    float("nan"), float("inf"), float("-inf"), "x", "", [], {}, [[]], [None], [1, [2]], [0.5],
]  # fmt: skip


def damage(value, random):
    """Replace, remove, repeat or exchange something at any depth of lists and dictionaries."""
    while True:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], list | dict) or not value[key] or random.random() < 0.2:
            break
        value = value[key]
    how = random.choice(["replace", "replace", "remove", "repeat", "exchange"])
    if how == "remove":
        del value[key]
    elif how == "exchange":
        value[key] = value[random.choice(list(value) if isinstance(value, dict) else range(len(value)))]
    elif how == "repeat" and isinstance(value, list):
        value.insert(key, value[key])
    else:
        value[key] = random.choice(ODD)


@pytest.mark.parametrize("data_format", MAKE)
@hypothesis.given(random=st.randoms(use_true_random=False), options=st.sampled_from([{}, {"label_bound": True}]))
@hypothesis.settings(max_examples=40)
def test_damaged_records_are_refused_or_valid(data_format, random, options):
    records = [MAKE[data_format](foreign.scored(seed, length=12)) for seed in range(2)]
    for _ in range(random.randint(1, 3)):
        if records[0]:
            damage(records[0], random)
    with tempfile.TemporaryDirectory() as directory:
        try:
            run(Path(directory), data_format, records, on_error="skip", **options)
        except TeacherDataError:  # renormalised or shifted
            return
        for row in rows(Path(directory)):
            assert all(np.isfinite(row[f"chosen_{name}"]).all() for name in ("label_logps", "topk_logps", "topk_tail"))

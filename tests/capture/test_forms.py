"""The forms of published preference sets, each from a small sample of its shape."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadpo_kernels.capture.forms import _FORMS, as_pair
from dadpo_kernels.capture.pairs import PairRecords, read_pairs, tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.support.tiny import tiny_tokenizer


def said(role, text):
    return [{"role": role, "content": text}]


def user(text):
    return said("user", text)


def assistant(text):
    return said("assistant", text)


SYSTEM = said("system", "Be brief.")
GOOD, BAD = assistant("good"), assistant("bad")
PAIR = {"prompt": user("Why?"), "chosen": GOOD, "rejected": BAD}
WITH_SYSTEM = PAIR | {"prompt": SYSTEM + user("Why?")}
ONE = {"prompt": user("Why?"), "completion": GOOD}
ANSWERS = {"chosen": "good", "rejected": "bad"}
WHOLE = {"chosen": user("Why?") + GOOD, "rejected": user("Why?") + BAD}
HUMAN, GPT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "good"}
ONE_TEXT = {"prompt": "a text", "completion": " good"}
TEXT = {"prompt": "a text", "chosen": " good", "rejected": " bad"}

FORMS = {
    "orca_dpo_pairs": ({"system": "Be brief.", "question": "Why?", **ANSWERS}, WITH_SYSTEM),
    "alpaca ranking": ({"instruction": "Why?", "input": "", **ANSWERS}, PAIR),
    "alpaca ranking with input": (
        {"instruction": "Add.", "input": "1 2", **ANSWERS},
        PAIR | {"prompt": user("Add.\n1 2")},
    ),
    "alpaca ranking with history": (
        {"instruction": "Why?", "system": "Be brief.", "history": [["Hi", "Hello"]], **ANSWERS},
        PAIR | {"prompt": SYSTEM + user("Hi") + assistant("Hello") + user("Why?")},
    ),
    "system beside a prompt": ({"system": "Be brief.", "prompt": "Why?", **ANSWERS}, WITH_SYSTEM),
    "system beside conversations": ({"system": "Be brief.", "question": "Why?", **WHOLE}, WITH_SYSTEM),
    "the same system twice": ({"system": "Be brief.", **WITH_SYSTEM}, WITH_SYSTEM),
    "prompt and messages": ({"prompt": "Why?", "chosen": GOOD, "rejected": BAD}, PAIR),
    "prompt and a message": ({"prompt": "Why?", "chosen": GOOD[0], "rejected": BAD[0]}, PAIR),
    "sharegpt ranking": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "bad"}},
        PAIR,
    ),
    "sharegpt ranking with system": ({"system": "Be brief.", "conversations": [HUMAN], **ANSWERS}, WITH_SYSTEM),
    "ms-swift": ({"messages": user("Why?") + GOOD, "rejected_response": "bad"}, PAIR),
    "openai": (
        {"input": {"messages": user("Why?"), "tools": []}, "preferred_output": GOOD, "non_preferred_output": BAD},
        PAIR,
    ),
    "argilla": ({"instruction": "Why?", "chosen_response": "good", "rejected_response": "bad"}, PAIR),
    "nectar": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: ",
            "answers": [
                {"answer": "so so", "model": "a", "rank": 2.0},
                {"answer": "good", "model": "b", "rank": 1.0},
                {"answer": "bad", "model": "c", "rank": 3.0},
            ],
            "turns": 2,
        },
        PAIR | {"prompt": user("Hi") + assistant("Hello") + user("Why?")},
    ),
    "ultrafeedback": (
        {
            "source": "evol_instruct",
            "instruction": "Why?",
            "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": "bad", "overall_score": 2.5},
                {"model": "b", "response": "good", "overall_score": 8.0},
            ],
        },
        PAIR,
    ),
    "trl prompt-completion": (ONE_TEXT, ONE_TEXT),
    "messages": ({"messages": user("Why?") + GOOD}, ONE),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, ONE),
    "alpaca": ({"instruction": "Why?", "input": "", "output": "good"}, ONE),
    "question and answer": ({"question": "Why?", "answer": "good"}, ONE),
    # What other rows or tools have filled in.
    "nulls of Parquet": (
        {**PAIR, "prompt": [{**user("Why?")[0], "name": None, "tool_calls": None}], "question": None},
        PAIR,
    ),
    "tools": (
        {**PAIR, "tools": [{"name": "f", "parameters": {"a": {"type": "string", "enum": None}, "b": None}}]},
        {**PAIR, "tools": [{"name": "f", "parameters": {"a": {"type": "string"}}}]},
    ),
    "tools as text": ({**PAIR, "tools": '[{"name": "f"}]'}, {**PAIR, "tools": [{"name": "f"}]}),
    "no tools": ({**PAIR, "tools": "", "chat_template_kwargs": {}}, PAIR),
    "template options as text": (
        {**PAIR, "chat_template_kwargs": '{"enable_thinking": false}'},
        {**PAIR, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "parts": (
        {**PAIR, "prompt": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("Wh", "y?")]}]},
        PAIR,
    ),
    # Prompts that answers repeat.
    "prompt twice": ({**TEXT, "chosen": "a text good", "rejected": "a text bad"}, TEXT),
    "one answer repeats it": ({**TEXT, "chosen": "a text good"}, {**TEXT, "chosen": "a text good"}),
    "a word said again": (
        {"prompt": "Two", "chosen": "Two is even", "rejected": "Two is odd"},
        {"prompt": "Two", "chosen": "Two is even", "rejected": "Two is odd"},
    ),
    "prompt in the answers": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad", "id": "7"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    record, expected = FORMS[name]
    assert as_pair("line 3", record) == expected
    assert as_pair("line 3", expected) == expected  # what `pairs import` writes is read again


def test_a_repeated_prompt_is_said():
    notes = Counter()
    as_pair("line 3", FORMS["prompt twice"][0], notes)
    as_pair("line 3", TEXT, notes)
    assert notes == {"pairs whose answers began with the prompt again, which was taken away there": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"context": "Why?", "chosen": "<think>\na", "rejected": "<think>\nb"},
            "context may be it: .* prompt=context",
        ),
        ({"question": "Why?", "query": "How?", **ANSWERS}, "question and query may both be the prompt"),
        ({"system": "Be long.", **WITH_SYSTEM}, "the column system and the system message"),
        ({"history": [[None, "Hi"]], "question": "Why?", **ANSWERS}, "history is .*: a list of"),
        ({"system": user("Hi"), "question": "Why?", **ANSWERS}, "system is a list: a string"),
        ({"conversations": {"from": []}, **ANSWERS}, r"from \[\]: use one of"),
        ({"history": ["Hi"], "question": "Why?", **ANSWERS}, r"history is \"\['Hi'\]\""),
        ({"conversations": [{"from": "function_call", "value": "{}"}], **ANSWERS}, "from 'function_call': use one of"),
        ({"conversations": ["Hi"], **ANSWERS}, r"conversations\[0\] is 'Hi'"),
        ({"conversations": [HUMAN]}, "must end with an answer of the assistant"),
        ({"messages": user("Why?"), "rejected_response": "bad"}, "must end with an answer of the assistant"),
        ({"messages": user("Why?") + GOOD, "chosen": "a"}, "chosen without the other"),
        ({"input": "Why?", "preferred_output": GOOD, "non_preferred_output": BAD}, "object with messages"),
        ({"prompt": "Why?", "answers": [{"answer": "a", "rank": 1.0}]}, "no two answers with different rank"),
        ({"prompt": "Why?", "answers": [{"answer": "a", "rank": 1}] * 2}, "no two answers with different rank"),
        ({"prompt": "Why?", "answers": [{"answer": "a", "rank": None}] * 2}, "a number rank"),
        ({"prompt": "Why?", "answers": [{"rank": 1}, {"rank": 2}]}, "must all|no prompt|strings only"),
        ({**PAIR, "prompt": [{"role": "user"}]}, r"prompt\[0\] has no content"),
        ({**PAIR, "prompt": [{"role": "user", "content": None}]}, r"prompt\[0\] has no content"),
        ({**PAIR, "prompt": [{"role": "user", "content": 7}]}, r"the content of prompt\[0\] is '7'"),
        ({**PAIR, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "part 'image': only parts of text"),
        ({**PAIR, "prompt": [{"role": None, "content": "a"}]}, r'a message \{"role"'),
        ({**PAIR, "prompt": user("\ud800")}, r"prompt holds half of a surrogate pair \(\\ud800\)"),
        ({**TEXT, "chosen": "\udfff"}, "chosen holds half of a surrogate pair"),
        ({**PAIR, "tools": "[{"}, "tools is a text that is not JSON"),
        ({**PAIR, "tools": [1]}, r"tools is '\[1\]': a list of JSON schemas"),
        ({**PAIR, "tools": 7}, "tools is '7'"),
        ({**PAIR, "chat_template_kwargs": "[1]"}, "chat_template_kwargs is .*: an object"),
        ({**PAIR, "chat_template_kwargs": {"tokenize": False}}, "sets tokenize, which is no variable"),
        ({**TEXT, "prompt": b"bytes"}, "prompt is a bytes"),
        ({"prompt": "Why?", "chosen": "good"}, "missing rejected"),
        ({"text": "Why?"}, "missing prompt, chosen, rejected.*the columns are text"),
    ],
)
def test_other_forms_are_refused(record, message):
    with pytest.raises(ValueError, match=f"line 3: .*({message})"):
        as_pair("line 3", record)


def test_deep_values_are_refused():
    deep = user("a")[0]
    for _ in range(3000):
        deep = {"role": "user", "content": "a", "inner": deep}
    with pytest.raises(ValueError, match="nested too deeply"):
        as_pair("line 3", {**PAIR, "prompt": [deep]})


def test_columns_are_named():
    record = {"context": "a text", "x": "a text", "good": " good", "bad": " bad"}
    names = {"prompt": "context", "chosen": "good", "rejected": "bad"}
    assert as_pair("line 3", record, columns=names) == TEXT
    both = {"context": "other", "chosen": "a text good", "rejected": "a text bad"}
    assert as_pair("line 3", both, columns={"prompt": ""}) == TEXT
    with pytest.raises(ValueError, match="no column 'y' for --columns prompt=y: it has context, x, good, bad"):
        as_pair("line 3", record, columns={"prompt": "y"})


def lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_kto(tmp_path):
    answers = [("Why?", "good", True), ("How?", "so", True), ("Why?", "bad", False), ("Why?", "better", True)]
    records = [{"prompt": user(p), "completion": assistant(a), "label": good} for p, a, good in answers]
    pairs = read_pairs(lines(tmp_path / "kto.jsonl", records))
    assert pairs == [PAIR]
    assert pairs.where == [f"{tmp_path / 'kto.jsonl'}, line 1"]
    assert list(pairs.notes.values()) == [2]
    renamed = [{"prompt": r["prompt"], "answer": r["completion"], "label": r["label"]} for r in records]
    assert read_pairs(lines(tmp_path / "kto.jsonl", renamed), columns={"completion": "answer"}) == [PAIR]
    with pytest.raises(ValueError, match="line 1: label is 'maybe': true or false"):
        read_pairs(lines(tmp_path / "kto.jsonl", [{**records[0], "label": "maybe"}]))
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs(lines(tmp_path / "kto.jsonl", records[:2]))


def test_one_answer_or_two_in_all_records(tmp_path):
    with pytest.raises(ValueError, match=r"line 2, .*line 1: only the first of them has a rejected answer"):
        read_pairs(lines(tmp_path / "x.jsonl", [ONE, PAIR]))
    assert read_pairs(lines(tmp_path / "x.jsonl", [ONE, ONE])) == [ONE, ONE]


def test_bad_records_are_skipped_and_counted(tmp_path, capsys):
    source = lines(tmp_path / "in.jsonl", [PAIR, *[{"prompt": "a"}] * 12, 7, PAIR])
    with pytest.raises(ValueError, match="line 2: missing chosen, rejected"):
        read_pairs(source)
    pairs = read_pairs(source, on_error="skip")
    assert pairs == [PAIR, PAIR]
    assert len(pairs.refused) == 13
    assert pairs.refused[-1].startswith(f"{source}, line 14: a int is not an object")
    words = ["pairs", "import", "--data", str(source), "--out", str(tmp_path / "out.jsonl")]
    assert main(words) == 2
    assert main([*words, "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "2 pairs" in printed
    assert "13 records left out" in printed
    assert "and 3 more" in printed
    with pytest.raises(ValueError, match=r"the first of 1 refused: .*line 1: missing"):
        read_pairs(lines(tmp_path / "x.jsonl", [{"prompt": "a"}]), on_error="skip")


WORDS = st.sampled_from(
    ["", "a", "a b", "good", "\n", "<|eos|>", "<|end|>", "\ud800", "[]", "{", "\n\nHuman: a\n\nAssistant:"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "answer", "rank", "response", "overall_score", "tool_calls"]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "human", ""]), "content": WORDS},
        optional={"from": st.sampled_from(["human", "gpt", "x"]), "value": WORDS, "tool_calls": SCALARS},
    ),
    max_size=3,
)
VALUES = MESSAGES | st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=6
)
COLUMNS = st.sampled_from(
    sorted(
        set().union(*(form.columns for form in _FORMS))
        | {"label", "system", "history", "tools", "chat_template_kwargs", "x"}
    )
)
RECORDS = st.builds(
    lambda base, more: base | more,
    st.sampled_from([{}, *(record for record, _ in FORMS.values())]),
    st.dictionaries(COLUMNS, VALUES, max_size=5),
)
TOKENIZER = tiny_tokenizer()
TOKENIZER.bos_token = "<|start|>"


def check_any_record(record):
    """A record gives pairs with tokens, or a ValueError that names it."""
    pairs = PairRecords()
    try:
        pairs.add("line 3", as_pair("line 3", record))
        data = tokenize_pairs(pairs, TOKENIZER, 50)
    except ValueError as error:
        if not re.search("line 3|prompt shorter than max_length", str(error)):
            raise
        return
    (pair,) = data.pairs
    ids = np.concatenate(pair.ids)
    assert len(pair.prompt_ids) > 0 < len(pair.chosen_ids)
    assert (len(pair.rejected_ids) == 0) == ("completion" in pairs[0])
    assert 0 <= ids.min() <= ids.max() < 300


@given(RECORDS)
def test_any_record_gives_tokens_or_a_value_error(record):
    check_any_record(record)

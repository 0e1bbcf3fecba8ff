"""Reading pairs from JSONL, and making token ids and padded batches from them."""

import json
from datetime import date

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from dadpo_kernels.cache.pairs import Pair, pad_pairs
from dadpo_kernels.capture.chat import ChatTemplate
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from tests.support.tiny import TEMPLATE, chat_records, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
CHAT = {
    "prompt": [{"role": "user", "content": "the answer"}],
    "chosen": [{"role": "assistant", "content": "a long one"}],
    "rejected": [{"role": "assistant", "content": "short"}],
}
TEXT = {"prompt": "the answer", "chosen": " a long one", "rejected": " short"}


def test_conversations_split_into_prompt_and_answers():
    (pair,) = tokenize_pairs([CHAT], TOKENIZER).pairs
    assert TOKENIZER.decode(pair.prompt_ids) == "<|start|>user\nthe answer<|end|>\n<|start|>assistant\n"
    assert TOKENIZER.decode(pair.chosen_ids) == "a long one<|end|>\n"
    assert TOKENIZER.decode(pair.rejected_ids) == "short<|end|>\n"


def test_strings_get_the_end_token_once():
    record = {"prompt": "the answer", "chosen": " a long one", "rejected": " short<|eos|>"}
    (pair,) = tokenize_pairs([record], TOKENIZER).pairs
    assert TOKENIZER.decode(pair.prompt_ids) == "the answer"
    assert TOKENIZER.decode(pair.chosen_ids) == " a long one<|eos|>"
    assert TOKENIZER.decode(pair.rejected_ids) == " short<|eos|>"


def test_template_arguments_of_the_record_reach_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ style }}{% if tools %}{{ tools[0]['name'] }}{% endif %}" + TEMPLATE
    record = {**CHAT, "tools": json.dumps([{"name": "looks"}]), "chat_template_kwargs": {"style": "short"}}
    (pair,) = tokenize_pairs([record], tokenizer).pairs
    assert tokenizer.decode(pair.prompt_ids).startswith("shortlooks<|start|>user")


def test_max_length_keeps_the_start_and_is_counted():
    (full,) = tokenize_pairs([CHAT], TOKENIZER).pairs
    prompt = len(full.prompt_ids)
    shorter = prompt + len(full.rejected_ids)
    assert len(full.rejected_ids) < len(full.chosen_ids)
    data = tokenize_pairs([CHAT], TOKENIZER, shorter)
    assert (data.truncated, data.skipped) == (1, [])
    np.testing.assert_array_equal(data.pairs[0].chosen_ids, full.chosen_ids[: shorter - prompt])
    np.testing.assert_array_equal(data.pairs[0].rejected_ids, full.rejected_ids)
    long = {**CHAT, "prompt": [{"role": "user", "content": "the answer " * 9}]}
    data = tokenize_pairs([long, CHAT], TOKENIZER, prompt + 1)
    assert (data.truncated, data.skipped) == (2, [0])
    assert [pair.index for pair in data.pairs] == [1]
    with pytest.raises(ValueError, match=f"max_length={prompt}"):
        tokenize_pairs([CHAT], TOKENIZER, prompt)


def test_a_prompt_that_is_no_prefix_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages|length }}" + TEMPLATE
    with pytest.raises(ValueError, match=r"pair 0: the tokens of the prompt are not a prefix .* from token 0 .*'1<"):
        tokenize_pairs([CHAT], tokenizer)


def test_an_answer_begins_where_its_tokens_merge_with_the_prompts(monkeypatch):
    """As in TRL: "th" + "e" is one token."""
    data = tokenize_pairs([{"prompt": "the th", "chosen": "e", "rejected": "e a"}], TOKENIZER)
    (pair,) = data.pairs
    assert TOKENIZER.decode(pair.prompt_ids) == "the"
    assert TOKENIZER.decode(pair.chosen_ids) == " the<|eos|>"
    assert list(pair.prompt_ids) + list(pair.chosen_ids) == TOKENIZER("the the<|eos|>")["input_ids"]
    assert sum(data.notes.values()) == 1
    newline = {**CHAT, "chosen": [{"role": "assistant", "content": "\n a long one"}]}
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("\n\n")  # merges with the end of the generation prompt
    tokenizer.add_tokens("\n ")
    tokenizer.add_tokens("\n")
    with pytest.raises(ValueError, match="not a prefix"):  # tokens of the template's own never merge
        tokenize_pairs([newline], tokenizer)


def test_rendered_texts_get_no_second_token_at_either_end():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|start|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", 0)])
    plain = {"prompt": "the answer", "chosen": " a long one", "rejected": " short"}
    rendered = {name: text if name != "prompt" else "<|start|>" + text for name, text in plain.items()}
    (expected,) = tokenize_pairs([plain], tokenizer).pairs
    data = tokenize_pairs([rendered], tokenizer)
    assert all(map(np.array_equal, data.pairs[0].ids, expected.ids))
    assert tokenizer.decode(expected.prompt_ids) == "<|start|>the answer"
    assert sum(data.notes.values()) == 1
    ended = {**plain, "chosen": " a long one<|end|>\n"}  # the template's end of turn, not the end of text
    assert tokenizer.decode(tokenize_pairs([ended], tokenizer).pairs[0].chosen_ids) == " a long one<|end|>\n"


PARTS = (  # of idefics3: contents are lists of parts, a string is iterated and lost
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
FAILING = {
    "system": ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    "undefined": ("{{ messages[0]['none']['x'] }}", "UndefinedError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "type": ("{{ 1 + messages[0]['content'] }}", "TypeError"),
}


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_template_is_named(name):
    template, words = FAILING[name]
    with pytest.raises(ValueError, match=f"pair 1, prompt: the chat template fails .*{words}"):
        tokenize_pairs([TEXT, CHAT], with_template(template))
    data = tokenize_pairs([TEXT, CHAT, CHAT], with_template(template), on_error="skip")
    assert [pair.index for pair in data.pairs] == [0]
    assert len(data.refused) == 2
    assert words in data.refused[0]
    with pytest.raises(ValueError, match=f"none of 1 pairs .*1 are refused: pair 0.*{words}"):
        tokenize_pairs([CHAT], with_template(template), on_error="skip")


def test_answers_that_lose_their_texts_are_refused():
    with pytest.raises(ValueError, match="pair 0: chosen and rejected have the same tokens though their texts differ"):
        tokenize_pairs([CHAT], with_template(PARTS))
    same = {**CHAT, "rejected": CHAT["chosen"]}
    assert len(tokenize_pairs([same], TOKENIZER).pairs) == 1  # it is what was given


def test_contents_of_parts_are_joined():
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "answer"}]
    record = {**CHAT, "prompt": [{"role": "user", "content": parts}]}
    (joined,), (plain,) = (tokenize_pairs([r], TOKENIZER).pairs for r in (record, CHAT))
    assert all(map(np.array_equal, joined.ids, plain.ids))


DATED = "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE


def test_a_template_gets_one_date():
    tokenizer = with_template(DATED)
    assert tokenize_pairs([CHAT], TOKENIZER).today is None
    data = tokenize_pairs([CHAT], tokenizer, template=ChatTemplate(tokenizer, today=date(2025, 2, 1)))
    assert data.today == "2025-02-01"
    assert tokenizer.decode(data.pairs[0].prompt_ids).startswith("01 Feb 2025\n<|start|>user")
    assert tokenizer.decode(data.pairs[0].chosen_ids) == "a long one<|end|>\n"
    with pytest.raises(ValueError, match="asks for the date in a format that is no text"):
        tokenize_pairs([CHAT], with_template("{{ strftime_now(form) }}" + DATED))
    assert tokenize_pairs([TEXT], with_template("{{ strftime_now(form) }}")).today is None  # texts need no template


def test_variables_of_the_template():
    tokenizer = with_template("{% if style %}{{ style }}{% endif %}" + TEMPLATE)
    data = tokenize_pairs(
        [CHAT, {**CHAT, "chat_template_kwargs": {"style": "record"}}],
        tokenizer,
        template=ChatTemplate(tokenizer, {"style": "all"}),
    )
    first, second = (tokenizer.decode(pair.prompt_ids) for pair in data.pairs)
    assert first.startswith("all<|start|>")
    assert second.startswith("record<|start|>")
    with pytest.raises(ValueError, match="does not use enable_thinkng"):
        ChatTemplate(tokenizer, {"enable_thinkng": False})
    with pytest.raises(ValueError, match="sets tools, which is no variable"):
        ChatTemplate(tokenizer, {"tools": []})


def test_one_answer():
    (pair,) = tokenize_pairs([{"prompt": CHAT["prompt"], "completion": CHAT["chosen"]}], TOKENIZER).pairs
    (whole,) = tokenize_pairs([CHAT], TOKENIZER).pairs
    np.testing.assert_array_equal(pair.prompt_ids, whole.prompt_ids)
    np.testing.assert_array_equal(pair.chosen_ids, whole.chosen_ids)
    assert pair.rejected_ids.size == 0
    data = tokenize_pairs([{"prompt": "the", "completion": " answer looks"}], TOKENIZER, 2)
    assert (len(data.pairs[0].chosen_ids), data.truncated) == (1, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "missing prompt"),
        ({"prompt": "a", "chosen": "a", "rejected": 3}, "rejected is a int, '3'"),
        ({**CHAT, "chosen": "a"}, "must all be strings"),
        ({"prompt": "a", "chosen": "a", "rejected": None}, "must all be strings"),
        ({**CHAT, "chosen": ["a"]}, r"chosen\[0\] is 'a': a message"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt has no tokens"),
        ([1], "not an object"),
    ],
)
def test_malformed_records_are_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=f"pair 0.*{message}"):
        tokenize_pairs([record], TOKENIZER)


def test_missing_chat_template_and_empty_answers():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_pairs([CHAT], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="pair 0: rejected has no tokens"):
        tokenize_pairs([{"prompt": "the", "chosen": " a", "rejected": ""}], tokenizer)


def test_reading_jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = chat_records(3)
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n")
    assert read_pairs(path) == records
    assert read_pairs(path, limit=2) == records[:2]
    path.write_text(json.dumps(records[0]) + '\n{"prompt": "a"')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_pairs(path)
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="line 1: missing chosen, rejected"):
        read_pairs(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs(path)


def test_the_source_is_known_by_its_content():
    first, second = chat_records(2)
    fingerprint = tokenize_pairs([first], TOKENIZER).source_sha256
    assert tokenize_pairs([dict(reversed(first.items()))], TOKENIZER).source_sha256 == fingerprint
    assert tokenize_pairs([second], TOKENIZER).source_sha256 != fingerprint


IDS = st.lists(st.integers(1, 300), min_size=1, max_size=7).map(lambda ids: np.array(ids, np.int32))


@given(st.lists(st.builds(Pair, st.just(0), IDS, IDS, IDS), min_size=1, max_size=4))
def test_padding_and_label_alignment(pairs):
    input_ids, attention_mask, labels = pad_pairs(pairs, pad_token_id=0)
    assert input_ids.shape == attention_mask.shape == labels.shape
    assert input_ids.shape[1] == max(pair.length for pair in pairs)
    for row, (pair, answer) in enumerate([(p, p.chosen_ids) for p in pairs] + [(p, p.rejected_ids) for p in pairs]):
        sequence = [*pair.prompt_ids, *answer]
        assert input_ids[row].tolist() == sequence + [0] * (input_ids.shape[1] - len(sequence))
        assert attention_mask[row].sum() == len(sequence)
        assert labels[row][labels[row] != -100].tolist() == list(answer)
        (at,) = torch.where(labels[row] != -100)
        assert labels[row, at].tolist() == input_ids[row, at + 1].tolist()  # aligned: t predicts t + 1
        assert at[0] == len(pair.prompt_ids) - 1

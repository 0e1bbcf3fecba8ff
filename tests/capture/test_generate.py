"""`pairs generate`: its side files survive damage, two runs exclude each other, and `teacher` accepts the result."""

import errno
import json
import os
import random
from datetime import date

import pytest

from dadpo_kernels.cache.errors import CacheBusyError, CacheError, CacheSettingsError
from dadpo_kernels.cache.lock import lock
from dadpo_kernels.capture.chat import ChatTemplate
from dadpo_kernels.capture.checked_lines import CheckedLines, settings_of
from dadpo_kernels.capture.generate import Sampling, first_day, generate_answers, make_pairs
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.support.damage import flip_bit
from tests.support.tiny import TEMPLATE, chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [record["prompt"] for record in chat_records(7)]
SAMPLING = Sampling(max_new_tokens=6, batch_size=2)
MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()


def generate(path, tokenizer=TOKENIZER, sampling=SAMPLING, kwargs=None, today=None):
    return generate_answers(MODEL, ChatTemplate(tokenizer, kwargs, today), PROMPTS, path, sampling)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The answers of an undisturbed run, and its file."""
    path = tmp_path_factory.mktemp("whole") / "answers"
    return generate(path), path.read_bytes()


def test_a_flipped_bit_changes_no_answer(whole, tmp_path, caplog):
    answers, content = whole
    path, rng = tmp_path / "answers", random.Random(0)
    for _ in range(40):
        path.write_bytes(flip_bit(content, rng))
        assert generate(path) == answers
        assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())
    assert "1 damaged lines are removed, what they held is computed again" in caplog.text


@pytest.mark.parametrize("change", ["delete", "double", "swap", "number"])
def test_a_line_that_is_not_as_written_is_sampled_again(whole, tmp_path, change):
    answers, content = whole
    header, *lines = content.splitlines(keepends=True)
    changed = {
        "delete": [lines[0], *lines[2:]],
        "double": [*lines, lines[0], lines[2]],
        "swap": lines[::-1],
        "number": [lines[0].replace(b'"batch": 0', b'"batch": 1'), *lines[1:]],
    }[change]
    (tmp_path / "answers").write_bytes(b"".join([header, *changed]))
    assert generate(tmp_path / "answers") == answers


def test_lines_of_another_run_are_not_used(whole, tmp_path):
    answers, content = whole
    generate(tmp_path / "other", sampling=SAMPLING._replace(seed=1))
    header = content.splitlines(keepends=True)[0]
    foreign = (tmp_path / "other").read_bytes().splitlines(keepends=True)[1:]
    (tmp_path / "answers").write_bytes(b"".join([header, *foreign]))
    assert generate(tmp_path / "answers") == answers
    for content in (b"hello", b'{"settings": {}}\n', b"\n", b"\0" * 99):
        (tmp_path / "answers").write_bytes(content)
        with pytest.raises(CacheSettingsError, match="is not a file of answers, or its beginning is damaged: move it"):
            generate(tmp_path / "answers")
        assert (tmp_path / "answers").read_bytes() == content


def test_two_runs_on_one_file(tmp_path):
    lines = CheckedLines(tmp_path / "answers", {})
    with pytest.raises(CacheBusyError, match=r"another process is writing to .*answers: wait for it or stop it"):
        generate(tmp_path / "answers")
    lines.close()
    (tmp_path / "answers").unlink()
    generate(tmp_path / "answers")


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(CacheError, match="directory: Is a directory: move this directory"):
        generate(tmp_path / "directory")
    with pytest.raises(CacheError, match="No such file or directory: create its directory"):
        generate(tmp_path / "missing" / "answers")
    with pytest.raises(CacheError, match="File name too long: choose a shorter name"):
        generate(tmp_path / ("x" * 300))


def test_a_full_disk(whole, tmp_path, monkeypatch):
    """The third write fails, and the run goes on when there is space again."""
    answers, content = whole
    path, results = tmp_path / "answers", iter((None, None, errno.ENOSPC))

    def fsync(descriptor):
        if code := next(results):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CacheError, match="answers: No space left on device: free some space and run the same"):
        generate(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:2])
    assert generate(path) == answers
    assert path.read_bytes() == content


# ---- what `teacher` makes of the answers ---------------------------------------------------------------------------

THINKING = TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}-\n{% endif %}{% endif %}",
)
# The thinking of an answer is not rendered, as in DeepSeek-R1's template.
STRIPPING = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1].strip()")


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_options_of_the_template_are_applied_and_carried(tmp_path):
    tokenizer, options = with_template(THINKING), {"enable_thinking": False}
    plain = generate(tmp_path / "plain", tokenizer)
    assert plain != generate(tmp_path / "options", tokenizer, kwargs=options)
    with pytest.raises(CacheSettingsError, match="prompts_sha256"):
        generate(tmp_path / "options", tokenizer)


def lines_of(texts):
    return [{"answer": text, "end": "<|end|>", "finished": True} for text in texts]


def test_pairs_that_the_template_does_not_render_are_written_as_texts():
    answers = ["yes", " yes ", "", "<think>a</think>yes", "no\n", "\u00e9"]
    for text, options, rendered in (
        (TEMPLATE, {}, 0),
        (THINKING, {"enable_thinking": False}, 5),  # the answer lacks what the generation prompt ends with
        (STRIPPING, {}, 5),
    ):
        tokenizer = with_template(text)
        template = ChatTemplate(tokenizer, options)
        records, count = make_pairs(PROMPTS[:5], lines_of(answers[:5]), lines_of(answers[1:]), template)
        assert count == rendered
        pairs = tokenize_pairs(records, tokenizer, template=template).pairs
        assert len(pairs) == 5
        for i, pair in enumerate(pairs):
            prompt = template.ids("", PROMPTS[i], {}, add_generation_prompt=True)
            if rendered:
                assert prompt == pair.prompt_ids.tolist()
                assert tokenizer.decode(pair.chosen_ids).strip("\n") == f"{answers[i]}<|end|>".strip("\n")
    assert records[0].get("chat_template_kwargs") is None
    template = ChatTemplate(with_template("{{ style }}" + TEMPLATE), {"style": "short"})
    (record,), _ = make_pairs(PROMPTS[:1], lines_of("a"), lines_of("b"), template)
    assert record["chat_template_kwargs"] == {"style": "short"}
    assert make_pairs(["text"], lines_of("a"), lines_of("b"), template)[0] == [
        {"prompt": "text", "chosen": "a", "rejected": "b"}
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            "prompt 0: the chat template fails .*System role not supp",
        ),
        ("{% if %}", "prompt 0: the chat template fails "),
        ("{{ nothing.at.all }}", "prompt 0: the chat template fails .*'nothing' is undefined"),
        (None, "prompt 0: it is a conversation, and the tokenizer has no chat template"),
        ("{# nothing #}", "prompt 0 has no tokens"),
    ],
)
def test_a_template_that_refuses_a_prompt(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "answers", with_template(template))


def test_a_template_with_a_date_goes_on_the_next_day(tmp_path):
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    first = generate(tmp_path / "answers", tokenizer, today=date(2025, 1, 1))
    assert settings_of(tmp_path / "answers")["today"] == "2025-01-01"
    with pytest.raises(CacheSettingsError, match="today"):
        generate(tmp_path / "answers", tokenizer)
    assert generate(tmp_path / "answers", tokenizer, today=first_day(tmp_path / "answers")) == first
    generate(tmp_path / "undated")
    assert first_day(tmp_path / "undated") is None
    assert first_day(tmp_path / "none") is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, seed in (("teacher", 0), ("student", 1), ("stripping", 0)):
        tiny_llama(seed=seed).save_pretrained(root / name)
        with_template(STRIPPING if name == "stripping" else THINKING).save_pretrained(root / name)
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return root


def command(files, out, *more, teacher="teacher"):
    words = ["pairs", "generate", "--prompts", files / "prompts.jsonl", "--teacher", files / teacher, "--student",
             files / "student", "--max-new-tokens", 5, "--keep-unfinished", "--out", out, *more]  # fmt: skip
    return main([*map(str, words)])


def test_teacher_accepts_what_the_command_writes(files, tmp_path, capsys):
    for teacher, options in (("stripping", []), ("teacher", ["--chat-template-kwargs", '{"enable_thinking": false}'])):
        out = tmp_path / f"{teacher}.jsonl"
        assert command(files, out, *options, teacher=teacher) == 0
        assert "7 pairs, 0 left out" in capsys.readouterr().out
        words = ["--model", files / teacher, "--data", out, "--out", tmp_path / teacher, "--k", 4]
        assert main(["teacher", *map(str, words)]) == 0
        assert "7 pairs" in capsys.readouterr().out


def test_the_command_with_damaged_side_files(files, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert command(files, out) == 0
    expected, rng = out.read_bytes(), random.Random(1)
    assert len(read_pairs(out)) == 7
    for who in ("teacher", "student"):
        side = tmp_path / f"pairs.jsonl.{who}"
        side.write_bytes(flip_bit(side.read_bytes(), rng))
    out.unlink()
    assert command(files, out) == 0
    assert out.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "pairs.jsonl.teacher", "pairs.jsonl.student"}
    capsys.readouterr()
    with (tmp_path / "pairs.jsonl.student").open() as file:
        lock(file, tmp_path)
        assert command(files, out) == 2
    assert "another process is writing to" in capsys.readouterr().err

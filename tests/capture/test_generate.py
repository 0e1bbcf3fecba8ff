"""`pairs generate`: its side files survive damage, two runs exclude each other, and `teacher` accepts the result."""

import errno
import json
import logging
import os
import random

import pytest

from dadpo_kernels.cache.errors import CacheBusyError, CacheError, CacheSettingsError
from dadpo_kernels.cache.lock import lock
from dadpo_kernels.capture.checked_lines import CheckedLines
from dadpo_kernels.capture.generate import Sampling, accepted_pairs, generate_answers, make_pairs
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.support.damage import flip_bit
from tests.support.tiny import TEMPLATE, chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [record["prompt"] for record in chat_records(7)]
SAMPLING = Sampling(max_new_tokens=6, batch_size=2)
MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()


def generate(path, tokenizer=TOKENIZER, **options):
    return generate_answers(MODEL, tokenizer, PROMPTS, path, SAMPLING, **options)


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
    generate_answers(MODEL, TOKENIZER, PROMPTS, tmp_path / "other", SAMPLING._replace(seed=1))
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
    assert plain != generate(tmp_path / "options", tokenizer, chat_template_kwargs=options)
    with pytest.raises(CacheSettingsError, match="chat_template_kwargs"):
        generate(tmp_path / "options", tokenizer)
    (record,) = make_pairs(PROMPTS[:1], ["a"], ["b"], options)
    assert record["chat_template_kwargs"] == options
    assert make_pairs(["text"], ["a"], ["b"], options) == [{"prompt": "text", "chosen": "a", "rejected": "b"}]
    assert "chat_template_kwargs" not in make_pairs(PROMPTS[:1], ["a"], ["b"])[0]


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", {}, "prompt 0: .* refuses it: System role not supp"),
        ("{% if %}", {}, "prompt 0: the chat template refuses it: "),
        ("{{ nothing.at.all }}", {}, "prompt 0: the chat template refuses it: 'nothing' is undefined"),
        (TEMPLATE, {"tokenize": False}, "prompt 0: .* multiple values for keyword argument 'tokenize'"),
        (TEMPLATE, {"add_generation_prompt": False}, "multiple values for keyword argument 'add_generation_prompt'"),
        (None, {}, "prompt 0: the chat template refuses it: "),
        ("{# nothing #}", {}, "prompt 0 has no tokens"),
    ],
)
def test_a_template_that_refuses_a_prompt(tmp_path, template, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "answers", with_template(template), chat_template_kwargs=options)


def test_only_pairs_that_teacher_accepts(tmp_path):
    tokenizer = with_template(THINKING)
    answers = ["yes", " yes ", "", "<think>a</think>yes", "<|end|>", "\u00e9\n"]
    for options in ({}, {"enable_thinking": False}):
        records = make_pairs(PROMPTS[:5], answers[:5], answers[1:], options)
        accepted, refused = accepted_pairs(records, tokenizer)
        assert len(accepted) + len(refused) == 5
        if options:  # the rendered answer lacks what the generation prompt ends with
            assert len(refused) == 5
            assert "not a prefix" in refused[0]
            assert not refused[0].startswith("pair")
        else:
            assert len(tokenize_pairs(accepted, tokenizer).pairs) == 5


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


def test_the_command_leaves_out_what_teacher_refuses(files, tmp_path, capsys, caplog):
    out = tmp_path / "pairs.jsonl"
    assert command(files, out, teacher="stripping") == 0
    assert "7 pairs, 0 left out" in capsys.readouterr().out
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(tokenize_pairs(pairs, with_template(STRIPPING)).pairs) == 7
    with caplog.at_level(logging.WARNING):
        assert command(files, out.with_name("none"), "--chat-template-kwargs", '{"enable_thinking": false}') == 2
    assert "pairs may get lost: `dadpo teacher` refuses one with the answers yes and no" in caplog.text
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dadpo pairs: `dadpo teacher` would refuse all pairs. Of the first, it says: the tokens")
    assert not out.with_name("none").exists()


@pytest.mark.parametrize("text", ["enable_thinking", "[1]", "{", "null"])
def test_template_options_that_are_not_an_object(files, tmp_path, capsys, text):
    assert command(files, tmp_path / "x", "--chat-template-kwargs", text) == 2
    assert "--chat-template-kwargs must be a JSON object such as" in capsys.readouterr().err


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

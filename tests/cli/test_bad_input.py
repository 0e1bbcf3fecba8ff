"""Whatever a user's file, flag or server holds: exit status 2, and one line that names it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dadpo_kernels.cli.main import main
from tests.capture.test_sources import BAD_FILES
from tests.support.tiny import TEMPLATE, chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = ("cache", "folder")  # where a faulty command could write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with sound models, pairs and a cache, and with damaged ones."""
    root = tmp_path_factory.mktemp("made")
    tiny_llama().save_pretrained(root / "teacher")
    tiny_tokenizer().save_pretrained(root / "teacher")
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, chat_records(4))))
    words = ["--model", root / "teacher", "--data", root / "pairs.jsonl", "--out", root / "cache", "--k", 4]
    assert main(["teacher", *map(str, words)]) == 0
    (root / "folder").mkdir()

    def damaged(name, file, content):
        shutil.copytree(root / "teacher", root / name)
        path = root / name / file
        path.write_bytes(content(path.read_bytes()))

    damaged("bad config", "config.json", lambda content: content[:-9])
    damaged("bad tokenizer", "tokenizer.json", lambda content: b'{"version": "1.0"}')
    damaged("bad weights", "model.safetensors", lambda content: content[:-9])
    damaged("empty weights", "model.safetensors", lambda content: b"")
    damaged("other type", "config.json", lambda content: b'{"model_type": "no such"}')
    shutil.copytree(root / "teacher", root / "no tokenizer")
    for path in (root / "no tokenizer").glob("tokenizer*"):
        path.unlink()
    (root / "no tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    (root / "syntax.jinja").write_text("{% for %}" + TEMPLATE)
    (root / "latin.jinja").write_bytes("é".encode("latin-1"))
    for name, (content, _) in BAD_FILES.items():
        (root / name).write_bytes(content)
    return root


def teacher(*more, model="teacher", data="pairs.jsonl", out="out"):
    return ["teacher", "--model", model, "--data", data, "--out", out, "--k", "4", *more]


def memory(*more):
    return ["memory", "--vocab", "9", "--hidden", "9", "--tokens", "9", *more]


CASES = {
    "no model": (teacher(model="none/such"), "none/such"),
    "model is a file": (teacher(model="pairs.jsonl"), "pairs.jsonl"),
    "no tokenizer": (teacher(model="no tokenizer"), "no tokenizer"),
    "config is no JSON": (teacher(model="bad config"), "bad config"),
    "another type of model": (teacher(model="other type"), "no such"),
    "tokenizer is damaged": (teacher(model="bad tokenizer"), "the tokenizer of bad tokenizer cannot be loaded"),
    "weights are cut": (teacher(model="bad weights"), "bad weights cannot be loaded"),
    "weights are empty": (teacher(model="empty weights"), "empty weights cannot be loaded"),
    "no such device": (teacher("--device", "gpu"), "gpu"),
    "no data": (teacher(data="none.jsonl"), "none.jsonl does not exist"),
    "no set": (teacher(data="none"), "none"),
    "data in a folder": (teacher(data="folder"), "folder cannot be loaded"),
    "limit": (teacher("--limit", "-1"), "--limit: -1 is less than 1"),
    "k": (teacher("--k", "-1"), "--k: -1 is less than 0"),
    "k above the vocabulary": (teacher("--k", "400"), "k=400"),
    "k is no number": (teacher("--k", "ten"), "'ten' is not a whole number"),
    "max-length": (teacher("--max-length", "1"), "--max-length: 1 is less than 2"),
    "max-length above the positions": (teacher("--max-length", "513"), "513 is more than the 512 positions"),
    "max-length below all prompts": (teacher("--max-length", "2"), "none of 4 pairs has a prompt shorter"),
    "student-vocab-size": (teacher("--student-vocab-size", "0"), "--student-vocab-size: 0 is less than 1"),
    "batch-tokens": (teacher("--batch-tokens", "0"), "--batch-tokens: 0 is less than 1"),
    "shard-tokens": (teacher("--shard-tokens", "0"), "--shard-tokens: 0 is less than 1"),
    "no template": (teacher("--chat-template", "none.jinja"), "none.jinja"),
    "template is a folder": (teacher("--chat-template", "folder"), "folder"),
    "template in latin-1": (teacher("--chat-template", "latin.jinja"), "latin.jinja is not UTF-8"),
    "template with a mistake": (teacher("--chat-template", "syntax.jinja"), "line 1.*TemplateSyntaxError"),
    "template options are no JSON": (teacher("--chat-template-kwargs", "{a}"), "'{a}' is not JSON"),
    "template options are a list": (teacher("--chat-template-kwargs", "[]"), "'\\[\\]' is not an object"),
    "template option without use": (teacher("--chat-template-kwargs", '{"thinkng": 1}'), "does not use thinkng"),
    "columns": (teacher("--columns", "prompt"), "'prompt': write NAME=COLUMN"),
    "columns twice": (teacher("--columns", "prompt=a,prompt=b"), "each name needs one column"),
    "columns without name": (teacher("--columns", "chosen="), "only prompt can have none"),
    "columns that are not there": (teacher("--columns", "prompt=x"), "line 1: no column 'x'"),
    "out is a file": (teacher(out="pairs.jsonl"), "pairs.jsonl"),
    "out in a file": (teacher(out="pairs.jsonl/out"), "pairs.jsonl"),
    "out has a long name": (teacher(out="x" * 300), "xxx"),
    "another capture": (teacher("--limit", "2", out="cache"), "pairs was 4 and is 2 now"),
    "server: no URL": (teacher("--server", "host:8000"), "host:8000"),
    "server: timeout": (teacher("--server", "http://127.0.0.1:9", "--timeout", "-1"), "timeout"),
    "server: concurrency": (teacher("--server", "http://127.0.0.1:9", "--concurrency", "0"), "concurrency"),
    "server: no key": (teacher("--server", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH"), "NO_SUCH is not set"),
    "reference: no cache": (["reference", "--model", "teacher", "--cache", "none"], "none is not a teacher cache"),
    "reference: a file": (["reference", "--model", "teacher", "--cache", "pairs.jsonl"], "pairs.jsonl"),
    "reference: no model": (["reference", "--model", "none/such", "--cache", "cache"], "none/such"),
    "verify: no cache": (["cache", "info", "folder"], "folder is not a teacher cache"),
    "info: PNG in no folder": (["cache", "info", "cache", "--png", "none/k.png"], "none/k.png"),
    "convert: k": (["cache", "convert", "cache", "--out", "out", "--k", "9"], "k=9"),
    "convert: k below 0": (["cache", "convert", "cache", "--out", "out", "--k", "-1"], "k|-1"),
    "convert: vocabulary": (["cache", "convert", "cache", "--out", "out", "--student-vocab-size", "0"], "0"),
    "convert: shards": (["cache", "convert", "cache", "--out", "out", "--shard-tokens", "-1"], "-1"),
    "generate: no prompts": (
        ["pairs", "generate", "--prompts", "none.txt", "--teacher", "teacher", "--student", "teacher", "--out", "x"],
        "none.txt does not exist",
    ),
    "generate: out in no folder": (
        ["pairs", "generate", "--prompts", "pairs.jsonl", "--teacher", "teacher", "--student", "teacher", "--out",
         "none/x", "--max-new-tokens", "2"],
        "none",
    ),
    "generate: batch-size": (
        ["pairs", "generate", "--prompts", "pairs.jsonl", "--teacher", "teacher", "--student", "teacher", "--out", "x",
         "--batch-size", "0"],
        "batch.size",
    ),
    "import: out in no folder": (["pairs", "import", "--data", "pairs.jsonl", "--out", "none/x"], "none"),
    "import: out is a folder": (["pairs", "import", "--data", "pairs.jsonl", "--out", "folder"], "folder"),
    "memory: size": (memory("--memory", "9x"), "'9x' is not a size"),
    "memory: backend": (memory("--backend", "x"), "x"),
    "memory: tokens": (memory("--tokens", "-9"), "--tokens: -9 is less than 1"),
    **{
        f"data: {name}": (["pairs", "import", "--data", name, "--out", "x.jsonl"], message)
        for name, (_, message) in BAD_FILES.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_status_2(name, made, tmp_path, monkeypatch, capfd):
    words, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        if path.name in WRITTEN:
            shutil.copytree(path, path.name)
        else:
            Path(path.name).symlink_to(path)
    try:
        status = main(words)
    except SystemExit as exit_:
        status = exit_.code
    *_, last = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert re.search(message, last), last
    assert last.startswith(f"dadpo {words[0]}")

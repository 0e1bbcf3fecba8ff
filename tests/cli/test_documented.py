"""Every command that the README and the documentation show runs, on tiny models and files."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest

from dadpo_kernels.cli.main import COMMANDS, main
from tests.support import foreign, vllm_server
from tests.support.tiny import TEMPLATE, chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Words of a command that stand for what a user has. A server is started for its URL.
WORDS = {"TEACHER": "teacher", "STUDENT": "student", "OWNER/SET:SPLIT": "set:train"}


def documented():
    """`(page, command)` of each line of code that begins with `dadpo`; `...` stands for more arguments."""
    for page in PAGES:
        code = re.findall(r"^(?:    )?(dadpo [^\n]*?)(?:\s+#[^\n]*)?$", page.read_text(), re.MULTILINE)
        yield from ((page.stem, line) for line in dict.fromkeys(code) if "..." not in line)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands read, and a cache of the first of them."""
    root = tmp_path_factory.mktemp("made")
    for name, seed in (("teacher", 0), ("student", 1)):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% if enable_thinking %}<think>{% endif %}" + TEMPLATE
        tiny_llama(seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    records = chat_records(4)
    for name in ("pairs", "chats"):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    renamed = [{"context": record["prompt"], **record} for record in records]
    (root / "renamed.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    (root / "prompts.txt").write_text("the teacher reads\na long answer\n")
    (root / "template.jinja").write_text(TEMPLATE)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(root / "set")
    (root / "scored.jsonl").write_text(json.dumps(foreign.trl([foreign.scored()])))
    (root / "config.yaml").write_text(
        "model: student\ncache: cache\noutput_dir: run\nmax_steps: 1\nper_device_train_batch_size: 2\n"
        "beta_ref: 0.1\nkl_weight: 1.0\nreport_to: none\nuse_cpu: true\n"
    )
    words = ["--data", root / "pairs.jsonl", "--reference", root / "student", "--out", root / "cache"]
    assert main(["teacher", "--model", str(root / "teacher"), *map(str, words)]) == 0
    return root


@pytest.mark.parametrize(("page", "command"), documented())
def test_a_documented_command_runs(page, command, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "--out cache" in command:
        shutil.rmtree("cache")
    with contextlib.ExitStack() as stack:
        words = [WORDS.get(word, word) for word in shlex.split(command)[1:]]
        if "--server" in words:
            kind = vllm_server.serving(tiny_llama())
            words[words.index("--server") + 1] = stack.enter_context(kind).url
        assert main(words) == 0


def test_all_commands_are_documented():
    assert {command.split()[1] for _, command in documented()} == COMMANDS.keys() - {"doctor"}

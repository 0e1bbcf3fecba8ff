"""The command line: usage errors, and the commands that make a cache, called as a user does."""

import builtins
import json
import os
import subprocess
import sys

import pytest

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cli.main import COMMANDS, main
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, a student and pairs, on disk."""
    root = tmp_path_factory.mktemp("files")
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny_llama(seed=seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    (root / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in chat_records(8)))
    return root


def capture(files, out, *more):
    pairs = str(files / "pairs.jsonl")
    return main(["teacher", "--model", str(files / "teacher"), "--data", pairs, "--out", str(out), "--k", "4", *more])


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_slow(words):
    program = (
        "import sys; from dadpo_kernels.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: sys.exit([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stderr == "[]\n"
    assert f"usage: dadpo {' '.join(words[:-1])}" in result.stdout


@pytest.mark.parametrize(("word", "hint"), [("teach", "did you mean 'teacher'?"), ("xyz", "choose one of pairs,")])
def test_unknown_command_suggests_the_nearest(word, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([word])
    assert exit_.value.code == 2
    assert hint in capsys.readouterr().err


def test_teacher_then_reference(files, tmp_path, capsys):
    assert capture(files, tmp_path, "--limit", "5", "--max-length", "40", "--shard-tokens", "60") == 0
    assert "5 pairs; 10 answers cut and 0 pairs skipped at 40 tokens" in capsys.readouterr().out
    assert not PairDataset(tmp_path).has_reference
    assert main(["reference", "--model", str(files / "student"), "--cache", str(tmp_path)]) == 0
    assert "reference: 5 pairs" in capsys.readouterr().out
    dataset = PairDataset(tmp_path, tokenizer=tiny_tokenizer(), require_reference=True)
    assert len(dataset) == 5
    info = {"model": "teacher", "truncated_answers": 10, "skipped_pairs": [], "refused_records": 0, "notes": {}}
    assert dataset.manifest.info == info


def test_both_in_one_run_and_a_second_run_does_nothing(files, tmp_path):
    assert capture(files, tmp_path, "--reference", str(files / "student")) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(before) == 2
    assert capture(files, tmp_path, "--reference", str(files / "student")) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before
    assert PairDataset(tmp_path).has_reference


def test_errors_are_one_message_without_a_traceback(files, tmp_path, capsys):
    assert capture(files, tmp_path) == 0
    assert capture(files, tmp_path, "--limit", "3") == 2
    error = capsys.readouterr().err
    assert "dadpo teacher: " in error
    assert "pairs was 8 and is 3 now" in error
    assert "Traceback" not in error
    with pytest.raises(ValueError, match="pairs was 8"):
        main(["--traceback", "teacher", "--model", str(files / "teacher"), "--data", str(files / "pairs.jsonl"),
              "--out", str(tmp_path), "--k", "4", "--limit", "3"])  # fmt: skip
    assert main(["reference", "--model", str(files / "student"), "--cache", str(files)]) == 2
    assert "is not a teacher cache" in capsys.readouterr().err


def test_missing_extras_are_named(files, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.split(".")[0] == "pyarrow":
            raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith(("dadpo_kernels.cache.", "dadpo_kernels.capture."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert capture(files, tmp_path) == 2
    assert "'pyarrow' is missing: pip install 'dadpo-kernels[train]'" in capsys.readouterr().err


def test_as_a_program(files, tmp_path):
    arguments = [
        "teacher",
        "--model",
        files / "teacher",
        "--data",
        files / "pairs.jsonl",
        "--out",
        tmp_path,
        "--k",
        "4",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "dadpo_kernels.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}: 8 pairs" in result.stdout
    assert "tok/s" in result.stderr

"""`dadpo cache import`: what it prints, and that no record of a user's file ends in a traceback."""

import json

import pytest

from dadpo_kernels.cache.shards import read_manifest
from dadpo_kernels.cli.main import main
from tests.support import foreign
from tests.support.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    tiny_llama(vocab_size=foreign.VOCAB).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def call(teacher, tmp_path):
    def call(records, *more):
        source = tmp_path / "data.jsonl"
        source.write_text("\n".join(json.dumps(record) for record in records))
        words = ["cache", "import", str(source), "--model", str(teacher), "--out", str(tmp_path / "cache"), *more]
        return main(words)

    return call


def test_it_says_what_is_lost(call, tmp_path, capsys):
    records = [foreign.verl(foreign.scored(seed, best=best)) for seed, best in ((1, 30), (2, 4), (3, 4))]
    assert call(records, "--format", "verl", "--on-error", "skip", "--limit", "2", "--k", "5") == 0
    out = capsys.readouterr().out
    assert "2 records read, 1 skipped; k=5" in out
    assert "skipped: " in out
    assert "data.jsonl, line 1: " in out
    assert "verl drops the log-probability of a realised token outside the top k" in out
    assert "there are no rejected answers" in out
    assert "1 pairs, 17 answer tokens" in out
    manifest = read_manifest(tmp_path / "cache", "teacher")
    assert any("no rejected answers" in line for line in manifest.info["lost"])
    assert manifest.info["skipped_records"] == 1


def test_it_says_how_many_labels_have_a_bound(call, capsys):
    assert call([foreign.verl(foreign.scored(1, best=30))], "--format", "verl", "--label-bound") == 0
    assert "of 17 realised tokens: a bound is stored" in capsys.readouterr().out


@pytest.mark.parametrize("record", ["", "[1]", '{"input_ids": 1}', "not JSON", '{"input_ids": [' + "1" * 5000 + "]}"])
@pytest.mark.parametrize("data_format", ["axolotl", "distillkit", "trl", "verl"])
def test_faults_are_one_line(teacher, data_format, record, tmp_path, capsys):
    source = tmp_path / "data.jsonl"
    source.write_text(record + "\n")
    (tmp_path / "compression_config.yaml").write_text(json.dumps(foreign.PACKING))
    words = ["cache", "import", str(source), "--model", str(teacher), "--out", str(tmp_path / "cache")]
    assert main([*words, "--format", data_format]) == 2
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if line.startswith("dadpo cache: "))
    assert "data.jsonl" in line
    assert "Traceback" not in err

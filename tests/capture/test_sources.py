"""The forms and sources of preference sets, and pairs of sampled answers."""

import gzip
import json
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dadpo_kernels.cache.errors import CacheSettingsError
from dadpo_kernels.capture.forms import as_pair
from dadpo_kernels.capture.generate import Sampling, generate_answers, make_pairs
from dadpo_kernels.capture.pairs import read_pairs, read_prompts, tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.capture.test_local import processes  # noqa: F401  # a fixture
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = {"prompt": [user("a")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
TEXT = {"prompt": "a", "chosen": " good", "rejected": " bad"}
WHOLE = {"chosen": [user("a"), assistant("good")], "rejected": [user("a"), assistant("bad")]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (CHAT, CHAT),
        (TEXT, TEXT),
        ({**WHOLE, "prompt": "a", "prompt_id": "0", "score_chosen": 9.0}, CHAT),  # UltraFeedback-binarized
        (WHOLE, CHAT),  # TRL, implicit prompt
        ({**WHOLE, "prompt": [user("a")]}, CHAT),
        ({**WHOLE, "prompt": None}, CHAT),
        (
            {"chosen": "say a good", "rejected": "say a bad"},
            {"prompt": "say a", "chosen": " good", "rejected": " bad"},
        ),
        ({"chosen": "say good", "rejected": "say get"}, {"prompt": "say g", "chosen": "ood", "rejected": "et"}),
        ({**CHAT, "tools": '[{"name": "f"}]', "x": 1}, {**CHAT, "tools": [{"name": "f"}]}),
        ({**CHAT, "prompt": [{**user("a"), "tool_calls": None}]}, CHAT),  # as Parquet fills a column of messages
        (
            {"prompt": "a", "chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]},
            {**CHAT, "rejected": CHAT["chosen"]},
        ),
    ],
)
def test_forms(record, expected):
    assert as_pair("line 3", record) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 3: missing rejected"),
        ("text", "line 3: a str is not an object"),
        ({**WHOLE, "prompt": "other"}, "none of the messages that chosen and rejected share is the prompt"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "there is no prompt"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "there is no prompt"),
        ({"prompt": 7, "chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "prompt is a int"),
    ],
)
def test_other_forms_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        as_pair("line 3", record)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "tools"]), JSON))
def test_any_record_gives_a_pair_or_a_value_error(tmp_path_factory, record):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(record))
    try:
        (pair,) = read_pairs(path)
    except ValueError:
        return
    assert type(pair["prompt"]) is type(pair["chosen"]) is type(pair["rejected"])


def test_jsonl_parquet_and_datasets_give_the_same(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    records = chat_records(5)
    ultra = [
        {
            "prompt": r["prompt"][0]["content"],
            "chosen": r["prompt"] + r["chosen"],
            "rejected": r["prompt"] + r["rejected"],
        }
        for r in records
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    pq.write_table(pa.Table.from_pylist(ultra), tmp_path / "pairs.parquet")
    table = datasets.Dataset.from_list(ultra)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train_prefs": table}).save_to_disk(tmp_path / "split")
    for source in ("pairs.jsonl", "pairs.parquet", "one", "split:train_prefs"):
        assert read_pairs(tmp_path / source) == records
        assert read_pairs(tmp_path / source, limit=2) == records[:2]
    with pytest.raises(ValueError, match=r"no split 'train': choose one of train_prefs"):
        read_pairs(tmp_path / "split")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: calls.append((a, o)) or table)
    assert read_pairs("owner/name:test") == records
    assert calls == [(("owner/name",), {"split": "test"})]


def parquet_of_datasets(path, records):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"prompt": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
        | {name: datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
           for name in ("chosen", "rejected")}
        | {"tools": datasets.List({"name": datasets.Value("string"), "parameters": datasets.Json()})}
    )  # fmt: skip
    datasets.Dataset.from_list(records, features=features).to_parquet(str(path))


def test_what_parquet_fills_in_is_not_read(tmp_path):
    """Rows with different keys, and texts of `datasets`' feature Json, are as in JSONL."""
    tools = [{"city": {"type": "string"}}, {"day": {"type": "integer", "enum": [1, None]}}]
    records = [{**CHAT, "tools": [{"name": "f", "parameters": parameters}]} for parameters in tools]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "pairs.parquet")
    parquet_of_datasets(tmp_path / "json.parquet", records)
    assert "day" in str(pq.read_table(tmp_path / "pairs.parquet")["tools"][0])  # null, from the other row
    assert isinstance(pq.read_table(tmp_path / "json.parquet")["tools"][0].as_py()[0]["parameters"], str)
    for name in ("pairs.jsonl", "pairs.parquet", "json.parquet"):
        assert read_pairs(tmp_path / name) == records, name


def test_json_files(tmp_path):
    records = chat_records(3)
    lines = "\n".join(map(json.dumps, records)).encode()
    array = json.dumps(records, indent=1).encode()
    files = {
        "array.json": array,
        "lines.json": lines,
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "bom.json": b"\xef\xbb\xbf \n" + array,
        "lines.jsonl.gz": gzip.compress(lines),
        "array.json.gz": gzip.compress(array),
        "windows.jsonl": lines.replace(b"\n", b"\r\n"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        pairs = read_pairs(tmp_path / name)
        assert pairs == records, name
        assert (
            pairs.where[1]
            == f"{tmp_path / name}, {'record 1' if name.startswith('array') or name == 'bom.json' else 'line 2'}"
        )


def test_names_of_sets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    records = chat_records(3)
    table = datasets.Dataset.from_list(records)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "a:b")
    assert read_pairs(f"{tmp_path}/a:b") == records
    assert read_pairs(f"{tmp_path}/a:b:test") == records[1:2]
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: calls.append((*names, split)) or table)
    for source in ("owner/name", "owner/name:test", "owner/name:config:test", "owner/name:config:"):
        assert read_pairs(source) == records
    assert calls == [
        ("owner/name", "train"),
        ("owner/name", "test"),
        ("owner/name", "config", "test"),
        ("owner/name", "config", "train"),
    ]
    with pytest.raises(ValueError, match="NAME:CONFIG:SPLIT is needed"):
        read_pairs("a:b:c:d")

    def failing(*names, split):
        raise datasets.exceptions.DatasetGenerationError("no such column")

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(ValueError, match="owner/name cannot be loaded: no such column"):
        read_pairs("owner/name")
    table.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="holds one set without splits: leave out :test"):
        read_pairs(f"{tmp_path}/one:test")


BAD_FILES = {
    "pairs.csv": (b"a,b", "must end in .jsonl"),
    "pairs.parquet": (b"PAR1 no", "not a readable Parquet file"),
    "a.json": (b"PAR1 no", "line 1: not JSON"),
    "array.json": (b'[{"prompt": "a"', "array.json: not JSON"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "a"}')[:-4], "cannot be read"),
    "no.jsonl.gz": (b"{}", "cannot be read"),
    "latin.jsonl": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n"é"'.encode("latin-1"),
        r"line 2: not UTF-8 \(byte 0xe9\).*iconv -f LATIN1",
    ),
    "latin.json": ('[\n\n"é"]'.encode("latin-1"), "line 3: not UTF-8"),
    "utf16.jsonl": ('{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8.*iconv -f UTF-16"),
    "digits.jsonl": (b"1" * 5000, "line 1: not JSON .*digits"),
    "deep.jsonl": (b"[" * 100_000, "not JSON"),
    "empty.jsonl": (b"", "has no pairs"),
    "number.jsonl": (b"7", "line 1: a int is not an object"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / name)


def test_missing_files_and_limits(tmp_path):
    with pytest.raises(ValueError, match=r"not here.jsonl does not exist"):
        read_pairs(tmp_path / "not here.jsonl")
    for read in (read_pairs, read_prompts):
        with pytest.raises(ValueError, match="limit must be at least 1, got -1"):
            read(tmp_path / "x.jsonl", limit=-1)


def test_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("Why?\n\n  How?\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["Why?", "How?"]
    for record in ({"prompt": ""}, {"prompt": []}, {"x": 1}, 7):
        (tmp_path / "prompts.jsonl").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="line 1: prompt must be a string or a list of messages"):
            read_prompts(tmp_path / "prompts.jsonl")


def test_import_command(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps(WHOLE) + "\n" + json.dumps({**WHOLE, "prompt": "a"}))
    assert main(["pairs", "import", "--data", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [CHAT, CHAT]
    assert "2 pairs" in capsys.readouterr().out


# ---- sampling --------------------------------------------------------------------------------------------------

PROMPTS = [record["prompt"] for record in chat_records(7)]
SAMPLING = Sampling(max_new_tokens=6, batch_size=2)


def test_greedy_answers_are_those_of_each_prompt_alone(tmp_path):
    model = tiny_llama()
    greedy = SAMPLING._replace(temperature=0.0, batch_size=3)
    lines = generate_answers(model, TOKENIZER, PROMPTS, tmp_path / "answers", greedy)
    for prompt, line in zip(PROMPTS, lines, strict=True):
        ids = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        answer = []
        while len(answer) < 6 and 2 not in answer:
            with torch.no_grad():
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        assert line["finished"] == (2 in answer)
        assert line["answer"] == TOKENIZER.decode([token for token in answer if token != 2], skip_special_tokens=True)


def test_sampling_depends_on_seed_and_prompt_only(tmp_path):
    model = tiny_llama()
    first, again, other = (
        generate_answers(model, TOKENIZER, PROMPTS, tmp_path / name, SAMPLING._replace(seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other
    assert len({line["answer"] for line in first}) > 3
    written = (tmp_path / "first").read_bytes()
    assert generate_answers(model, TOKENIZER, PROMPTS, tmp_path / "first", SAMPLING) == first
    assert (tmp_path / "first").read_bytes() == written
    with pytest.raises(CacheSettingsError, match=r"answers of another run \(seed differ\)"):
        generate_answers(model, TOKENIZER, PROMPTS, tmp_path / "first", SAMPLING._replace(seed=1))


@pytest.mark.parametrize("length", [0, 10, 300, 400, 500, 600])
def test_a_cut_file_is_completed(tmp_path, length):
    expected = generate_answers(tiny_llama(), TOKENIZER, PROMPTS, tmp_path / "whole", SAMPLING)
    whole = (tmp_path / "whole").read_bytes()
    assert len(whole) > 600
    (tmp_path / "cut").write_bytes(whole[:length])
    assert generate_answers(tiny_llama(), TOKENIZER, PROMPTS, tmp_path / "cut", SAMPLING) == expected
    assert (tmp_path / "cut").read_bytes() == whole


def generate_and_die(path, fatal_event):
    torch.set_num_threads(1)
    sync, events = os.fsync, 0

    def fatal(descriptor):
        nonlocal events
        events += 1
        if events == fatal_event:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fatal
    generate_answers(tiny_llama(), TOKENIZER, PROMPTS, path, SAMPLING)


def test_killed_and_resumed(tmp_path, processes):  # noqa: F811
    expected = generate_answers(tiny_llama(), TOKENIZER, PROMPTS, tmp_path / "whole", SAMPLING)
    for event in (2, 1, 1):
        process = processes.Process(target=generate_and_die, args=(tmp_path / "killed", event))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert generate_answers(tiny_llama(), TOKENIZER, PROMPTS, tmp_path / "killed", SAMPLING) == expected
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"batch_size": 0}, "batch_size")],
)
def test_bad_sampling(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate_answers(tiny_llama(), TOKENIZER, PROMPTS, tmp_path / "x", SAMPLING._replace(**change))


def test_generate_command(tmp_path, capsys):
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    assert read_prompts(tmp_path / "prompts.jsonl", 3) == PROMPTS[:3]
    paths = {"prompts": "prompts.jsonl", "teacher": "teacher", "student": "student", "out": "pairs.jsonl"}
    words = ["pairs", "generate", "--max-new-tokens", 5]
    words += [word for option, name in paths.items() for word in (f"--{option}", tmp_path / name)]
    assert main([*map(str, words), "--keep-unfinished"]) == 0
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert [pair["prompt"] for pair in pairs] == PROMPTS
    assert all(pair["chosen"][0]["role"] == "assistant" for pair in pairs)
    assert any(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert len(tokenize_pairs(pairs, TOKENIZER).pairs) == 7
    capsys.readouterr()
    assert main([*map(str, words)]) == 0  # with the answers of the first run
    assert "left out because 5 tokens cut an answer" in capsys.readouterr().out
    assert make_pairs(["text"], ["a"], ["b"]) == [{"prompt": "text", "chosen": "a", "rejected": "b"}]

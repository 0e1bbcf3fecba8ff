"""`dadpo train` with what files and options may hold: status 2, one line that names it, and nothing written."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from dadpo_kernels.capture.local import capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.cli.main import main
from dadpo_kernels.train import arguments
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trl.trainer import _RANGES, TRLDaDPOConfig
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    tokenizer = tiny_tokenizer()
    tiny_llama().save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    pairs = tokenize_pairs(chat_records(4), tokenizer, 64)
    capture_teacher(tiny_llama(seed=3), tokenizer, pairs, root / "cache", k=4)
    # Another tokenizer: two letters have each other's ids.
    shutil.copytree(root / "model", root / "other")
    document = json.loads((root / "other" / "tokenizer.json").read_text())
    ids = document["model"]["vocab"]
    ids["e"], ids["t"] = ids["t"], ids["e"]
    (root / "other" / "tokenizer.json").write_text(json.dumps(document))
    return root


@pytest.fixture
def refused(files, tmp_path, capsys):
    """Runs `dadpo train` on a file and gives its only line on stderr."""

    def train(text="", content=None, **options):
        settings = {
            "model": files / "model", "cache": files / "cache", "output_dir": tmp_path / "out", "beta_teacher": 0.1,
            "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", "max_steps": 2, "save_strategy": "'no'",
        } | options  # fmt: skip
        path = tmp_path / "config.yaml"
        lines = "".join(f"{key}: {value}\n" for key, value in settings.items())
        path.write_bytes(content if content is not None else (lines + text).encode())
        assert main(["train", str(path)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("dadpo train: ")
        assert not (tmp_path / "out" / "model.safetensors").exists()
        return error

    return train


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: x\n\tcache: y\n", "config.yaml, line 2, column 1: found character '\\t'"),
        (b"model: x\nseed: [1, 2\n", "config.yaml, line 3, column 1: expected"),
        (b"seed: 1\nmodel: x\nseed: 2\n", "config.yaml, line 3, column 1: 'seed' is set twice"),
        (b"gradient_checkpointing_kwargs:\n  a: 1\n  a: 2\n", "config.yaml, line 3, column 3: 'a' is set twice"),
        (b"model: x\n1: 2\n", "config.yaml, line 2, column 1: this key is no text"),
        (b"on: 2\n", "config.yaml, line 1, column 1: this key is no text"),
        (b"? [a, b]\n: 2\n", "config.yaml, line 1, column 3: this key is no text"),
        (BOMB.encode(), "config.yaml, line 2, column 8: *a: write the value out"),
        (b"a: &a [*a]\n", "config.yaml, line 1, column 8: *a: write the value out"),
        (b"- model\n- cache\n", "config.yaml does not hold `key: value` lines"),
        (b"", "config.yaml does not hold `key: value` lines"),
        (b"--- a\n--- b\n", "config.yaml, line 2, column 1: but found another document"),
        (b"model: x\n# \xe9t\xe9\n", "config.yaml, line 2: byte 0xe9 is not UTF-8"),
        ("model: x\n".encode("utf-16"), "config.yaml, line 1: byte 0xff is not UTF-8"),
        (b"model: !!python/object/apply:os.system [ls]\n", "config.yaml, line 1, column 8: could not determine a con"),
        (b"model: a\x00b\n", "config.yaml is not YAML that can be read: unacceptable character"),
        (b"seed: 2020-13-45\n", "config.yaml is not YAML that can be read: month must be"),
        (b"seed: " + b"9" * 5000 + b"\n", "config.yaml is not YAML that can be read: Exceeds the limit"),
        (b"seed: " + b"[" * 5000, "config.yaml is not YAML that can be read: maximum recursion depth"),
        (b"save_strategy: no\n", "config.yaml: save_strategy is no yes or no"),
        (b"resume_from_checkpoint: true\n", "config.yaml: resume_from_checkpoint is no yes or no"),
    ],
)
def test_yaml(refused, content, message):
    assert message in refused(content=content)


def test_a_byte_order_mark_is_no_part_of_a_key(refused):
    assert "model: nowhere" not in refused(content=b"\xef\xbb\xbfmodel: nowhere\n")
    assert "required: --cache" in refused(content=b"\xef\xbb\xbfmodel: nowhere\n").replace("--output_dir, ", "")


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_no_file(tmp_path, capsys, name):
    assert main(["train", str(tmp_path / name)]) == 2
    assert str(tmp_path / name).rstrip("/.") in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "text", "list", "object", "gone"])
def test_models(refused, files, tmp_path, file, damage):
    shutil.copytree(files / "model", tmp_path / "model")
    path = tmp_path / "model" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "text": b"x", "list": b"[]", "object": b"{}"}[damage])
    assert f"{tmp_path / 'model'} cannot be loaded (" in refused(model=tmp_path / "model")


def test_a_model_without_some_parameters(refused, files, tmp_path):
    """transformers would make them up."""
    shutil.copytree(files / "model", tmp_path / "model")
    weights = load_file(files / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert "has no model.layers.1.mlp.up_proj.weight" in refused(model=tmp_path / "model")
    config = json.loads((files / "model" / "config.json").read_text()) | {"hidden_size": 64}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in refused(model=tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere cannot be loaded"),
        ({"revision": "main"}, "revision='main' is for models on the hub"),
        ({"weights_dtype": "banana"}, "invalid choice: 'banana'"),
        ({"cache": "/nowhere"}, "/nowhere is not a teacher cache"),
        ({"eval_cache": "/nowhere"}, "/nowhere is not a teacher cache"),
        ({"beta_ref": 0.1}, "has no reference log-probabilities: run `dadpo reference"),
        ({"report_to": "wandb"}, "wandb"),
        ({"resume_from_checkpoint": "/nowhere"}, "resume_from_checkpoint: /nowhere is not a directory"),
        ({"output_dir": "/proc/nowhere"}, "/proc/nowhere"),
        ({"bf16": "banana"}, "argument --bf16"),
        ({"optim": "banana"}, "invalid choice: 'banana'"),
        ({"backend": "banana"}, "backend='banana' is unknown"),
        ({"memory_budget": -1}, "memory_budget=-1"),
        ({"beta_teacher": ".nan"}, "beta_teacher must be finite"),
        ({"lr_scheduler_kwargs": "{foo: 1}"}, "foo"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options(refused, options, message):
    assert message in refused(**options)


def test_a_cache_of_another_tokenizer(refused, files):
    assert f"{files / 'cache'}" in (error := refused(model=files / "other"))
    assert "tokenizer" in error


def test_a_metric_that_is_none(refused, files):
    best = {
        "eval_cache": files / "cache", "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "load_best_model_at_end": "true", "metric_for_best_model": "accuracy",
    }  # fmt: skip
    message = refused(**best)
    assert "metric_for_best_model='accuracy' is no metric of the evaluation: choose one of eval_loss" in message


@pytest.mark.parametrize("name", arguments.RANGES)
@pytest.mark.parametrize("config_class", [DaDPOConfig, TRLDaDPOConfig])
def test_numbers_out_of_range(tmp_path, config_class, name):
    lowest = arguments.RANGES[name].low
    inside = 1 if lowest < 1 and arguments.RANGES[name].high > 1 else lowest
    more = {"dataloader_num_workers": 1} if name == "dataloader_prefetch_factor" else {}
    config_class(str(tmp_path), use_cpu=True, report_to="none", **more | {name: inside})
    for value in (lowest - 1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"^{name}=({value}) is out of range: it must be .*, or .*, the default"):
            config_class(str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("name", _RANGES)
def test_numbers_of_trl_out_of_range(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{name}=-1 is out of range"):
        TRLDaDPOConfig(str(tmp_path), use_cpu=True, **{name: -1})

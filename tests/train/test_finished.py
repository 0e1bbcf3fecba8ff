"""`dadpo train` on an output_dir that holds a finished run: nothing to do, a longer run, or a refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dadpo_kernels.capture.local import capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def train(tmp_path, capsys):
    """Runs `dadpo train` with options, and gives its status and what it printed."""
    tokenizer = tiny_tokenizer()
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = tokenize_pairs(chat_records(8), tokenizer, 64)
    for name, seed in (("cache", 3), ("other", 4)):
        capture_teacher(tiny_llama(seed=seed), tokenizer, pairs, tmp_path / name, k=4)
    (tmp_path / "config.yaml").write_text(
        f"model: {tmp_path / 'model'}\ncache: {tmp_path / 'cache'}\noutput_dir: {tmp_path / 'out'}\n"
        "beta_teacher: 0.1\nkl_weight: 0.5\nlearning_rate: 1e-3\nlr_scheduler_type: constant\nreport_to: none\n"
        "use_cpu: true\ndisable_tqdm: true\nper_device_train_batch_size: 2\nsave_strategy: steps\nsave_steps: 2\n"
    )

    def run(*options):
        status = main(["train", str(tmp_path / "config.yaml"), *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def content(out):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


def steps(out):
    return json.loads((out / "trainer_state.json").read_text())["global_step"]


@pytest.mark.parametrize("length", [("--max_steps", "6"), ("--num_train_epochs", "1"), ("--num_train_epochs", "1.5")])
@pytest.mark.parametrize("saves", ["steps", "epoch", "no"])
def test_nothing_to_do_means_nothing_done(train, tmp_path, length, saves):
    out = tmp_path / "out"
    assert train(*length, "--save_strategy", saves)[0] == 0
    before, made = content(out), steps(out)
    status, output = train(*length, "--save_strategy", saves, "--logging_steps", "7")
    assert status == 0
    assert f"{out} holds the finished run of these settings: nothing to do" in output
    assert content(out) == before
    assert steps(out) == made


def test_a_longer_run_goes_on(train, tmp_path):
    assert train("--max_steps", "6")[0] == 0
    assert train("--max_steps", "7")[0] == 0
    assert steps(tmp_path / "out") == 7
    assert train("--max_steps", "7", "--output_dir", str(tmp_path / "whole"))[0] == 0
    went_on, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    for name, value in whole.items():
        assert torch.equal(went_on[name], value)
    status, output = train("--max_steps", "3")
    assert status == 2
    assert "the checkpoint has made 7 steps and this run has 3" in output


def test_other_settings_are_no_part_of_it(train, tmp_path):
    out = tmp_path / "out"
    assert train("--max_steps", "4", "--save_strategy", "no")[0] == 0
    before = content(out)
    for options, message in [
        (("--max_steps", "5"), "whose max_steps was 4 and is 5 now, and no checkpoint to go on from"),
        (("--max_steps", "4", "--learning_rate", "2e-3"), "whose learning_rate was 0.001 and is 0.002 now"),
        (("--max_steps", "4", "--kl_weight", "0.6"), "whose kl_weight was 0.5 and is 0.6 now"),
        (("--max_steps", "4", "--cache", str(tmp_path / "other")), "whose cache was "),
    ]:
        status, output = train("--save_strategy", "no", *options)
        assert status == 2
        assert message in output
        assert "choose another output_dir" in output
    (tmp_path / "cache").rename(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "cache")
    assert "whose content of the caches was" in train("--max_steps", "4", "--save_strategy", "no")[1]
    assert content(out) == before


def test_a_damaged_model_is_made_again(train, tmp_path, caplog):
    out = tmp_path / "out"
    assert train("--max_steps", "4")[0] == 0
    model, results = (out / name for name in ("model.safetensors", "train_results.json"))
    whole, metrics = model.read_bytes(), results.read_bytes()
    model.write_bytes(whole[:-1])
    assert train("--max_steps", "4")[0] == 0
    assert f"{model} has {len(whole) - 1} bytes" in caplog.text
    assert model.read_bytes() == whole
    assert results.read_bytes() == metrics  # of the run that made the steps
    assert "nothing to do" in train("--max_steps", "4")[1]

"""A run that was stopped, or whose files were damaged, goes on from its last whole checkpoint: the same run."""

import multiprocessing
import os
import re
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.cli.main import main
from dadpo_kernels.train.checkpoints import LIST, CheckpointError, write_list
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from dadpo_kernels.train.trl.trainer import TRLDaDPOConfig, TRLDaDPOTrainer
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.train.test_trl_trainer import SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
KINDS = {
    "plain": (DaDPOTrainer, DaDPOConfig, {"beta_ref": 0.1, "beta_teacher": 0.2}),
    "trl": (TRLDaDPOTrainer, TRLDaDPOConfig, {"beta": 0.1, "beta_teacher": 0.2}),
}
STEPS = 5  # an epoch has 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "pairs"
    capture_teacher(tiny_llama(seed=3), TOKENIZER, tokenize_pairs(chat_records(8), TOKENIZER, 64), directory, k=6)
    capture_reference(tiny_llama(), TOKENIZER, directory)
    return directory


def build(kind, cache, out, model=None, **options):
    trainer_class, config_class, loss = KINDS[kind]
    settings = {"output_dir": str(out), "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}
    return trainer_class(
        model or tiny_llama(seed=1),
        args=config_class(**SETTINGS | loss | settings | options),
        train_dataset=PairDataset(cache),
        processing_class=TOKENIZER,
    )


def assert_same_parameters(run, other):
    for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_skipped_by_name(cache, tmp_path, kind, caplog):
    whole = build(kind, cache, tmp_path)
    whole.train()
    newest, previous = tmp_path / "checkpoint-4", str(tmp_path / "checkpoint-2")
    assert whole.last_checkpoint() == str(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5").rename(tmp_path / "last")
    assert whole.last_checkpoint() == str(newest)
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", LIST} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        for damaged in (None, content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            caplog.clear()
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            assert whole.last_checkpoint() == previous
            assert path.name in caplog.text
            with pytest.raises(CheckpointError, match=rf"^resume_from_checkpoint: .*{re.escape(path.name)}"):
                whole.train(str(newest))
        path.write_bytes(content)
    (newest / "optimizer.pt").unlink()
    for resume in (True, str(newest)):
        again = build(kind, cache, tmp_path, tiny_llama(seed=9))
        again.train(resume)
        assert_same_parameters(again, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_enough_steps_makes_none(cache, tmp_path, kind):
    half_an_epoch = {"num_train_epochs": 0.5, "max_steps": -1}
    for number, options in enumerate([{}, half_an_epoch, {"gradient_accumulation_steps": 3}]):
        out = tmp_path / str(number)
        whole = build(kind, cache, out, **options)
        whole.train()
        again = build(kind, cache, out, tiny_llama(seed=9), **options)
        again.train(True)
        assert_same_parameters(again, whole)
        assert again.state.global_step == whole.state.global_step
    with pytest.raises(CheckpointError, match="the checkpoint has made 5 steps and this run has 3"):
        build(kind, cache, tmp_path / "0", max_steps=3).train(True)


def test_checkpoints_of_others_are_refused(cache, tmp_path):
    run = build("plain", cache, tmp_path, save_only_model=True, save_steps=STEPS)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        run.train(True)
    run.train()
    with pytest.raises(CheckpointError, match=r"checkpoint-5 has no optimizer state \(save_only_model=True\)"):
        run.train(str(tmp_path / "checkpoint-5"))
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        run.train(str(tmp_path / "nowhere"))
    build("plain", cache, tmp_path / "small").train()
    for options in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 64}):
        model = type(run.model)(type(run.model.config)(**run.model.config.to_dict() | options))
        with pytest.raises(CheckpointError, match=r"not (one|a checkpoint) of this model, choose another output_dir"):
            build("plain", cache, tmp_path / "small", model).train(True)
    (tmp_path / "small" / "checkpoint-5" / LIST).unlink()
    write_list(tmp_path / "small" / "checkpoint-5", optimizer=True)
    assert build("plain", cache, tmp_path / "small").last_checkpoint() == str(tmp_path / "small" / "checkpoint-5")


def test_tied_heads_are_saved_once(cache, tmp_path):
    whole = build("plain", cache, tmp_path, tiny_llama(seed=1, tie_word_embeddings=True), save_steps=4)
    whole.train()
    again = build("plain", cache, tmp_path, tiny_llama(seed=9, tie_word_embeddings=True))
    again.train(str(tmp_path / "checkpoint-4"))
    assert_same_parameters(again, whole)


def test_older_checkpoints_go_when_the_next_is_whole(cache, tmp_path, monkeypatch):
    """With `save_total_limit=1`, and a process that is stopped before the list is written."""
    run = build("plain", cache, tmp_path, save_total_limit=1)

    def stop(directory, **more):
        if directory.name == "checkpoint-4":
            raise KeyboardInterrupt
        write_list(directory, **more)

    monkeypatch.setattr("dadpo_kernels.train.checked.write_list", stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.last_checkpoint() == str(tmp_path / "checkpoint-2")
    assert run.args.save_total_limit == 1
    monkeypatch.undo()
    build("plain", cache, tmp_path, save_total_limit=1).train(True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed writing file"), OSError(28, "No space")])
def test_a_full_disk_has_one_error(cache, tmp_path, monkeypatch, error):
    run = build("plain", cache, tmp_path)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises((CheckpointError, OSError), match=r"cannot be written|No space"):
        run.train()


def train_and_die(config: Path, fatal_event: int) -> None:
    """Train in a process that kills itself at the n-th step of writing files: before or after one is opened, renamed
    or removed, or a tensor file saved."""
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == fatal_event:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, args: tuple) -> None:
        writes = name == "open" and isinstance(args[1], str) and {*args[1]} & {*"wax+"}
        if writes or name in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            event()

    save = torch.save

    def save_tensors(value, path, *args, **kwargs):
        event()
        save(value, path, *args, **kwargs)
        event()
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        event()
        Path(path).write_bytes(content)

    torch.set_num_threads(1)
    torch.save = save_tensors
    sys.addaudithook(audit)
    os._exit(main(["--traceback", "train", str(config)]))


@pytest.fixture(scope="module")
def processes():
    """Context whose processes start with all imports done, and without the threads of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the fork server needs this path to import this file
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def test_killed_at_any_step_of_writing(cache, tmp_path, processes):
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {tmp_path / 'model'}\ncache: {cache}\noutput_dir: {tmp_path / name}\nbeta_teacher: 0.2\n"
            "learning_rate: 1e-3\nmax_steps: 10\nsave_strategy: steps\nsave_steps: 1\nsave_total_limit: 1\n"
            "report_to: none\nuse_cpu: true\ndisable_tqdm: true\nper_device_train_batch_size: 2\nseed: 3\n"
        )
    assert main(["train", str(tmp_path / "whole.yaml")]) == 0
    for deaths in range(200):
        process = processes.Process(target=train_and_die, args=(tmp_path / "killed.yaml", deaths + 1))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert deaths > 35
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert torch.equal(killed[name], value)

"""`dadpo train` under DDP, FSDP2 and DeepSpeed ZeRO-3 on 2 and 4 processes: the same as one process, step by step.

The set has 10 pairs and a step takes 8 of them, so in every second step all ranks but one hold no valid token.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.cli.main import main
from tests.support.ranks import free_port, needs_deepspeed, run_ranks
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
RECIPES = Path("examples/multi_gpu")
VOCAB = 2048
ENGINES = ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory, one_thread):
    """A directory with students, their cache, and the run of one process that all others are compared with."""
    d = tmp_path_factory.mktemp("engines")
    tokenizer = tiny_tokenizer()
    pairs = tokenize_pairs(chat_records(10), tokenizer, 64)
    capture_teacher(tiny_llama(seed=3), tokenizer, pairs, d / "cache", k=6)
    for name, tied in (("untied", False), ("tied", True)):
        student = tiny_llama(VOCAB, tie_word_embeddings=tied)
        student.save_pretrained(d / name)
        tokenizer.save_pretrained(d / name)
    capture_reference(tiny_llama(VOCAB), tokenizer, d / "cache")
    (d / "config.yaml").write_text(
        f"cache: {d / 'cache'}\neval_cache: {d / 'cache'}\nbeta_ref: 0.1\nbeta_teacher: 0.2\nkl_weight: 0.7\n"
        "sft_weight: 0.3\nlearning_rate: 1e-3\nlr_scheduler_type: constant\nmax_steps: 20\nlogging_steps: 1\n"
        "save_strategy: 'no'\nreport_to: none\ndisable_tqdm: true\n"
    )
    for name in ("untied", "tied"):
        assert main(["--traceback", *arguments(d, name, f"one-{name}", 8)]) == 0
    return d


def arguments(d: Path, model: str, out: str, batch: int, accumulate: int = 1) -> list[str]:
    options = {
        "model": d / model, "output_dir": d / out, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate, "per_device_eval_batch_size": 3,
    }  # fmt: skip
    return ["train", str(d / "config.yaml"), *(word for k, v in options.items() for word in (f"--{k}", str(v)))]


def assert_same_run(d: Path, one: str, other: str) -> None:
    """Losses, metrics and gradient norms of all 20 steps, the final evaluation, and every parameter."""
    history = [json.loads((d / name / "trainer_state.json").read_text())["log_history"] for name in (one, other)]
    steps = [[entry for entry in h if "loss" in entry] for h in history]
    assert len(steps[0]) == len(steps[1]) == 20
    assert steps[0][0]["loss"] > 1.2 * steps[0][-1]["loss"]
    for want, got in zip(*steps, strict=True):
        assert want.keys() == got.keys()
        del want["epoch"]  # counted in micro-batches
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{key} at step {want['step']}"
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    want, got = (json.loads((d / name / "eval_results.json").read_text()) for name in (one, other))
    assert got == pytest.approx(want, rel=1e-4)
    want, got = (load_file(d / name / "model.safetensors") for name in (one, other))
    if "lm_head.weight" in got.keys() - want.keys():  # FSDP2's gathered parameters are tied no longer: saved twice
        assert torch.equal(got.pop("lm_head.weight"), got["model.embed_tokens.weight"])
    assert want.keys() == got.keys()
    for name, value in want.items():
        # Adam moves a parameter by up to 1e-3 a step, whatever its gradient's size, and roundings of small gradients
        # with it: half a percent of what 20 steps may move.
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def launch(recipe: str, *options: str) -> subprocess.Popen:
    """`accelerate launch` of a recipe, as the documentation has it, with fewer processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{recipe}.yaml")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(*runs: subprocess.Popen) -> None:
    for run in runs:
        try:
            output, _ = run.communicate(timeout=240)
        except subprocess.TimeoutExpired:  # show where each process is, and leave none behind
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                process.send_signal(signal.SIGABRT)
            output, _ = run.communicate()
        assert run.returncode == 0, output[-4000:]


@pytest.mark.parametrize("recipe", ENGINES)
def test_recipe_on_one_node(setup, recipe):
    train = arguments(setup, "untied", recipe, 4)
    finish(launch(recipe, "--num_processes", "2", "--main_process_port", "0", "tests/support/cpu_engines.py", *train))
    assert_same_run(setup, "one-untied", recipe)


def test_recipe_on_two_nodes(setup):
    """One process on each; the second node starts first."""
    where = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    processes = ["--num_processes", "2", "tests/support/cpu_engines.py"]
    train = [*processes, *arguments(setup, "untied", "nodes", 2, accumulate=2)]
    finish(*(launch("ddp", *where, "--machine_rank", str(rank), *train) for rank in (1, 0)))
    assert_same_run(setup, "one-untied", "nodes")


def recipe_environment(recipe: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes, from the recipe."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / RECIPES / f"{recipe}.yaml"), "--num_processes", "4", "script.py"]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    if recipe == "zero3":
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {k: v for k, v in environment.items() if os.environ.get(k) != v} | {"DS_ACCELERATOR": "cpu"}


def train_rank(environment: dict[str, str], words: list[str]) -> int:
    """One of several processes."""
    os.environ |= environment
    os.chdir(ROOT)
    from tests.support import cpu_engines

    return cpu_engines.main(["--traceback", *words])


@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_and_a_tied_head(setup, engine):
    """Two micro-batches in a step where there are two."""
    words = arguments(setup, "tied", f"{engine}-4", 1, accumulate=2)
    assert run_ranks(4, train_rank, recipe_environment(engine), words) == [0] * 4
    assert_same_run(setup, "one-tied", f"{engine}-4")


def test_resumed_in_the_middle_of_an_epoch(setup):
    """An epoch has 3 steps on 2 processes; the order of the second one depends on its number."""
    saving = ["--save_strategy", "steps", "--save_steps", "5"]
    words = [*arguments(setup, "untied", "whole", 2), "--max_steps", "8", *saving]
    assert run_ranks(2, train_rank, recipe_environment("ddp"), words) == [0] * 2
    checkpoint = str(setup / "whole" / "checkpoint-5")
    words = [*arguments(setup, "untied", "resumed", 2), "--max_steps", "8", "--resume_from_checkpoint", checkpoint]
    assert run_ranks(2, train_rank, recipe_environment("ddp"), words) == [0] * 2
    want, got = (load_file(setup / name / "model.safetensors") for name in ("whole", "resumed"))
    for name, value in want.items():
        assert torch.equal(got[name], value), name

"""Captures by several local processes, which are also killed and resumed by another number of processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cache.errors import CacheSettingsError
from dadpo_kernels.cache.shards import writing
from dadpo_kernels.capture import local as capture
from tests.capture.test_local import content, processes, run  # noqa: F401  # a fixture
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def join(rank, size, port):
    """Set what a launcher tells its processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def as_rank(rank, size, port, function, *args):
    join(rank, size, port)
    function(*args)
    dist.destroy_process_group()


def launch(context, size, function, *args):
    port = free_port()
    started = [context.Process(target=as_rank, args=(rank, size, port, function, *args)) for rank in range(size)]
    for process in started:
        process.start()
    return started


def finished(started, seconds=60):
    """Exit codes. Processes that still run after `seconds` are killed, as torchrun does after one has failed."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def run_until_killed(directory, victim, batches):
    """The process `victim` kills itself after it has scored so many batches, however fast the machine is."""
    score, scored = capture._score_batch, 0

    def fatal(*args):
        nonlocal scored
        if scored == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        scored += 1
        return score(*args)

    if os.environ["RANK"] == str(victim):
        capture._score_batch = fatal
    run(directory)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_write_the_same_cache(tmp_path, processes, size):  # noqa: F811
    expected = run(tmp_path / "one")
    assert finished(launch(processes, size, run, tmp_path / "several")) == [0] * size
    assert content(tmp_path / "several") == expected
    assert not list((tmp_path / "several").glob(".*.json"))


def test_more_processes_than_shards(tmp_path, processes):  # noqa: F811
    expected = run(tmp_path / "one", 2)
    assert len([name for name in expected if name.startswith("shard")]) == 1
    assert finished(launch(processes, 2, run, tmp_path / "several", 2)) == [0, 0]
    assert content(tmp_path / "several") == expected


def test_a_killed_process_and_another_number_of_them(tmp_path, processes):  # noqa: F811
    expected = run(tmp_path / "one")
    directory = tmp_path / "killed"
    rng = random.Random(0)
    written, deaths = {}, 0
    for size in (2, 3, 2, 2, 3):
        victim = rng.randrange(size)
        codes = finished(launch(processes, size, run_until_killed, directory, victim, rng.randrange(3)), seconds=5)
        deaths += codes[victim] == -signal.SIGKILL
        for path in directory.glob("shard-*.parquet"):
            assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert deaths  # the last process may find nothing left to do
    assert written  # and the loop has checked that none of them was written twice
    assert run(directory) == expected


def differing(directory):
    settings = {"pairs": 1, "tokens_sha256": "0" if os.environ["RANK"] == "0" else "1"}
    try:
        with writing(directory, "reference", settings, {}):
            pass
    except CacheSettingsError:
        os._exit(7)


def test_processes_with_other_settings_are_refused(tmp_path, processes):  # noqa: F811
    started = launch(processes, 2, differing, tmp_path)
    assert finished(started)[1] == 7


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
    ],  # --multi_gpu means several processes, which also works on CPUs
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(tmp_path, launcher):
    """Teacher and reference in one command."""
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in chat_records(12)))
    words = [
        *("-m", *LAUNCHERS[launcher], "-m", "dadpo_kernels.cli", "teacher", "--model", "teacher"),
        *("--reference", "student", "--data", "pairs.jsonl", "--out", "cache", "--k", "4", "--shard-tokens", "100"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cache: 12 pairs") == 1
    dataset = PairDataset(tmp_path / "cache", tokenizer=tiny_tokenizer(), require_reference=True)
    assert len(dataset) == 12
    assert len(dataset.manifest.shards) > 2

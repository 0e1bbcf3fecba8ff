"""A command ends the process group that it has joined, whichever way it ends, and does not wait for other
processes."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dadpo_kernels.cli import doctor, process_group
from dadpo_kernels.cli.main import main
from dadpo_kernels.cli.process_group import ending_process_group
from tests.capture.test_local import processes  # noqa: F401  # a fixture
from tests.capture.test_ranks import finished, free_port, join
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer


def join_alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)


def command_that_joins(tmp_path, error):
    def run(args):
        join_alone(tmp_path)
        if error is not None:
            raise error
        return 0

    return run


@pytest.mark.parametrize(("error", "status"), [(None, 0), (ValueError, 2), (KeyboardInterrupt, 130)])
def test_a_command_ends_its_group(tmp_path, monkeypatch, error, status):
    monkeypatch.setattr(doctor, "run", command_that_joins(tmp_path, error))
    assert main(["doctor"]) == status
    assert not dist.is_initialized()


def gloo_runs() -> bool:
    """Whether a thread of a group is there."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text())
    return "pt_gloo_runloop\n" in names


def becomes(running: bool) -> bool:
    """Waits, because a thread takes its name after it has started, and leaves the list after it was joined."""
    end = time.monotonic() + 10
    while gloo_runs() != running and time.monotonic() < end:
        time.sleep(0.01)
    return gloo_runs() == running


@pytest.mark.skipif(sys.platform != "linux", reason="lists the process's threads")
def test_no_thread_of_the_group_outlives_a_command(tmp_path, monkeypatch):
    """Not even where a cycle of garbage, like a trainer with its callbacks, holds the group."""

    def run(args):
        join_alone(tmp_path)
        trainer = {"group": dist.group.WORLD}
        trainer["callback"] = trainer
        assert becomes(True)
        return 0

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 0
    assert becomes(False)


def leave_garbage_and_waiting_threads():
    """A cycle with DDP's reducer, and threads of the group that wait for the interpreter to release tensors."""
    dist.init_process_group("gloo")
    parameters = [torch.nn.Parameter(torch.ones(2))]
    trainer = {"reducer": dist.Reducer(parameters, [[0]], [2**20], dist.group.WORLD, [False])}
    trainer["callback"] = trainer
    dist.barrier()
    sys.setswitchinterval(100)  # the main thread does not hand over the interpreter
    for _ in range(8):
        dist.all_gather([torch.zeros(1), torch.zeros(1)], torch.ones(1), async_op=True)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass


def end_while_threads_wait(rank, port):
    join(rank, 2, port)
    with ending_process_group():
        leave_garbage_and_waiting_threads()


def test_the_threads_get_the_interpreter_while_the_group_ends(processes):  # noqa: F811
    port = free_port()
    started = [processes.Process(target=end_while_threads_wait, args=(rank, port)) for rank in range(2)]
    for process in started:
        process.start()
    assert finished(started) == [0, 0]


def test_an_error_that_main_does_not_handle(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "run", command_that_joins(tmp_path, RuntimeError("of the command")))
    with pytest.raises(RuntimeError, match="of the command"):
        main(["doctor"])
    assert not dist.is_initialized()


def test_a_group_of_the_caller_stays(tmp_path):
    join_alone(tmp_path)
    with ending_process_group():
        pass
    assert dist.is_initialized()
    dist.destroy_process_group()


def fail_with_a_pending_operation(rank, port):
    """Rank 0 waits at a barrier; rank 1 has started an operation without it, and fails."""
    join(rank, 2, port)
    process_group._SECONDS = 0.5
    with ending_process_group():
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 0:
            time.sleep(4)  # long after the other process should have exited
            dist.barrier()
        pending = dist.all_reduce(torch.ones(4), async_op=True)
        raise ValueError(f"failed with {pending}")


def test_a_process_that_fails_does_not_wait_for_the_others(processes):  # noqa: F811
    port = free_port()
    started = [processes.Process(target=fail_with_a_pending_operation, args=(rank, port)) for rank in range(2)]
    for process in started:
        process.start()
    started[1].join(60)
    assert started[1].exitcode == 1
    assert started[0].is_alive()
    assert finished(started) == [1, 1]


def teacher_command(rank, port, directory):
    """The processes disagree about k, which the second one notices while the first one waits for it."""
    join(rank, 2, port)
    paths = {"--model": directory / "model", "--data": directory / "pairs.jsonl", "--out": directory / "cache"}
    options = [word for option, path in paths.items() for word in (option, str(path))]
    sys.exit(main(["teacher", *options, "--k", str(4 + rank)]))


def test_a_capture_that_fails_in_one_process(tmp_path, processes, one_thread):  # noqa: F811
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in chat_records(4)))
    port = free_port()
    started = [processes.Process(target=teacher_command, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in started:
        process.start()
    assert finished(started) == [2, 2]

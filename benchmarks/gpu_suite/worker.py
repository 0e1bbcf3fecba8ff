"""A process that runs tasks of one lane of a stage: `python -m benchmarks.gpu_suite.worker STAGE --lane LANE`.

It prints a line of JSON when it is ready, before each task and for each row, so that whoever reads them knows what it
was at when it died. The next one goes on behind that task (`--first`), without its group (`--without`).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu_suite.settings import Settings
from benchmarks.gpu_suite.stages import STAGES
from benchmarks.gpu_suite.timing import DeviceLost, attempt


def own_output() -> Callable[..., None]:
    """A function that says a message on this process's output, which from now on nothing else can write to.

    Libraries print too, and half a line of theirs would spoil a message.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**message) -> None:
        print(json.dumps(message), file=output, flush=True)

    return say


def work(
    say: Callable[..., None], stage: str, lane: str, settings: Settings, first: int, without: Sequence[str]
) -> None:
    """Says `{"begin": number, "group", "name", "expected"}` and then `{"row": {...}}` for each task."""
    torch.manual_seed(0)
    for number, task in enumerate(STAGES[stage].tasks(settings, lane)):
        if number < first:
            continue
        if task.group in without:
            say(row=task.name | {"skipped": f"a process died with {task.group}"})
            continue
        say(begin=number, group=task.group, name=task.name, expected=task.expected)
        say(row=task.name | attempt(task.run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--lane", default="all")
    parser.add_argument("--first", type=int, default=0, help="number of the first task to run")
    parser.add_argument("--without", action="append", default=[], help="a group of tasks to leave out")
    parser.add_argument("--dry-run", action="store_true", help="tiny problems on the CPU")
    args = parser.parse_args()
    say = own_output()
    say(ready=True)
    try:
        work(say, args.stage, args.lane, Settings(args.dry_run), args.first, args.without)
    except DeviceLost as error:
        say(lost=str(error))
        sys.stderr.flush()
        os._exit(1)  # tidying up would ask the device again


if __name__ == "__main__":
    main()

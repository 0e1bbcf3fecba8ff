"""The pieces that the suite is made of: a task measures one row, a stage is a list of tasks with a limit."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.gpu_suite.settings import Settings


class Task(NamedTuple):
    """One row of the results."""

    group: str  # what fails together: tasks of a group that killed a process are not tried again
    name: dict[str, Any]  # the columns that say which row it is
    run: Callable[[], dict[str, Any]]  # the others
    expected: float  # seconds it takes on an H100, the slack included: what the dry run's clock runs by


class Stage(NamedTuple):
    """Tasks one after the other in a process for each lane, the lanes side by side."""

    tasks: Callable[[Settings, str], Iterator[Task]]  # by lane
    seconds: float  # at most
    lanes: tuple[str, ...] = ("all",)

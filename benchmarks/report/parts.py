"""What every part of the report is made of: tables, plots, and where their numbers come from."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

NOTHING = "–"


class Plot(NamedTuple):
    """`draw(data)` returns a figure of `benchmarks.style`; `name` is its file beside the results."""

    name: str
    title: str
    data: Any
    source: str
    draw: Callable[[Any], Any]

    @property
    def markdown(self) -> str:
        return f"![{self.title}](results/{self.name})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left and numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(environments: Sequence[dict], command: str) -> str:
    """The machine, the versions, the commits and the command, in a line (more machines than one: all of them)."""
    commits: dict[str, list[str]] = {}
    for e in environments:
        threads = f"{e['threads']} thread{'s' * (e['threads'] > 1)}"
        machine = f"{e['cpu']} ({e['cpu_capability']}), {threads}, {e['memory_gib']} GiB; Python {e['python']}, "
        machine += f"torch {e['versions']['torch']}; {e['date']}"
        commits.setdefault(machine, []).append(e["commit"])
    parts = [f"{machine}, commit {', '.join(dict.fromkeys(found))}" for machine, found in commits.items()]
    return "; ".join([*parts, command])


def caption(environment: dict, command: str) -> str:
    return f"Measured on {source([environment], f'`{command}`')}."

"""Measured results: rows of one schema, the tables made of them, and the pages that show those.

A row says one thing, `{study, variant, metric, value, unit, environment}`:

- `variant`: what was varied, by name, such as `{"plan": "retain", "dtype": "float32"}`. A row without the plan is
  about all plans at once, such as the size of their problem;
- `value`: a number, or the list of its repeats (of those of each process, if there were several); seldom a word;
- `environment`: the machine, versions, commit and date (`benchmarks.process.environment`). A file lists each once, and
  its rows say which in that list.

Nothing but the standard library: the GPU suite's machine has little else.
"""

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NOTHING = "–"
Cell = Callable[["Rows"], str | None]


class Row(NamedTuple):
    study: str
    variant: dict[str, Any]
    metric: str
    value: Any
    unit: str
    environment: dict[str, Any]


class Rows(list[Row]):
    def where(self, study: str | None = None, **variant: Any) -> "Rows":
        """The rows of the study whose variants have these values; None: which do not have that key."""
        return Rows(
            row for row in self
            if study in (None, row.study) and all(row.variant.get(key) == value for key, value in variant.items())
        )  # fmt: skip

    def get(self, metric: str, **variant: Any) -> Any:
        """The value of the only such row; None if there is none.

        Raises:
            ValueError: there are several.
        """
        values = [row.value for row in self.where(**variant) if row.metric == metric]
        if len(values) > 1:
            raise ValueError(f"{metric} of {variant} has {len(values)} values: say more of the variant")
        return values[0] if values else None

    def distinct(self, key: str) -> list[Any]:
        """What the variants have under a key, in the order of their first rows."""
        return list(dict.fromkeys(row.variant[key] for row in self if key in row.variant))

    def groups(self, *keys: str) -> list["Rows"]:
        """The rows that have the first of these keys, by their values of all."""
        groups: dict[tuple, Rows] = {}
        for row in self:
            if not keys or keys[0] in row.variant:
                groups.setdefault(tuple(row.variant.get(key) for key in keys), Rows()).append(row)
        return list(groups.values())


def measured(study: str, environment: dict, metrics: Mapping[str, Any], **variant: Any) -> Rows:
    """A row for each of `{"metric, unit": value}`, but for those that have no value."""
    named = [(name.partition(", "), value) for name, value in metrics.items() if value is not None]
    return Rows(Row(study, variant, metric, value, unit, environment) for (metric, _, unit), value in named)


def load(path: Path) -> Rows:
    """Of a file, or of all row files of a folder."""
    if path.is_dir():
        return Rows(row for file in sorted(path.glob("*.json")) if not is_gpu(file) for row in load(file))
    content = json.loads(path.read_text())
    return Rows(Row(**row | {"environment": content["environments"][row["environment"]]}) for row in content["rows"])


def is_gpu(path: Path) -> bool:
    """Files of the GPU suite are of its own form: what a stage did is no row."""
    return path.name.startswith("gpu-")


def save(path: Path, new: Iterable[Row]) -> None:
    """Adds rows to a file, in the place of those with the same study, variant and metric. A row stands on a line."""

    def key(row: Row) -> str:
        return json.dumps([row.study, row.variant, row.metric], sort_keys=True)

    rows = {key(row): row for row in [*(load(path) if path.exists() else ()), *new]}
    environments: list[dict] = []
    for row in rows.values():
        if row.environment not in environments:
            environments.append(row.environment)
    lines = [json.dumps(row._asdict() | {"environment": environments.index(row.environment)}) for row in rows.values()]
    known = ",\n".join(map(json.dumps, environments))
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(f'{{"environments": [\n{known}\n], "rows": [\n' + ",\n".join(lines) + "\n]}\n")
    os.replace(temporary, path)


def show(
    metric: str, form: str, pick: Callable[[Any], float] | None = None, scale: float = 1.0, **variant: Any
) -> Cell:
    """A cell with the metric's value times `scale`; of repeats, their median or what else `pick` takes."""

    def cell(rows: Rows) -> str | None:
        value = rows.get(metric, **variant)
        if value is None:
            return None
        return format(scale * (pick or middle)(value), form)

    return cell


def middle(value: Any) -> float:
    """The median of all repeats."""
    return statistics.median(flat(value))


def flat(value: Any) -> list[float]:
    return [v for part in value for v in flat(part)] if isinstance(value, list) else [value]


def table(rows: Rows, down: Sequence[str], columns: Sequence[tuple[str, Cell]]) -> str:
    """Markdown with a line for each group of rows (`Rows.groups`): a cell of it for each column, `(title, cell)`."""
    lines = [[cell(group) or NOTHING for _, cell in columns] for group in rows.groups(*down)]
    return markdown([title for title, _ in columns], lines)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The first column to the left and numbers to the right."""
    written = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in written)


def of(key: str, form: str = "") -> Cell:
    """A cell with what a line's variants have under a key."""
    return lambda rows: format(rows[0].variant[key], form)


def machines(rows: Rows) -> dict[str, Rows]:
    """`{a line about a machine: what was measured there}`, with all dates and commits."""
    by_machine: dict[str, Rows] = {}
    for row in rows:
        e = row.environment
        versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        machine = f"{e['cpu']} ({e['cpu_capability']}), {e['threads']} thread{'s' * (e['threads'] > 1)}, "
        by_machine.setdefault(f"{machine}{e['memory_gib']} GiB; Python {e['python']}, {versions}", Rows()).append(row)

    def all_of(key: str, rows: Rows) -> str:
        return ", ".join(dict.fromkeys(row.environment[key] for row in rows))

    return {f"{name}; {all_of('date', of)}, commit {all_of('commit', of)}": of for name, of in by_machine.items()}


def caption(rows: Rows, command: str) -> str:
    return f"Measured on {'; '.join(machines(rows))}; `python -m benchmarks.{command}`."


def fill(page: str, tables: Callable[[str], str]) -> str:
    """The page with `tables(NAME)` between each `<!-- table NAME -->` and `<!-- /table -->`."""
    mark = re.compile(r"(<!-- table ([\w-]+) -->\n)(?:(?!<!-- table ).)*?(?=<!-- /table -->)", re.DOTALL)
    if not len(mark.findall(page)) == page.count("<!-- table ") == page.count("<!-- /table -->"):
        raise ValueError("a table needs both its markers, <!-- table NAME --> and <!-- /table -->")
    return mark.sub(lambda match: match[1] + tables(match[2]).strip() + "\n", page)

"""Reads a YAML file of settings; what is wrong with it is one line, with the place."""

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Plain data only: no key twice, no key that is not text, and no aliases, with which a small file becomes huge."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor}: write the value out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem="this key is no text: set it in quotes if it is meant", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is set twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not YAML, or not `key: value` lines. The message has the line and the column.
    """
    content = path.read_bytes()
    try:
        settings = yaml.load(content.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {content[error.start]:#x} is not UTF-8: save it as such"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{place}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a character, the depth; a date or a number
        raise ValueError(f"{path} is not YAML that can be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not hold `key: value` lines")
    return settings

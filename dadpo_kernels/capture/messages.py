"""The texts and messages of a record: checked, and in one form whatever file they come from."""

import inspect
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # further columns that a chat template uses
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def content(where: str, column: str, value: Any) -> Any:
    """A text, or a list of messages `{"role": str, "content": str, ...}`; None stays None.

    Keys with null are dropped at every depth, because Parquet and `datasets` fill rows with the keys of other rows.
    The parts `{"type": "text", "text": ...}` of a content are joined, and a single message becomes a list.

    Raises:
        ValueError: another type, a message without role or content, parts that are not text, lone surrogates, or
            values that are not JSON. The message begins with `where` and names `column`.
    """
    if isinstance(value, dict):
        value = [value]
    if value is None or isinstance(value, str):
        return value if value is None else _checked(where, column, value)
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: {column} is a {type(value).__name__}, {str(value)[:40]!r}: a string or a list of messages "
            '{"role": ..., "content": ...} is needed'
        )
    return [_message(where, f"{column}[{i}]", part) for i, part in enumerate(_checked(where, column, value))]


def template_columns(where: str, record: dict[str, Any]) -> dict[str, Any]:
    """`tools` (a list of JSON schemas) and `chat_template_kwargs` (a dictionary) of a record that has them, also as
    JSON text. Empty ones are left out.

    Raises:
        ValueError: another type, text that is not JSON, or names that are arguments of `apply_chat_template` itself.
    """
    columns: dict[str, Any] = {}
    for name, needed in zip(TEMPLATE_COLUMNS, (list, dict), strict=True):
        value = record.get(name)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {name} is a text that is not JSON ({error})") from None
        if not value and not isinstance(value, bool | int | float):
            continue
        if not isinstance(value, needed) or (needed is list and not all(isinstance(tool, dict) for tool in value)):
            form = "a list of JSON schemas" if needed is list else "an object"
            raise ValueError(f"{where}: {name} is {str(value)[:40]!r}: {form} is needed, or its JSON text")
        columns[name] = _checked(where, name, value)
    check_template_kwargs(f"{where}: chat_template_kwargs", columns.get("chat_template_kwargs", {}))
    return columns


def check_template_kwargs(where: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a name is an argument of `apply_chat_template` itself, which a template never sees."""
    if reserved := sorted(_RESERVED & kwargs.keys()):
        raise ValueError(f"{where} sets {', '.join(reserved)}, which is no variable of a chat template: leave it out")


def _checked(where: str, column: str, value: Any) -> Any:
    """The value without nulls, if it is JSON that can be encoded."""
    try:
        value = _without_nulls(value)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {column} holds half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no "
            "text: replace it, or skip the record"
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: {column} is nested too deeply") from None
    except TypeError as error:
        raise ValueError(f"{where}: {column} is not JSON ({error})") from None
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _message(where: str, name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(
            f'{where}: {name} is {str(message)[:40]!r}: a message {{"role": ..., "content": ...}} is needed'
        )
    given = message.get("content")
    if isinstance(given, list):
        message = {**message, "content": "".join(_text_of_part(where, name, part) for part in given)}
    elif given is None and not message.get("tool_calls"):
        raise ValueError(f"{where}: {name} has no content: a string is needed (null and a missing key are the same)")
    elif given is not None and not isinstance(given, str):
        raise ValueError(f"{where}: the content of {name} is {str(given)[:40]!r}: a string is needed")
    return message


def _text_of_part(where: str, name: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ValueError(f"{where}: the content of {name} has a part {kind!r}: only parts of text are supported")
    return part["text"]

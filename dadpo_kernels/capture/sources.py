"""Reads records from JSONL, Parquet or `datasets`, and converts the common forms of preference sets to one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # further columns that a chat template uses


def records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """`(where, record)` for each record; `where` is its place in the source, for error messages.

    Args:
        source: a `.jsonl` or `.json` file with one object per line, a `.parquet` file, a directory written by
            `Dataset.save_to_disk`, or the name of a set for `datasets.load_dataset`. For the last two a split can
            follow a colon, `NAME:SPLIT`; the default is `train`.

    Raises:
        ValueError: the source is another kind of file, or is malformed.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                rows = (row for batch in file.iter_batches(256) for row in batch.to_pylist())
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))
        except pa.ArrowException as error:
            raise ValueError(f"{path} is not a readable Parquet file ({error})") from None
    elif path.is_file():
        raise ValueError(f"{path}: its name must end in .jsonl, .json or .parquet, which tells its format")
    else:
        name, _, split = str(source).partition(":")
        yield from ((f"{source}, row {number}", row) for number, row in enumerate(_dataset(name, split or "train")))


def as_pair(where: str, record: Any) -> dict[str, Any]:
    """Convert a record to `{"prompt", "chosen", "rejected"}`, either all strings or all lists of messages.

    These forms are accepted:

    - the result's form itself (TRL's explicit prompt, conversational or standard);
    - conversations in `chosen` and `rejected` that begin with the prompt. `prompt` is missing, a string
      (UltraFeedback-binarized, HH) or the same messages. The messages that both share become the prompt;
    - strings without a prompt. The text that both share becomes the prompt, up to the space before the first
      difference, as in TRL's `extract_prompt`.

    Raises:
        ValueError: the record has another form, or `chosen` and `rejected` share nothing.
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        missing = [name for name in ("chosen", "rejected") if not isinstance(record, dict) or name not in record]
        raise ValueError(f"{where}: missing {', '.join(missing)}. A pair needs prompt, chosen and rejected")
    prompt, chosen, rejected = (_messages(record.get(name)) for name in ("prompt", "chosen", "rejected"))
    for_template = {name: record[name] for name in _TEMPLATE_COLUMNS if record.get(name) is not None}

    # Separate the prompt from conversations or strings that begin with it.
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = _shared(chosen, rejected)
        begun = isinstance(prompt, list) and prompt != [] and shared[: len(prompt)] == prompt
        if prompt is None or isinstance(prompt, str) or begun:
            if isinstance(prompt, str) and not any(_content(message) == prompt for message in shared):
                raise ValueError(f"{where}: none of the messages that chosen and rejected share is the prompt")
            prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        length = len(_shared(chosen, rejected))
        length -= length > 0 and chosen[length - 1] == " "
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not prompt:
        raise ValueError(f"{where}: there is no prompt, and chosen and rejected do not begin with the same one")

    # Check that the result has one of the two forms.
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if {type(part) for part in parts.values()} not in ({str}, {list}):
        given = ", ".join(f"{name} is a {type(part).__name__}" for name, part in parts.items())
        raise ValueError(f"{where}: {given}; a pair has three strings, or three lists of messages")
    return {**parts, **for_template}


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
                yield f"{path}, line {number}", record


def _dataset(name: str, split: str) -> Any:
    import datasets

    if not Path(name).is_dir() or not any(Path(name).glob("dataset*.json")):
        return datasets.load_dataset(name, split=split)
    saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{name} has no split {split!r}: choose one of {', '.join(saved)}, as {name}:SPLIT")
        return saved[split]
    return saved


def _messages(value: Any) -> Any:
    """A list of messages without the keys that a Parquet column fills with null; other values as they are."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return value
    return [{key: inner for key, inner in message.items() if inner is not None} for message in value]


def _shared(a: Any, b: Any) -> Any:
    """The common beginning of two conversations or texts, without the last message or character of the shorter one."""
    most = min(len(a), len(b)) - 1
    return a[: next((i for i in range(most) if a[i] != b[i]), max(most, 0))]


def _content(message: Any) -> Any:
    return message.get("content") if isinstance(message, dict) else None

"""Records from JSONL, Parquet or `datasets`, and the shapes that preference sets come in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KEPT = ("tools", "chat_template_kwargs")  # columns beside the pair's own that a chat template uses


def records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """`(where, record)` for each record: `where` names its place for messages.

    Args:
        source: a `.jsonl` or `.json` file with an object a line, a `.parquet` file, a directory written by
            `Dataset.save_to_disk`, or the name of a set for `datasets.load_dataset`. The last two take their split
            after a colon, `NAME:SPLIT`; without one, `train`.
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
            raise ValueError(f"{path} is no Parquet file that can be read ({error})") from None
    elif path.is_file():
        raise ValueError(f"{path}: its name must end in .jsonl, .json or .parquet, to tell what is in it")
    else:
        name, _, split = str(source).partition(":")
        yield from ((f"{source}, row {number}", row) for number, row in enumerate(_dataset(name, split or "train")))


def as_pair(where: str, record: Any) -> dict[str, Any]:
    """`{"prompt", "chosen", "rejected"}`, all strings or all lists of messages, from the shapes that are in use:

    - that one (TRL's explicit prompt, conversational or standard);
    - conversations in `chosen` and `rejected` that begin with the prompt, beside a `prompt` that is missing, a string
      (UltraFeedback-binarized, HH) or the same messages: the messages they share are the prompt;
    - strings without a prompt: what they share is the prompt, up to the space before the first difference, as in
      TRL's `extract_prompt`.

    Raises:
        ValueError: none of these, or nothing is shared.
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        missing = [name for name in ("chosen", "rejected") if not isinstance(record, dict) or name not in record]
        raise ValueError(f"{where}: lacks {', '.join(missing)}. A pair needs prompt, chosen and rejected")
    prompt, chosen, rejected = (_messages(record.get(name)) for name in ("prompt", "chosen", "rejected"))
    kept = {name: record[name] for name in _KEPT if record.get(name) is not None}
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = _shared(chosen, rejected)
        begun = isinstance(prompt, list) and prompt != [] and shared[: len(prompt)] == prompt
        if prompt is None or isinstance(prompt, str) or begun:
            if isinstance(prompt, str) and not any(_content(message) == prompt for message in shared):
                raise ValueError(f"{where}: the prompt is in no message that chosen and rejected share")
            prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        length = len(_shared(chosen, rejected))
        length -= length > 0 and chosen[length - 1] == " "
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not prompt:
        raise ValueError(f"{where}: there is no prompt, and chosen and rejected do not begin with the same one")
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if {type(part) for part in parts.values()} not in ({str}, {list}):
        given = ", ".join(f"{name} is a {type(part).__name__}" for name, part in parts.items())
        raise ValueError(f"{where}: {given}; a pair has three strings, or three lists of messages")
    return {**parts, **kept}


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
    found = datasets.load_from_disk(name)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{name} has no split {split!r}: choose one of {', '.join(found)}, as {name}:SPLIT")
        return found[split]
    return found


def _messages(value: Any) -> Any:
    """Lists of messages without the keys that a column of structs fills with null."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return value
    return [{key: inner for key, inner in message.items() if inner is not None} for message in value]


def _shared(a: Any, b: Any) -> Any:
    """What two conversations or texts begin with, at least one message or character of each left."""
    most = min(len(a), len(b)) - 1
    return a[: next((i for i in range(most) if a[i] != b[i]), max(most, 0))]


def _content(message: Any) -> Any:
    return message.get("content") if isinstance(message, dict) else None

"""Reads records from JSON, Parquet or `datasets`."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_JSON = (".jsonl", ".json")


def records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """`(where, record)` for each record; `where` is its place in the source, for error messages.

    Args:
        source: a `.jsonl` or `.json` file in UTF-8, with one object a line or one array of objects, also with `.gz`
            behind its name; a `.parquet` file; a `.txt` file, of which each line that is not empty is a record
            `{"prompt": line}`; a directory written by `Dataset.save_to_disk`; or the name of a set for
            `datasets.load_dataset`. For the last two, a split or a configuration and a split can follow after colons:
            `NAME:SPLIT`, `NAME:CONFIG:SPLIT`; the default is the split `train`.

    Raises:
        ValueError: the source is another kind of file, or is malformed.
    """
    path = Path(source)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.is_dir() or not (path.is_file() or suffix in (*_JSON, ".txt", ".parquet")):
        yield from _dataset(str(source))
    elif not path.exists():
        raise ValueError(f"{path} does not exist")
    elif suffix in _JSON or suffix == ".txt":
        yield from _lines(path, suffix)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise ValueError(f"{path}: its name must end in .jsonl, .json, .jsonl.gz, .txt or .parquet, for its format")


def _lines(path: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    """Records of a text file, with or without a byte order mark."""
    number = 1
    try:
        with _open(path) as file:
            if suffix != ".txt" and _first(file) == b"[":
                yield from _array(path, file)
                return
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    where = f"{path}, line {number}"
                    yield where, {"prompt": text} if suffix == ".txt" else _json(where, text)
    except UnicodeDecodeError as error:
        at = number + error.object[: error.start].count(b"\n")
        encoding = "UTF-16" if 0 in error.object[:64] else "LATIN1"
        raise ValueError(
            f"{path}, line {at}: not UTF-8 (byte {error.object[error.start]:#04x}): convert the file, for example "
            f"with `iconv -f {encoding} -t UTF-8`"
        ) from None
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _first(file: BinaryIO) -> bytes:
    """The first byte that is no space and no byte order mark; the file is then at its beginning again."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    return start


def _array(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    listed = _json(str(path), file.read().decode("utf-8-sig"))
    if not isinstance(listed, list):
        raise ValueError(f"{path}: an array of objects is needed")
    yield from ((f"{path}, record {number}", record) for number, record in enumerate(listed))


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python converts
        raise ValueError(f"{where}: not JSON ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            with_json = {field.name: field.type for field in file.schema_arrow if _holds_json(field.type)}
            # Teacher data have millions of numbers a row: few rows at a time, and one of them as Python values.
            for batch in file.iter_batches(16):
                for at in range(len(batch)):
                    row = batch.slice(at, 1).to_pylist()[0]
                    where = f"{path}, row {number}"
                    number += 1
                    for name, kind in with_json.items():
                        row[name] = _decoded(f"{where}, {name}", kind, row[name])
                    yield where, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, row {number}: not a readable Parquet file ({error})") from None


def _holds_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json" or any(
        _holds_json(kind.field(number).type) for number in range(kind.num_fields)
    )


def _decoded(where: str, kind: Any, value: Any) -> Any:
    """The value of a column of Arrow type `kind`, with the texts of `datasets`' feature `Json` decoded as it does."""
    import pyarrow.types as types

    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return _json(where, value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_decoded(where, kind.value_type, inner) for inner in value]
    if types.is_struct(kind):
        return {field.name: _decoded(where, field.type, value[field.name]) for field in kind}
    return value


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"{source} is no file, and the package `datasets` is missing for a set of that name: pip install datasets"
        ) from None

    # The name ends where the directory does, or else at the first colon.
    name, rest = source, ""
    while not Path(name).is_dir() and ":" in name:
        name, _, last = name.rpartition(":")
        rest = f"{last}:{rest}" if rest else last
    if not Path(name).is_dir():
        name, _, rest = source.partition(":")
    *configuration, split = rest.split(":")
    split = split or "train"
    if len(configuration) > 1:
        raise ValueError(f"{source}: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT is needed")
    try:
        if Path(name).is_dir() and any(Path(name).glob("dataset*.json")):
            rows = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise ValueError(
                        f"{name} has no split {split!r}: choose one of {', '.join(rows)}, as {name}:SPLIT"
                    )
                rows = rows[split]
            elif rest:
                raise ValueError(f"{name} holds one set without splits: leave out :{rest}")
        else:
            rows = datasets.load_dataset(name, *configuration, split=split)
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as error:  # of any class: a data set's files, its builder and the hub have many
        raise ValueError(f"{source} cannot be loaded: {error}") from None
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows))

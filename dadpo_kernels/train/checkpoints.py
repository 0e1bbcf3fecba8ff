"""Which directories of a run hold all that was written to them: a list of their files, written last.

    complete.json     {"files": {name: {"bytes": ..., "sha256": ...}}, ...}

A process that is killed while it saves leaves a directory without a list, or with one that does not hold.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LIST = "complete.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed from, or cannot be written."""


def write_list(directory: str | Path, files: Iterable[Path] | None = None, **more: Any) -> None:
    """Say that a directory is complete: list its files with sizes and SHA-256, atomically.

    Args:
        files: those that count; None is all files, at any depth.
        more: further entries, which `read_list` gives back.
    """
    directory = Path(directory)
    counted = [path for path in (directory.rglob("*") if files is None else files) if path.is_file()]
    names = sorted(path.relative_to(directory).as_posix() for path in counted if path.name != LIST)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _sha256(directory / name), names)
        sizes = [(directory / name).stat().st_size for name in names]
        entries = zip(names, sizes, digests, strict=True)
        listed = {name: {"bytes": size, "sha256": digest} for name, size, digest in entries}
    temporary = directory / f".{LIST}.tmp"
    with temporary.open("w") as file:
        json.dump({"files": listed, **more}, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / LIST)


def read_list(directory: str | Path) -> dict[str, Any]:
    """The further entries of a directory's list, after a check of all files in it.

    Raises:
        CheckpointError: there is no list, or a file differs from it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    try:
        document = json.loads((directory / LIST).read_bytes())
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in document.pop("files").items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {LIST}: the process that wrote it was stopped, or was no trainer of this package (if "
            "you know that it is whole, dadpo_kernels.train.checkpoints.write_list says so)"
        ) from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / LIST} is damaged ({error!r})") from error
    for name, (size, _) in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {size} were written")
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(files, pool.map(lambda name: _sha256(directory / name), files), strict=True):
            if digest != files[name][1]:
                raise CheckpointError(f"{directory / name} has other content than was written")
    return document


def check_resumable(directory: str | Path) -> None:
    """Raise CheckpointError if a run cannot go on from a checkpoint exactly as if it had not stopped."""
    if not read_list(directory).get("optimizer", True):
        raise CheckpointError(f"{directory} has no optimizer state (save_only_model=True): pass it as the model")


def checkpoints(output_dir: str | Path) -> list[str]:
    """The checkpoints of a run, whole or not, the newest first."""
    steps = {
        path: int(match[1])
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [str(path) for path in sorted(steps, key=lambda path: -steps[path])]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

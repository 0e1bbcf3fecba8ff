"""A directory of Parquet shards with a manifest, written so that a kill at any moment loses no finished shard.

    DIR/manifest.json     settings, and for each shard its file, size, SHA-256, the indices of its pairs, totals
    DIR/shard-00000.parquet ...
    DIR/reference/            the same layout, with the reference's log-probabilities

Each file is written under a temporary name, synced and renamed, and a shard is part of the cache once the manifest
lists it. After a kill, temporary files and shards that are not listed may remain; the next run overwrites them.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import (
    CacheChecksumError,
    CacheFormatError,
    CacheIncompleteError,
    CacheSettingsError,
    CacheTruncatedError,
    CacheVersionError,
)
from .lock import lock
from .pairs import SIDES
from .ranks import Ranks, ranks
from .storage import parse, storage_errors

logger = logging.getLogger("dadpo_kernels")

FORMAT = "dadpo-cache"
VERSION = 1
MANIFEST = "manifest.json"
REFERENCE = "reference"  # the sub-directory of a teacher cache where its reference's log-probabilities are
# The settings that readers need. A capture records more of them, with which a resumed one is compared.
REQUIRED_SETTINGS: dict[str, dict[str, type]] = {
    "teacher": {"pairs": int, "k": int, "vocab_size": int, "tokens_sha256": str, "tokenizer_sha256": str},
    "reference": {"pairs": int, "tokens_sha256": str},
}


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

    Attributes:
        file: name of the file; `bytes` and `sha256` are those of its content.
        index: the index of each row's pair in the source, in the order of the rows.
        tokens: number of answer tokens.
        max_id: the largest token id in any column.
    """

    file: str
    bytes: int
    sha256: str
    index: list[int]
    tokens: int
    max_id: int


@dataclass
class Manifest:
    """The content of `manifest.json`. A resumed capture must have the same `settings`; `info` is for people."""

    kind: str
    settings: dict[str, Any]
    info: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)

    @property
    def sides(self) -> tuple[str, ...]:
        """The answers that all pairs have: chosen and rejected, or chosen alone."""
        return tuple(self.settings.get("sides", SIDES))

    def index(self) -> set[int]:
        return {i for shard in self.shards for i in shard.index}

    def dump(self) -> bytes:
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return (json.dumps(document, ensure_ascii=False) + "\n").encode()


def read_manifest(directory: Path, kind: str) -> Manifest:
    """Parse and check `directory/manifest.json`.

    Raises:
        CacheFormatError: the file is missing or not JSON, a field is missing or has another type, or a pair occurs
            twice.
        CacheVersionError: its version is not `VERSION`.
    """
    # Parse it, and check that this package knows its format.
    path = directory / MANIFEST
    try:
        with storage_errors(path, (FileNotFoundError, NotADirectoryError)):
            content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheFormatError(f"{directory} is not a {kind} cache: it does not contain a {MANIFEST}") from None
    document = parse(path, content, "capture again")
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise CacheFormatError(f"{path} is not the manifest of a {FORMAT}")
    if (version := document.pop("version", None)) != VERSION:
        raise CacheVersionError(
            f"{directory} has version {version!r} of the format and this package reads version {VERSION}: capture "
            "again, or install the version of dadpo-kernels that wrote it"
        )

    # Check the fields' types, and the settings that readers need.
    manifest = _typed(Manifest, document, path)
    if manifest.kind != kind:
        raise CacheFormatError(f"{directory} is a cache of kind {manifest.kind!r}, {kind!r} is needed")
    manifest.shards = [_typed(Shard, shard, path) for shard in manifest.shards]
    listed = [i for shard in manifest.shards for i in shard.index]
    if not all(type(number) is int for number in listed):
        raise CacheFormatError(f"{path} is malformed: each index must be an integer")
    for name, needed in REQUIRED_SETTINGS[kind].items():
        if type(manifest.settings.get(name)) is not needed:
            raise CacheFormatError(f"{path} is malformed: settings.{name} must be of type {needed.__name__}")
    if manifest.settings.get("sides", ["chosen"]) not in (["chosen"], list(SIDES)):
        raise CacheFormatError(f'{path} is malformed: settings.sides must be ["chosen"] or {list(SIDES)}')

    # Files must be inside the directory, and each pair must occur once.
    if any(Path(shard.file).name != shard.file for shard in manifest.shards):
        raise CacheFormatError(f"{path} is malformed: a shard's file is not a plain file name")
    if len(set(listed)) != len(listed):
        raise CacheFormatError(f"{path} lists a pair more than once")
    return manifest


def read_complete(directory: Path, kind: str, *, verify: bool) -> Manifest:
    """Read the manifest of a finished cache and check its shards: their sizes, and with `verify` their SHA-256.

    Raises:
        CacheIncompleteError: the shards do not hold all pairs.
        CacheTruncatedError: a shard is missing, or its size is wrong.
        CacheChecksumError: a shard's content is wrong.
        CacheError: other subclasses, as `read_manifest`.
    """
    manifest = read_manifest(directory, kind)
    if len(manifest.index()) != manifest.settings["pairs"]:
        raise CacheIncompleteError(
            f"{directory} holds {len(manifest.index())} of {manifest.settings['pairs']} pairs: run the same "
            f"`dadpo {kind}` command again, it continues where it stopped"
        )
    for shard in manifest.shards:
        path, size = directory / shard.file, _size(directory, shard)
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise CacheTruncatedError(
                f"{path} {state}, {shard.bytes} bytes were written: copy it again or capture again"
            )
        if verify:
            check_sha256(path, shard.sha256)
    return manifest


def _size(directory: Path, shard: Shard) -> int | None:
    path = directory / shard.file
    with storage_errors(path):
        return path.stat().st_size if path.is_file() else None


def check_sha256(path: Path, expected: str) -> bytes:
    """The file's content. Raises CacheChecksumError if it does not have this SHA-256."""
    with storage_errors(path):
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise CacheChecksumError(
            f"{path} has changed since it was written (SHA-256 differs): copy it again or capture again"
        )
    return content


@contextlib.contextmanager
def writing(
    directory: Path,
    kind: str,
    settings: Mapping[str, Any],
    info: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Iterator["ShardWriter"]:
    """Open a directory for writing, and resume what an interrupted run wrote there. When the block ends without an
    error, `ShardWriter.manifest` lists the shards of all processes.

    Args:
        kind: "teacher" or "reference".
        settings: must be those of the interrupted run.
        info: facts for people, which may differ from those of the interrupted run.
        files: content of further files, by name.

    Raises:
        CacheSettingsError: the directory holds a capture with other settings.
        CacheBusyError: another process is writing to it.
        CacheError: a file cannot be read or written.
    """
    writer = ShardWriter(directory, Manifest(kind, dict(settings), dict(info)), ranks())
    finished = _finished(directory, writer.manifest, files or {})
    writer.ranks.barrier()  # all processes must have seen the same before one of them writes
    if finished is not None:
        writer.manifest = finished
        yield writer
        return
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory) if writer.ranks.rank == 0 else contextlib.nullcontext():
        if writer.ranks.rank == 0:
            writer.open(files or {})
        writer.ranks.barrier()
        writer.reread()
        writer.ranks.barrier()  # all processes must have the same list before one of them adds a shard
        yield writer
        writer.ranks.barrier()
        if writer.ranks.rank == 0:
            writer.collect()
        writer.ranks.barrier()
        writer.reread()


@dataclass
class ShardWriter:
    """Adds files to a directory that `writing` has opened.

    Only the first process writes the manifest. The other ones write a record of each shard to a separate file, and the
    first process moves these records to the manifest whenever it writes a shard.
    """

    directory: Path
    manifest: Manifest
    ranks: Ranks

    def open(self, files: Mapping[str, bytes]) -> None:
        """Prepare the directory: the first process calls this before the other ones read the manifest."""
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink()
        if (self.directory / MANIFEST).exists():
            previous = read_manifest(self.directory, self.manifest.kind)
            previous.shards += self._recorded_shards(previous)
            if previous.shards:
                _check_same(self.directory, previous.settings, self.manifest.settings)
                # A shard that was deleted or cut since then is captured again.
                intact = [shard for shard in previous.shards if _size(self.directory, shard) == shard.bytes]
                lost = len(previous.shards) - len(intact)
                logger.debug("%s: resuming after %d shards; %d were lost", self.directory, len(intact), lost)
                previous.shards = intact
                self.manifest = previous
        for name, content in files.items():
            self.write_file(name, content)
        self.collect()

    def reread(self) -> None:
        """Read the manifest that the first process wrote."""
        if self.ranks.rank > 0:
            written = read_manifest(self.directory, self.manifest.kind)
            _check_same(self.directory, written.settings, self.manifest.settings)
            self.manifest = written

    def collect(self) -> None:
        """Write the manifest, with the shards that other processes have recorded."""
        self.manifest.shards += self._recorded_shards(self.manifest)
        self.manifest.shards.sort(key=lambda shard: shard.file)
        records = [self._record(shard.file) for shard in self.manifest.shards]
        self.write_file(MANIFEST, self.manifest.dump())
        for path in records:
            path.unlink(missing_ok=True)

    def write_shard(self, number: int, table: pa.Table, *, tokens: int, max_id: int) -> None:
        """Write shard `number` and list it. Each row is a row group, so a pair is read without its neighbours."""
        sink = pa.BufferOutputStream()
        pq.write_table(
            table, sink, row_group_size=1, compression="zstd", compression_level=3,
            use_dictionary=False, write_statistics=False, write_page_checksum=True,
        )  # fmt: skip
        content = sink.getvalue().to_pybytes()
        file = f"shard-{number:05d}.parquet"
        self.write_file(file, content)
        digest = hashlib.sha256(content).hexdigest()
        shard = Shard(file, len(content), digest, table["index"].to_pylist(), tokens, max_id)
        if self.ranks.rank == 0:
            self.manifest.shards.append(shard)
            self.collect()
        else:
            self.write_file(self._record(file).name, json.dumps(asdict(shard)).encode())

    def _record(self, file: str) -> Path:
        return self.directory / f".{file}.json"

    def _recorded_shards(self, manifest: Manifest) -> list[Shard]:
        """Shards that other processes have recorded and the manifest does not list."""
        remedy = "delete it, its shard is captured again"
        paths = self.directory.glob(self._record("*").name)
        recorded = [_typed(Shard, parse(path, path.read_bytes(), remedy), path) for path in paths]
        listed = manifest.index()
        return [shard for shard in recorded if listed.isdisjoint(shard.index)]

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file atomically: after a crash, either the old or the new content is complete."""
        temporary = self.directory / f".{name}.{self.ranks.rank}-{os.getpid()}.tmp"
        with storage_errors(self.directory / name):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.directory / name)
            descriptor = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _finished(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest | None:
    """What a finished run with these settings wrote, if it is all there: nothing needs to be written then, which a
    directory without the right to write allows."""
    with storage_errors(directory):
        if not (directory / MANIFEST).is_file():
            return None
    written = read_manifest(directory, manifest.kind)
    whole = len(written.index()) == manifest.settings["pairs"] and written.settings == manifest.settings
    whole = whole and all(_size(directory, shard) == shard.bytes for shard in written.shards)
    for name, content in files.items():
        path = directory / name
        with storage_errors(path):
            whole = whole and path.is_file() and path.read_bytes() == content
    return written if whole else None


def _check_same(directory: Path, previous: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    different = [
        f"{name} was {previous.get(name)!r} and is {current.get(name)!r} now"
        for name in dict.fromkeys((*previous, *current))
        if previous.get(name) != current.get(name)
    ]
    if different:
        raise CacheSettingsError(
            f"{directory} holds a capture with other settings: {'; '.join(different)}. Give the same settings to "
            "resume it, write to another directory, or delete this one"
        )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with storage_errors(directory / ".lock"):
            file = stack.enter_context((directory / ".lock").open("w"))
        lock(file, directory)
        yield


def _typed(cls: Any, document: Any, path: Path) -> Any:
    """A dataclass from a JSON object, which must have exactly its fields, with their outer types."""
    expected: dict[str, Any] = {f.name: getattr(f.type, "__origin__", f.type) for f in fields(cls)}
    if not isinstance(document, dict) or {name: type(value) for name, value in document.items()} != expected:
        needed = ", ".join(f"{name}: {t.__name__}" for name, t in expected.items())
        raise CacheFormatError(f"{path} is malformed: each {cls.__name__.lower()} needs {{{needed}}}")
    return cls(**document)

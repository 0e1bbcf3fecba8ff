"""Reads rows of a cache's shards and checks them."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CacheChecksumError, CacheFormatError
from .format import TEACHER_SCHEMA, TOKEN_COLUMNS, read_pair
from .pairs import Pair
from .shards import Manifest, Shard


class RowReader:
    """Reads the rows of a directory's shards in any order. Shards stay open as memory maps, at most `OPEN_FILES`.

    Its methods raise CacheFormatError for a file that does not fit the manifest or the schema, and CacheChecksumError
    for one that cannot be read.
    """

    OPEN_FILES = 256

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        self._directory = directory
        self._schema = schema
        self._files: dict[str, pq.ParquetFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # each data-loading worker opens the files again

    def read(self, shard: Shard, row: int) -> dict[str, Any]:
        """Row number `row` of `shard`, as Python values by column. Page checksums are verified."""
        with self._reading(shard.file):
            table = self._file(shard).read_row_group(row, columns=self._schema.names, use_threads=False)
            values = {name: column[0].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}
        _check_values(f"{shard.file}, row {row}", values)
        if values["index"] != shard.index[row]:
            raise CacheFormatError(
                f"{shard.file} has pair {values['index']} in row {row}, the manifest says {shard.index[row]}"
            )
        return values

    def read_columns(self, shard: Shard, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of all rows of `shard`; `index` must be one of them."""
        with self._reading(shard.file):
            rows = self._file(shard).read(columns=list(columns), use_threads=False).to_pylist()
        for number, row in enumerate(rows):
            _check_values(f"{shard.file}, row {number}", row)
        if [row["index"] for row in rows] != shard.index:
            raise CacheFormatError(f"the pairs in {shard.file} are not those that the manifest lists")
        return rows

    def _file(self, shard: Shard) -> pq.ParquetFile:
        if shard.file not in self._files:
            if len(self._files) >= self.OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            file = pq.ParquetFile(self._directory / shard.file, memory_map=True, page_checksum_verification=True)
            _check_schema(shard.file, file.schema_arrow, self._schema)
            if file.metadata.num_rows != len(shard.index) or file.num_row_groups != len(shard.index):
                raise CacheFormatError(
                    f"{shard.file} has {file.metadata.num_rows} rows in {file.num_row_groups} row groups, "
                    f"{len(shard.index)} of each are needed"
                )
            self._files[shard.file] = file
        return self._files[shard.file]

    @contextlib.contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        # A page with a wrong checksum gives an OSError; names in a damaged footer may not even be valid UTF-8.
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CacheChecksumError(f"{self._directory / file} cannot be read ({error}): copy it again") from error


def _check_schema(file: str, schema: pa.Schema, needed: pa.Schema) -> None:
    """Columns may be nullable and of the other types for bytes, as pandas and polars write them; more columns are
    ignored."""
    for field in needed:
        at = schema.get_field_index(field.name)
        if at < 0:
            raise CacheFormatError(f"{file} has no column {field.name}, or two: it has {', '.join(schema.names)}")
        given = schema.field(at).type
        is_bytes = pa.types.is_binary(field.type) and str(given) in ("large_binary", "binary_view")
        if given != field.type and not is_bytes:
            raise CacheFormatError(f"{file}: the column {field.name} is of type {given}, {field.type} is needed")


def _check_values(where: str, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if value is None:
            raise CacheFormatError(f"{where}: {name} is null")


def read_tokens(cache: Path, manifest: Manifest) -> list[Pair]:
    """The token ids of all pairs of a teacher cache, in the order of their source. Raises as `RowReader` does."""
    reader = RowReader(cache, TEACHER_SCHEMA)
    rows = (row for shard in manifest.shards for row in reader.read_columns(shard, TOKEN_COLUMNS))
    return sorted((read_pair(row, manifest.sides) for row in rows), key=lambda pair: pair.index)

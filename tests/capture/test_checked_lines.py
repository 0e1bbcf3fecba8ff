"""A file of lines with checksums, after every possible single damage."""

from contextlib import closing

import pytest

from dadpo_kernels.cache.errors import CacheBusyError, CacheSettingsError
from dadpo_kernels.capture.checked_lines import CheckedLines

SETTINGS = {"seed": 0}
RECORDS = [{"batch": 0}, {"batch": 1}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lines"


def write(path, records=RECORDS, settings=SETTINGS):
    with closing(CheckedLines(path, settings)) as lines:
        for record in records:
            lines.append(record)
    return path.read_bytes()


def read(path, settings=SETTINGS):
    with closing(CheckedLines(path, settings)) as lines:
        return lines.records


def test_every_flipped_bit_loses_its_line_at_most(path):
    whole = write(path)
    header = len(whole.splitlines()[0])
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        records = read(path)
        assert records == RECORDS if bit < 8 * (header + 1) else records in ([], *([record] for record in RECORDS))
        assert read(path) == records  # what is left of the file is whole


def test_every_cut_keeps_the_lines_before_it(path):
    whole = write(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        records = read(path)
        assert records == RECORDS[: sum(end <= length for end in ends[1:])]
        write(path, RECORDS[len(records) :])
        assert path.read_bytes() == whole


def test_another_file_is_refused_and_stays(path):
    write(path, settings={"seed": 1, "k": 2})
    with pytest.raises(CacheSettingsError, match=r"lines holds answers of another run \(seed, k differ\): move it"):
        read(path)
    for content in (b"hello", b"hello\n", b"\n", b"{}\n{}\n", bytes(99), bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(CacheSettingsError, match="is not a file of answers, or its beginning is damaged: move it"):
            read(path)
        assert path.read_bytes() == content


def test_one_process_at_a_time(path):
    with closing(CheckedLines(path, SETTINGS)), pytest.raises(CacheBusyError, match="another process is writing"):
        CheckedLines(path, SETTINGS)
    assert read(path) == []

"""The benchmark of whole steps: how repeats become a file and a file a table, and that the page shows the file's."""

import json
from itertools import chain
from pathlib import Path
from statistics import median

import pytest

from benchmarks import trl_step
from benchmarks.report import comparison

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "trl_step.json"


def repeat(seconds: float, pairs: int = 4) -> dict:
    batch = {"pairs": pairs, "tokens": 900, "valid_tokens": 600}
    return batch | {"seconds": [seconds, 2.0], "cpu_seconds": [3.0, 4.0], "peak_mib": [1e3, 2e3], "loss": [0.5, 0.4]}


def test_repeats_add_up_to_a_table():
    result = {"environment": json.loads(RESULTS.read_text())["environment"], "rows": []}
    for variant in ("TRL", "ours", "TRL", "ours"):
        trl_step.add(result, variant, repeat(8.0 if variant == "TRL" else 1.0))
    assert [len(row["seconds"]) for row in result["rows"]] == [2, 2]
    lines = trl_step.table(result).splitlines()
    assert "| TRL | 5.0 s (2.0 to 8.0) | 3.5 s (3.0 to 4.0) | 1,500 MiB (1,000 to 2,000) |" in lines
    assert "| ours | 1.5 s (1.0 to 2.0) | 3.5 s (3.0 to 4.0) | 1,500 MiB (1,000 to 2,000) |" in lines
    assert "ranges of 2 processes with 2 steps each" in lines[-1]
    with pytest.raises(ValueError, match="other pairs"):
        trl_step.add(result, "TRL", repeat(1.0, pairs=2))


def test_the_page_shows_the_committed_result():
    page = (ROOT / "docs" / "trainers.md").read_text()
    table = trl_step.table(json.loads(RESULTS.read_text()))
    assert comparison.replace_between_markers(page, table, trl_step.BEGIN, trl_step.END) == page


def test_ours_is_faster_and_needs_less_memory():
    """The bar, on the committed result, in which both computed the same losses."""
    rows = {row["variant"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    ours, theirs = rows["ours"], rows["TRL"]
    assert len(ours["loss"]) == len(theirs["loss"]) >= 3
    assert ours["loss"][0] == pytest.approx(theirs["loss"][0], rel=1e-4)
    for figure in ("seconds", "cpu_seconds", "peak_mib"):
        assert median(chain(*ours[figure])) < median(chain(*theirs[figure])), figure
    assert max(chain(*ours["peak_mib"])) < min(chain(*theirs["peak_mib"]))

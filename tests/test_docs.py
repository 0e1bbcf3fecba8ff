"""The documentation builds without a warning, and the code in it runs."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from mkdocs.commands.build import build
from mkdocs.config import load_config

from dadpo_kernels.ops.backends.registry import BACKENDS
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Its snippets need models and caches: tests/train/test_trl_*.py and tests/models/test_patch.py run what they show.
TRAINERS = "trainers.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_site_builds(tmp_path, caplog):
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for page in PAGES:
        assert (tmp_path / ("" if page.stem == "index" else page.stem) / "index.html").exists()
    report = tmp_path / "benchmarks" / "REPORT" / "index.html"
    images = re.findall(r'<img [^>]*src="([^"]+\.png)"', report.read_text())
    assert images
    assert all((report.parent / image).exists() for image in images)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_runs(page, tmp_path):
    for block in blocks(page):
        compile(block, page.name, "exec")
    if page.name != TRAINERS:
        with mock.patch.dict(BACKENDS):  # a page adds one
            exec("\n".join(blocks(page)), {"__name__": page.stem, **names(page.stem, tmp_path)})


def test_tables_are_those_of_the_results():
    report = pytest.importorskip("benchmarks.report")
    pytest.importorskip("triton")  # without which the kernels' tables cannot be made
    for path, text in report.pages(report.load(report.RESULTS)).items():
        assert path.read_text() == text, f"{path.name} is stale: run `python -m benchmarks.report`"


def names(page: str, directory: Path) -> dict:
    """What a page's code takes for granted."""
    if page == "teacher":
        tiny_llama().save_pretrained(directory / "teacher")
        tiny_tokenizer().save_pretrained(directory / "teacher")
        pairs = ROOT / "examples" / "quickstart" / "data" / "heldout.jsonl"
        return {"teacher_path": directory / "teacher", "pairs_path": pairs, "cache_path": directory / "cache"}
    if page != "live":
        return {}
    import dadpo_kernels

    body = tiny_llama()
    hidden = torch.randn(64, body.config.hidden_size, requires_grad=True)
    return {
        "linear_selected_logps": dadpo_kernels.linear_selected_logps,
        "live_diagnostics": dadpo_kernels.live_diagnostics,
        "hidden": hidden,
        "weight": body.lm_head.weight,
        "labels": torch.randint(body.config.vocab_size, (64,)),
        "topk_ids": torch.randint(body.config.vocab_size, (64, 4)),
        "loss_of": lambda out: -out.label.mean(),
    }

"""The choice of a kernel's configuration: timed once, kept on disk, never invented by a file."""

import json

import pytest
import torch

from dadpo_kernels.backends import triton_tuning
from dadpo_kernels.backends.triton_tuning import CONFIGS, SMALL, candidates, choose, tuned

CHOICES = CONFIGS["statistics"][8]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DADPO_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(triton_tuning, "_known", {})
    return tmp_path / "new" / "autotune.json"


def new_process(monkeypatch):
    monkeypatch.setattr(triton_tuning, "_known", {})


def fastest(favourite):
    return lambda config: 1.0 if config == favourite else 2.0


def refuse(config):
    raise AssertionError("timed again")


def test_fastest_is_kept_on_disk(cache, monkeypatch):
    assert tuned("a", CHOICES, fastest(CHOICES[1])) == CHOICES[1]
    assert tuned("a", CHOICES, refuse) == CHOICES[1]
    new_process(monkeypatch)
    assert tuned("b", CHOICES, fastest(CHOICES[2])) == CHOICES[2]
    new_process(monkeypatch)
    assert tuned("a", CHOICES, refuse) == CHOICES[1]
    assert tuned("b", CHOICES, refuse) == CHOICES[2]
    assert json.loads(cache.read_text()) == {"a": list(CHOICES[1]), "b": list(CHOICES[2])}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": [1, 2]}', '{"a": null}', '{"a": [9999, 1, 1, 1, 1, 1]}'])
def test_damaged_file(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert tuned("a", CHOICES, fastest(CHOICES[1])) == CHOICES[1]
    assert json.loads(cache.read_text())["a"] == list(CHOICES[1])


def test_unwritable_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DADPO_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert tuned("a", CHOICES, fastest(CHOICES[1])) == CHOICES[1]


def test_lists():
    for chips in CONFIGS.values():
        for choices in chips.values():
            assert all(256 % config.BLOCK_N == 0 for config in choices)
    assert candidates("retain", 12, torch.bfloat16, 64) == CONFIGS["retain"][10]
    assert candidates("retain", 9, torch.float32, 64) == [SMALL]
    assert candidates("retain", 9, torch.bfloat16, 100) == [SMALL]


def test_nothing_is_timed_without_a_gpu():
    assert choose("gradient", torch.zeros(4, 64, dtype=torch.bfloat16), False, refuse) == CONFIGS["gradient"][8][0]

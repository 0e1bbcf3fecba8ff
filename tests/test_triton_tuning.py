"""The choice of a kernel's configuration: timed once, kept on disk, never invented by a file."""

import json
from types import SimpleNamespace

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
        for major, choices in chips.items():
            assert all(256 % config.BLOCK_N == 0 for config in choices)
            assert not choices[0].TMA  # the fixed choice takes any operands
            assert not any(config.TMA for config in choices) or major >= 9
    assert candidates("retain", 12, torch.bfloat16, 64) == CONFIGS["retain"][10]
    assert candidates("retain", 9, torch.float32, 64) == [SMALL]
    assert candidates("retain", 9, torch.bfloat16, 100) == [SMALL]


def test_lists_are_cut_to_what_the_device_and_the_operands_allow():
    consumer = candidates("gradient", 8, torch.bfloat16, 64, shared=99 * 1024)
    assert consumer == [config for config in CONFIGS["gradient"][8] if config.shared(torch.bfloat16) <= 99 * 1024]
    assert 0 < len(consumer) < len(CONFIGS["gradient"][8])
    pointers = candidates("gradient", 9, torch.bfloat16, 64, tma=False)
    assert pointers
    assert not any(config.TMA for config in pointers)


def test_nothing_is_timed_without_a_gpu():
    hidden = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert choose("gradient", hidden, False, True, refuse) == CONFIGS["gradient"][8][0]


class FakeGPU:
    """A device on which a launch takes the time that `costs` says, and the first of a configuration much longer."""

    def __init__(self, monkeypatch, costs):
        self.clock, self.costs, self.launched = 0.0, costs, []
        properties = SimpleNamespace(name="fake", major=9, shared_memory_per_multiprocessor=228 * 1024)
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = gpu.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.time - self.time

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def launch(self, config):
        self.clock += self.costs[config] + (0 if config in self.launched else 1000)
        self.launched.append(config)

    def choose(self, rows=1000, width=64, softcap=False, tma=True):
        hidden = SimpleNamespace(is_cuda=True, shape=(rows, width), dtype=torch.bfloat16, device="cuda")
        return choose("gradient", hidden, softcap, tma, self.launch)


@pytest.fixture
def gpu(monkeypatch):
    choices = CONFIGS["gradient"][9]
    return FakeGPU(monkeypatch, {config: 10.0 - i for i, config in enumerate(choices)})


def test_fastest_on_the_device_is_chosen_once(gpu, cache, monkeypatch):
    choices = CONFIGS["gradient"][9]
    assert gpu.choose() == choices[-1]
    assert set(gpu.launched) == set(choices)
    timed = len(gpu.launched)
    assert gpu.choose(rows=1024) == choices[-1]  # the same class of shapes
    new_process(monkeypatch)
    assert gpu.choose() == choices[-1]
    assert len(gpu.launched) == timed
    (key,) = json.loads(cache.read_text())
    assert "fake, triton" in key
    assert "gradient torch.bfloat16 rows<=1024 width=64" in key


@pytest.mark.parametrize("other", [{"rows": 1025}, {"width": 128}, {"softcap": True}, {"tma": False}])
def test_other_classes_are_timed_again(gpu, cache, other):
    gpu.choose()
    timed = len(gpu.launched)
    chosen = gpu.choose(**other)
    assert len(gpu.launched) > timed
    assert len(json.loads(cache.read_text())) == 2
    assert not chosen.TMA or other.get("tma", True)


def test_fixed_choice(gpu, cache, monkeypatch):
    monkeypatch.setenv("DADPO_AUTOTUNE", "0")
    assert gpu.choose() == CONFIGS["gradient"][9][0]
    monkeypatch.delenv("DADPO_AUTOTUNE")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert gpu.choose() == CONFIGS["gradient"][9][0]
    assert not gpu.launched
    assert not cache.exists()

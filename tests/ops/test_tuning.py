"""The choice of a kernel's configuration: timed once, kept on disk, never invented by a file."""

import json
import logging
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from dadpo_kernels.ops.backends import tuning
from dadpo_kernels.ops.backends.tuning import CONFIGS, LAUNCHES, ROUNDS, SMALL, candidates, choose, fastest

CHOICES = CONFIGS["gradient"][9]
FIRST, SECOND, LAST = CHOICES[0], CHOICES[1], CHOICES[-1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DADPO_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(tuning, "_known", {})
    return tmp_path / "new" / "autotune.json"


def new_process(monkeypatch):
    monkeypatch.setattr(tuning, "_known", {})


def test_lists():
    for chips in CONFIGS.values():
        for major, choices in chips.items():
            assert all(256 % config.BLOCK_N == 0 for config in choices)
            assert any(not config.TMA for config in choices)  # one takes any operands
            assert not any(config.TMA for config in choices) or major >= 9
            assert not any(config.PERSISTENT for config in choices) or major == 9
            assert len(set(choices)) == len(choices)
    assert candidates("retain", 12, torch.bfloat16, 64) == CONFIGS["retain"][10]
    assert candidates("retain", 9, torch.float32, 64) == [SMALL]
    assert candidates("retain", 8, torch.bfloat16, 100) == [SMALL]
    assert candidates("retain", 9, torch.bfloat16, 100, tma=False) == [SMALL]
    ragged = candidates("retain", 9, torch.bfloat16, 104)  # a descriptor fills the last block with zeros
    assert ragged == [*(config for config in CONFIGS["retain"][9] if config.TMA), SMALL]


def test_lists_are_cut_to_what_the_device_and_the_operands_allow():
    consumer = candidates("gradient", 8, torch.bfloat16, 64, shared=99 * 1024)
    assert consumer == [
        config for config in CONFIGS["gradient"][8] if config.shared("gradient", torch.bfloat16) <= 99 * 1024
    ]
    assert 0 < len(consumer) < len(CONFIGS["gradient"][8])
    pointers = candidates("gradient", 9, torch.bfloat16, 64, tma=False)
    assert pointers
    assert not any(config.TMA for config in pointers)


def test_nothing_is_timed_without_a_gpu():
    hidden = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert choose("gradient", hidden, False, True, lambda config: pytest.fail("timed")) == CONFIGS["gradient"][8][0]


class FakeGPU:
    """A device where the launches of a configuration take the milliseconds that `costs` says, replay by replay.

    Preparing one, and its first launch, which compiles, take a second; a launch while a graph is captured takes no
    time. `broken` configurations do not compile.
    """

    def __init__(self, monkeypatch, costs):
        self.clock, self.graph, self.capturing, self.broken = 0.0, None, False, set()
        self.prepared, self.launched, self.replayed, self.held = [], Counter(), [], {}
        self.costs = {config: cycle([cost] if isinstance(cost, float) else cost) for config, cost in costs.items()}
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

        class Graph:
            def __init__(self):
                self.configs = []

            def replay(self):
                (config,) = set(self.configs)
                assert gpu.held[config]() is not None, "reads memory that the launch no longer holds"
                gpu.replayed.append(config)
                gpu.clock += len(self.configs) * next(gpu.costs[config])

        @contextmanager
        def capture(graph, stream, capture_error_mode):
            assert stream == "a stream of this device"
            assert capture_error_mode == "thread_local"
            gpu.graph = graph
            try:
                yield
            finally:
                gpu.graph = None

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream of this device")
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the user's stream")
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)

    def prepare(self, config):
        assert self.graph is None, "allocates while a graph is captured"
        self.prepared.append(config)
        self.clock += 1000
        tensor = torch.zeros(1)  # such as the entry ranges, which the launch alone holds
        self.held[config] = weakref.ref(tensor)

        def launch(held=tensor):
            if config in self.broken:
                raise RuntimeError("ptxas failed")
            self.launched[config] += 1
            if self.graph is None:
                self.clock += 1000
            else:
                assert self.launched[config] > 1, "compiles while a graph is captured"
                self.graph.configs.append(config)

        return launch

    def choose(self, rows=1000, width=64, softcap=False, tma=True):
        hidden = SimpleNamespace(is_cuda=True, shape=(rows, width), dtype=torch.bfloat16, device="cuda")
        return choose("gradient", hidden, softcap, tma, self.prepare)


def costs():
    """The later in the list, the faster."""
    return {config: 20.0 - i for i, config in enumerate(CHOICES)}


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch, costs())


def test_the_fastest_on_the_device_is_chosen_once(gpu, cache, monkeypatch):
    assert gpu.choose() == LAST
    assert gpu.prepared == CHOICES
    assert gpu.choose(rows=1024) == LAST  # the same class of shapes
    new_process(monkeypatch)
    assert gpu.choose() == LAST
    assert gpu.prepared == CHOICES
    ((key, entry),) = json.loads(cache.read_text()).items()
    assert "fake, triton" in key
    assert "gradient torch.bfloat16 rows<=1024 width=64" in key
    assert entry["config"] == list(LAST)


def test_bare_launches_are_timed_in_rounds(gpu, cache):
    """What is written is the time of a launch, without what prepares it; drift of the device meets all alike."""
    gpu.choose()
    assert set(gpu.launched.values()) == {1 + LAUNCHES}
    assert gpu.replayed == CHOICES * (1 + ROUNDS)  # the first takes the graphs to the device
    (entry,) = json.loads(cache.read_text()).values()
    for config, cost in costs().items():
        assert entry["seconds"][str(config)] == {"median": pytest.approx(cost / 1e3), "spread": pytest.approx(0)}


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        ([9, 9, 9, 9, 9], [8, 8, 8, 8, 8], SECOND),
        ([8, 8, 8, 8, 8], [9, 9, 9, 9, 9], FIRST),
        ([9, 9, 9, 9, 9], [7, 7, 8, 9, 9], FIRST),  # gains 1, spread over 2
        ([9, 9, 9, 9, 9], [5, 5, 6, 7, 7], SECOND),  # gains 3
        ([8, 8, 9, 10, 10], [8, 8, 8, 8, 8], FIRST),  # the first's own spread counts as much
        ([9, 9, 9, 9, 30], [8, 8, 8, 8, 30], SECOND),  # one replay of each was disturbed
        ([9, 9, 9, 9, 9], [9, 9, 9, 9, 9], FIRST),
    ],
)
def test_the_first_is_kept_unless_the_gain_exceeds_the_spread(first, second, chosen):
    assert fastest({FIRST: first, SECOND: second}) == chosen


@pytest.mark.parametrize(("noise", "chosen"), [(3.0, FIRST), (0.5, SECOND)])
def test_noise_does_not_choose(monkeypatch, cache, noise, chosen):
    replays = [12.0, 10 - noise, 10 - noise, 10.0, 10 + noise, 10 + noise]  # the first is not counted
    gpu = FakeGPU(monkeypatch, dict.fromkeys(CHOICES, 12.0) | {SECOND: replays})
    assert gpu.choose() == chosen
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["config"] == list(chosen)


def test_what_does_not_compile_is_left_out(gpu, caplog):
    gpu.broken = {LAST}
    with caplog.at_level(logging.DEBUG, logger="dadpo_kernels"):
        assert gpu.choose() == CHOICES[-2]
    (record,) = [record for record in caplog.records if "left out" in record.getMessage()]
    assert record.levelno == logging.DEBUG
    assert str(LAST) in record.message
    assert "ptxas failed" in record.message


def test_the_first_must_compile(gpu, cache):
    gpu.broken = {FIRST}
    with pytest.raises(RuntimeError, match="ptxas failed"):
        gpu.choose()
    assert not cache.exists()


def test_nothing_is_timed_while_the_user_captures(gpu, cache):
    gpu.capturing = True
    assert gpu.choose() == FIRST
    assert not gpu.prepared
    assert not cache.exists()
    gpu.capturing = False
    assert gpu.choose() == LAST
    gpu.capturing = True
    assert gpu.choose() == LAST  # known


@pytest.mark.parametrize("other", [{"rows": 1025}, {"width": 128}, {"softcap": True}])
def test_other_classes_are_timed_again(gpu, cache, other):
    gpu.choose()
    timed = len(gpu.prepared)
    gpu.choose(**other)
    assert len(gpu.prepared) > timed
    assert len(json.loads(cache.read_text())) == 2


def test_operands_that_no_descriptor_describes(gpu, cache):
    assert not gpu.choose(tma=False).TMA


def test_a_call_reads_no_metadata_of_packages(gpu, cache, monkeypatch):
    """Which takes longer than a tile's product: on an H100 it once doubled the time of a step."""
    gpu.choose()
    monkeypatch.setattr(tuning.importlib.metadata, "version", None)
    assert gpu.choose(rows=2000) == LAST


def test_fixed_choice(gpu, cache, monkeypatch):
    monkeypatch.setenv("DADPO_AUTOTUNE", "0")
    assert gpu.choose() == FIRST
    monkeypatch.delenv("DADPO_AUTOTUNE")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert gpu.choose() == FIRST
    assert not gpu.prepared
    assert not cache.exists()


def test_a_list_of_one_is_not_timed(gpu, cache):
    assert gpu.choose(width=100, tma=False) == SMALL
    assert not gpu.prepared
    assert not cache.exists()


@pytest.mark.parametrize(
    "entry",
    [[1, 2], None, list(SECOND), {}, {"config": None}, {"config": [9999, 1, 1, 1, 1, 1, False]}, {"seconds": {}}],
)
def test_a_file_cannot_invent(gpu, cache, monkeypatch, entry):
    gpu.choose()
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({"another": 1, key: entry}))
    new_process(monkeypatch)
    assert gpu.choose() == LAST
    stored = json.loads(cache.read_text())
    assert stored.pop("another") == 1
    assert stored[key]["config"] == list(LAST)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_file(gpu, cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert gpu.choose() == LAST
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["config"] == list(LAST)


def test_a_file_chooses_among_the_listed(gpu, cache, monkeypatch):
    gpu.choose()
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {"config": list(SECOND)}}))
    new_process(monkeypatch)
    assert gpu.choose() == SECOND


def test_unwritable_place(gpu, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DADPO_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert gpu.choose() == LAST

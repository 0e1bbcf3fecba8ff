"""Fixtures shared by the tests: the real small model, exported once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# How fast a machine makes and runs examples says nothing about the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def smollm2():
    """`(hidden [96, 576], weight [49152, 576], labels [96])` of SmolLM2-135M-Instruct on real text, float32."""
    from examples.smollm2 import smollm2_hidden

    torch.manual_seed(0)
    return smollm2_hidden(96)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models run many times faster without handing each operation to several threads, and bitwise the same in
    processes with other thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

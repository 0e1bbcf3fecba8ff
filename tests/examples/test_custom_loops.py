"""The loops of examples/custom_loops run and learn."""

from pathlib import Path

import pytest

from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from examples.custom_loops import fabric, pytorch
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    tokenizer, root = tiny_tokenizer(), tmp_path_factory.mktemp("loops")
    capture_teacher(tiny_llama(seed=3), tokenizer, tokenize_pairs(chat_records(8), tokenizer, 64), root / "cache", k=6)
    capture_reference(tiny_llama(), tokenizer, root / "cache")
    tiny_llama().save_pretrained(root / "student")
    return str(root / "student"), str(root / "cache")


def test_pure_pytorch(directories):
    losses = pytorch.train(directories[1])
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]


def test_lightning_fabric(directories):
    losses = fabric.train(*directories, epochs=3, lr=3e-3, accelerator="cpu", devices=1)
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("module", [pytorch, fabric])
def test_they_are_short(module):
    assert len(Path(module.__file__).read_text().splitlines()) < 60

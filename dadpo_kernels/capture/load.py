"""Models and tokenizers from the hub, a local directory or a GGUF file, as the commands take them."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load_tokenizer(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model, from the hub, a directory or a GGUF file in it."""
    return AutoTokenizer.from_pretrained(name, **_source(revision, gguf_file))


def vocabulary_size(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> int:
    """Rows of a model's head, from its configuration."""
    return AutoConfig.from_pretrained(name, **_source(revision, gguf_file)).get_text_config().vocab_size


def load_model(
    name: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Any:
    """A causal LM in evaluation mode.

    Args:
        name: a model of the hub, or a directory.
        revision: branch, tag or commit on the hub.
        gguf_file: a GGUF file there; it is expanded to ordinary weights (needs the package `gguf`).
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own on an accelerator, and float32
            on a CPU.
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto`: spread over the accelerators there are (of several processes
            on a node, each takes its own), else the CPU.
    """
    if device == "auto":
        device = _local_device()
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, **_source(revision, gguf_file))
    return model.eval()


def _local_device() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
        return "auto"
    accelerator = torch.accelerator.current_accelerator()
    return f"{accelerator}:{os.environ['LOCAL_RANK']}"


def _source(revision: str | None, gguf_file: str | None) -> dict[str, str]:
    given = {"revision": revision, "gguf_file": gguf_file}
    return {name: value for name, value in given.items() if value is not None}

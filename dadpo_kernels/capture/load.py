"""Loads models and tokenizers from the hub, a local directory or a GGUF file, for the commands."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

logger = logging.getLogger("dadpo_kernels")


def load_tokenizer(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model. The arguments are those of `load_model`, and so is what it raises."""
    with loading(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name, **_source(revision, gguf_file))


def vocabulary_size(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> int:
    """The vocabulary size in a model's configuration. The arguments are those of `load_model`."""
    return _configuration(name, revision, gguf_file).vocab_size


def positions(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> float:
    """The number of positions that a model was made for; inf if its configuration gives none. The arguments are those
    of `load_model`."""
    return getattr(_configuration(name, revision, gguf_file), "max_position_embeddings", None) or math.inf


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Errors of any class that damaged files cause (of safetensors and tokenizers, for example) as ValueError."""
    try:
        yield
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded ({type(error).__name__}: {error}): copy its files again") from error


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
        name: name of a model on the hub, or a directory.
        revision: branch, tag or commit on the hub.
        gguf_file: name of a GGUF file in that repository or directory. It is expanded to ordinary weights, which
            needs the package `gguf`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: that of the checkpoint on an accelerator, and float32 on a
            CPU.
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto`: all accelerators, over which the layers are spread; the
            accelerator of the local rank if several processes run on this node; the CPU if there is no accelerator.

    Raises:
        OSError, ValueError: there is no such model or device, or its files are damaged.
    """
    if device == "auto":
        device = _local_device()
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    logger.debug("%s is loaded with device_map=%s, dtype=%s", name, device, dtype)
    with loading(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device, **_source(revision, gguf_file)
        )
    return model.eval()


def _configuration(name: str, revision: str | None, gguf_file: str | None) -> Any:
    with loading(f"the configuration of {name}"):
        return AutoConfig.from_pretrained(name, **_source(revision, gguf_file)).get_text_config()


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

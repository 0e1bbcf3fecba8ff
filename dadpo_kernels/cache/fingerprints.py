"""Hashes that stand for models and data sets: two with the same fingerprint are treated as the same."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..models.lm_head import unwrap

_SAMPLES = 64
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache")


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the non-default values of the configuration and, for each parameter, its name, shape, dtype and 64
    evenly spaced elements.

    It is cheap for models of any size, and the same whether a model comes from safetensors, GGUF or memory. A
    fine-tuned model has another fingerprint, and so has the same model in another dtype. A model in which only a few
    elements were edited may have the same one.
    """
    causal = unwrap(model)
    config = {name: value for name, value in causal.config.to_diff_dict().items() if name not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(causal.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            at = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64).long()
            digest.update(flat[at.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def records_fingerprint(records: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over the records of a preference set; the order of a record's keys does not matter."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()

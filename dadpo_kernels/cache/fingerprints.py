"""Short names for big things: two models or data sets with the same fingerprint are taken as the same."""

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
    """SHA-256 over the configuration's non-default values and, of each parameter, its name, shape, dtype and 64
    elements spread evenly over it.

    Cheap for any size, and the same from safetensors, GGUF or memory. A fine-tuned model differs, as does the same
    model loaded in another dtype; a model edited in few single elements may not.
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
    """SHA-256 over the records of a preference set, whatever the order of their keys."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()

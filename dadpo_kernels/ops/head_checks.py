"""What the primitives check before a kernel sees an address. Messages name the argument, the value, the remedy."""

import math

import torch
from torch import Tensor

from .checks import require

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, temperature: float
) -> None:
    """Shapes, dtypes and devices of hidden `[..., H]`, weight `[V, H]`, bias `[V]`; finite, sensible transform."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor; pass {name}.full_tensor(), or, where ranks with the same batch share the "
                "vocabulary, call vocab_parallel_selected_logps (vocab_group of the losses)"
            )
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")
    if hidden.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"expected hidden [..., H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} differ in their last dimension H; "
            "weight is [V, H], as in nn.Linear"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight {tuple(weight.shape)} is empty; gather a sharded weight (ZeRO-3, FSDP) first")
    if weight.shape[0] > 2**31 - 2**16:
        raise ValueError(f"weight has {weight.shape[0]} rows; ids are 32-bit inside the kernels")
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}; cast one of them, or run under torch.autocast"
        )
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device} and weight on {weight.device}; move them together")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(
            f"bias {tuple(bias.shape)} on {bias.device} does not fit weight {tuple(weight.shape)} on {weight.device}; "
            "expected [V] there"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias is {bias.dtype} and weight is {weight.dtype}; cast it to the weight's dtype")
    if not (math.isfinite(logit_scale) and logit_scale != 0):
        raise ValueError(f"logit_scale={logit_scale} must be finite and not 0")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap} must be positive and finite; pass None for no softcap")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be positive and finite")


def check_memory(weight: Tensor) -> None:
    """Raise RuntimeError if an engine took the memory of `weight` back: a kernel would read it all the same."""
    if weight.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            f"the memory of weight {list(weight.shape)} was freed by the engine that sharded it (FSDP): run the loss "
            "inside the forward of the module that holds it, so that it is gathered again for the backward"
        )


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...], device: torch.device, extra: int = 0) -> None:
    """Integer ids on the right device whose leading dimensions are `shape`, followed by `extra` more."""
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {ids.dtype}; expected int64 or int32")
    if ids.shape[: ids.dim() - extra] != shape or ids.dim() != len(shape) + extra:
        wanted = f"{tuple(shape)}" + (" followed by K" if extra else "")
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected {wanted}, the leading dimensions of hidden")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device} and hidden on {device}; move it there")


def check_range(name: str, ids: Tensor, vocab: int) -> None:
    """Every id lies in `[0, vocab)`."""
    remedy = (
        f"outside the head's vocabulary [0, {vocab}); mask positions with ignore_index; for teacher ids, resize the "
        "student's embeddings to the teacher's vocabulary, or use a teacher of the student's family"
    )
    require((ids >= 0) & (ids < vocab), ids, name, remedy)


def check_tolerance(grad_tolerance: float | None) -> None:
    """A relative error, or None."""
    if grad_tolerance is not None and not 0 < grad_tolerance < 1:
        raise ValueError(
            f"grad_tolerance={grad_tolerance} must lie in (0, 1): it bounds a relative error, and 1e-3 is about that "
            "of bfloat16; pass None for exact gradients"
        )

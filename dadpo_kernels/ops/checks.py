"""Checks of values and ids, made before a kernel sees an address. Messages name argument, value and remedy."""

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)
ON_DEVICE = 254  # characters of a message that PyTorch's assertion on a GPU takes


def require(ok: Tensor, values: Tensor, name: str, remedy: str, index: Tensor | None = None) -> None:
    """Raise ValueError at the first position of `values` that is not `ok`; both have the same shape.

    Where `values` are those of the tokens at `index` of the flattened batch, the message says which token of it.

    On a GPU, and in a compiled graph, the condition is asserted on the device instead: the program stops with the
    same remedy, a little later, and no kernel launch waits for the answer. Meta tensors have no values to check.
    """
    if ok.is_cuda or ok.is_meta or torch.compiler.is_compiling():
        torch._assert_async(ok.all(), f"{name}: {remedy}"[:ON_DEVICE])
    elif not ok.all():
        first = (~ok).nonzero()[0].tolist()
        value = values[tuple(first)].item()
        if index is not None:
            first[0] = index[first[0]].item()
            remedy += " (the first index counts the tokens of the flattened batch)"
        raise ValueError(f"{name}{first} is {value}: {remedy}")


def is_logp(values: Tensor) -> Tensor:
    """Not NaN and not positive, except for the rounding of a log-probability near 0."""
    return values <= 1e-3


def check_storage(weight: Tensor) -> None:
    """Raise RuntimeError if a parallel wrapper has freed the memory of `weight`: a kernel would still read it."""
    if weight.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            f"the memory of weight {list(weight.shape)} was freed by the wrapper that sharded it (FSDP): run the loss "
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


def check_range(name: str, ids: Tensor, vocab: int, index: Tensor | None = None) -> None:
    """Every id of the tokens at `index` (of all tokens, flattened) lies in `[0, vocab)`; None: those of all tokens."""
    remedy = (
        f"outside the head's vocabulary [0, {vocab}); mask positions with ignore_index; for a teacher's ids, resize "
        "the student's embeddings to the teacher's vocabulary, or use a teacher of the student's family"
    )
    require((ids >= 0) & (ids < vocab), ids, name, remedy, index)

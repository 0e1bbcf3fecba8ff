"""What a model gets from its head instead of `[B, S, V]` logits: their shape, and a record of what is done to them."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import arg_tree_leaves

from ..ops.head import Head

_PROBE = torch.tensor([-6e4, -1234.5, -40.0, -5.0, -1.0, -0.1, 0.1, 1.0, 5.0, 40.0, 1234.5, 6e4], dtype=torch.float64)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.slice.Tensor)


class LogitsStandIn(Tensor):
    """Has shape, dtype and device of logits, and no values.

    What a model does to every logit alike (scales, softcaps, casts) is done to a few probe values, so that `check` can
    tell whether a `Head` describes it; and the end of the vocabulary may be cut off. All else that reads the logits
    raises ValueError.
    """

    probe: Tensor
    model: str  # name of its class, for messages
    shared: bool = False  # with a view: an operation in place would have to reach both

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, model: str, probe: Tensor = _PROBE
    ) -> "LogitsStandIn":
        new = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        new.probe, new.model = probe, model
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        logits = next(x for x in arg_tree_leaves(*args, **kwargs) if isinstance(x, cls))
        shape, probe = tuple(logits.shape), logits.probe
        if torch.Tag.pointwise in func.tags and _with_numbers(args):
            probe = func(*(probe.clone() if x is logits else _number(x) for x in args), **kwargs).double()
            if func._schema.is_mutable:
                if logits.shared:
                    logits._refuse(func)
                logits.probe = probe
                return logits
        elif func is torch.ops.aten.slice.Tensor:
            out = func(torch.empty(shape, device="meta"), *args[1:])
            if out.shape[:-1] != shape[:-1] or out.storage_offset() or out.stride(-1) != 1:
                logits._refuse(func)
            shape = tuple(out.shape)
        elif func not in _COPIES + _VIEWS:
            logits._refuse(func)
        dtype, device = kwargs.get("dtype") or logits.dtype, kwargs.get("device") or logits.device
        new = cls(shape, dtype, device, logits.model, probe)
        if func in _VIEWS:
            logits.shared = new.shared = True
        return new

    def _refuse(self, func: Any) -> NoReturn:
        raise ValueError(
            f"{self.model} reads its logits ({func}), and a fused loss computes none: compute the loss from "
            "hidden_states(model) and lm_head(model) with the functions of dadpo_kernels"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LogitsStandIn({list(self.shape)}, {self.dtype})"


def check_logits(logits: Any, head: Head, model: str) -> None:
    """Raise ValueError unless what the model did to the stand-in for its logits is what `head` says."""
    if not isinstance(logits, LogitsStandIn):
        raise ValueError(
            f"{model} returns a {type(logits).__name__} as logits that is not what its head gave it: not supported"
        )
    if logits.requires_grad:
        raise ValueError(f"{model} multiplies its logits by a parameter that is trained: not supported")
    if logits.shape[-1] != len(head.weight):
        raise ValueError(
            f"{model} uses {logits.shape[-1]} logits per token, and its head, as understood, has {len(head.weight)}"
        )
    want = head.transform(_PROBE, None)
    if not torch.allclose(logits.probe, want, rtol=1e-5, atol=0):
        pairs = ", ".join(f"{x:g} -> {y:.4g}" for x, y in zip(_PROBE.tolist(), logits.probe.tolist(), strict=True))
        raise ValueError(
            f"the logits of {model} are not those of its head: the model makes {pairs} of them, and its configuration "
            f"says scale {head.logit_scale:g}, softcap {head.softcap}. Compute the loss from hidden_states(model) and "
            "dataclasses.replace(lm_head(model), logit_scale=..., softcap=...) with the functions of dadpo_kernels"
        )


def _with_numbers(args: tuple) -> bool:
    """Whether the stand-in is the only operand that is no number."""
    return sum(not isinstance(x, Tensor) or (x.numel() == 1 and x.dim() < 2) for x in args) == len(args) - 1


def _number(x: Any) -> Any:
    return x.item() if isinstance(x, Tensor) else x

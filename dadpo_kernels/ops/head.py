"""The LM head as one value: its weight, its bias and what happens to its logits, checked in one place."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from .autocast import autocast_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadOptions(TypedDict, total=False):
    """The keywords that every public function takes in addition to `weight`; see `Head`."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float


@dataclass(frozen=True, eq=False)
class Head:
    """An LM head: `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`.

    Every public function takes a `Head` in place of `weight`, so that no option can be forgotten on the way:
    `linear_dadpo_loss(hidden, lm_head(model), labels, ...)`. `dataclasses.replace(head, temperature=2.0)` changes one.

    Attributes:
        weight: `[V, H]`, float32, bfloat16, float16 or float64.
        bias: `[V]` of the weight's dtype, or None.
        logit_scale: factor of the logits, finite and not 0.
        softcap: bound of the logits, positive; None for no softcap.
        temperature: divisor of the logits, positive.

    The three are applied in this order, as the models of transformers do.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, weight: "Tensor | Head", options: HeadOptions) -> "Head":
        """The head that a call with `weight` and keyword arguments describes.

        Raises:
            TypeError: a keyword that is not one of a head's options.
            ValueError: `weight` is a `Head` and options are given in addition to its own.
        """
        known = HeadOptions.__annotations__
        for name in options:
            if name not in known:
                raise TypeError(f"unexpected keyword argument {name!r}; the head's options are {', '.join(known)}")
        if not isinstance(weight, Head):
            return cls(weight, **options)
        if options:
            raise ValueError(
                f"{', '.join(options)} given in addition to a Head, which has its own: pass "
                f"dataclasses.replace(head, {next(iter(options))}=...), or the head's weight and all its options"
            )
        return weight

    @property
    def scalars(self) -> tuple[float, float, float]:
        """`(logit_scale, softcap or 0, 1 / temperature)`, as kernels take them."""
        return self.logit_scale, self.softcap or 0.0, 1 / self.temperature

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight and, where there is one, bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Head":
        """The same head with `function(tensor)` in place of weight and bias."""
        return replace(self, weight=function(self.weight), bias=None if self.bias is None else function(self.bias))

    def prepare(self, hidden: Tensor) -> tuple[Tensor, "Head"]:
        """`(hidden, head)`, cast as `torch.autocast` casts a linear layer, and checked.

        Raises:
            TypeError: a DTensor, a dtype that is not supported, or dtypes that differ.
            ValueError: shapes or devices that do not fit, or an option out of range.
        """
        for name, tensor in zip(("hidden", "weight", "bias"), (hidden, *self.tensors), strict=False):
            _check_kind(name, tensor)
        head, dtype = self, autocast_dtype(hidden.device)
        if dtype is not None:

            def cast(tensor: Tensor) -> Tensor:
                return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)  # as autocast does

            hidden, head = cast(hidden), head.map(cast)
        head._check(hidden)
        return hidden, head

    def _check(self, hidden: Tensor) -> None:
        weight, bias = self.weight, self.bias
        # Shapes.
        if 0 in weight.shape:
            raise ValueError(f"weight {tuple(weight.shape)} is empty; gather a sharded weight (ZeRO-3, FSDP) first")
        if hidden.dim() < 1 or weight.dim() != 2:
            raise ValueError(
                f"expected hidden [..., H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
            )
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} differ in their last dimension H; "
                "weight is [V, H], as in nn.Linear"
            )
        if weight.shape[0] > 2**31 - 2**16:
            raise ValueError(f"weight has {weight.shape[0]} rows; ids are 32-bit inside the kernels")
        # Dtypes and devices.
        if hidden.dtype != weight.dtype:
            raise TypeError(
                f"hidden is {hidden.dtype} and weight is {weight.dtype}; cast one of them, or run under torch.autocast"
            )
        if hidden.device != weight.device:
            raise ValueError(f"hidden is on {hidden.device} and weight on {weight.device}; move them together")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
            raise ValueError(
                f"bias {tuple(bias.shape)} on {bias.device} does not fit weight {tuple(weight.shape)} on "
                f"{weight.device}; expected [V] there"
            )
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(f"bias is {bias.dtype} and weight is {weight.dtype}; cast it to the weight's dtype")
        # What happens to the logits.
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(f"logit_scale={self.logit_scale} must be finite and not 0")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap={self.softcap} must be positive and finite; pass None for no softcap")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature} must be positive and finite")

    def transform(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of some columns from their products `hidden @ weight.T`, and their bias broadcast to these."""
        logits = products if bias is None else products + bias
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1 else logits / self.temperature

    def slope(self, logits: Tensor) -> Tensor | None:
        """The softcap's derivative `1 - tanh²`, from logits as `transform` gives them; None for no softcap."""
        return None if self.softcap is None else 1 - (logits * (self.temperature / self.softcap)).square()


def _check_kind(name: str, tensor: Tensor) -> None:
    """Raise TypeError, before autocast casts anything: fp8 would become bfloat16 without its scale."""
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor; pass {name}.full_tensor(), or, where ranks with the same batch share the "
            "vocabulary, call vocab_parallel_selected_logps (vocab_group of the losses)"
        )
    if tensor.dtype not in FLOATS:
        quantised = "; quantised values (fp8, int8) need their scale: dequantise them first"
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}"
            + (quantised if tensor.dtype.itemsize == 1 else "")
        )

"""A model's own forward with something of ours in place of its head: the one way in which hidden states are had.

What the model does before its head (a norm, a scale, a dense layer) is then done, whatever its family. What it does
behind the head is done to a stand-in for the logits and compared with the `Head` that the loss used.

Parallel wrappers that shard the head (FSDP2, ZeRO-3) gather it when it runs, and again for the backward of what it
returns. So their hooks see the head return what was computed in its place, and the stand-in replaces this afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..ops.head import Head
from .lm_head import head_module, lm_head, plain_head, unwrap, wrappers
from .logits_stand_in import LogitsStandIn, check_logits
from .override import source

OfHead = Callable[[Tensor, Head], tuple[Tensor, ...]]  # from hidden states [B, S, H] and the head


class HeadCall:
    """The one call of the head in a forward.

    Attributes:
        values: what was computed in place of the logits, as it came out of the hooks on the head.
    """

    def __init__(self, causal: Any, module: nn.Module, of_head: OfHead) -> None:
        self._causal, self._module, self._of_head = causal, module, of_head
        self._head: Head | None = None
        self._columns = 0
        self.values: tuple[Tensor, ...] = ()

    @torch.compiler.disable
    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """In place of the head's forward: its weight is whole here."""
        if self._head is not None:
            raise ValueError(f"{self._name} applies its head more than once in a forward: not supported")
        head = lm_head(self._causal)
        self._columns = plain_head(self._module).weight.shape[0]
        self._head = head.map(lambda tensor: tensor.detach().to("meta"))  # ZeRO-3 frees its memory
        # With a device map, the layers may end on another device than the head's.
        self.values = self._of_head(hidden.to(head.weight.device), head)
        return self.values

    @torch.compiler.disable
    def behind_hooks(self, head: nn.Module, inputs: tuple[Tensor], hooked: tuple[Tensor, ...]) -> Tensor:
        """The last forward hook on the head."""
        self.values = tuple(map(unrounded, hooked, self.values))
        hidden = inputs[0]
        return LogitsStandIn((*hidden.shape[:-1], self._columns), hidden.dtype, hidden.device, self._name)

    @torch.compiler.disable
    def check(self, logits: Any) -> None:
        """Raise ValueError unless these logits of the forward are what `lm_head` says."""
        if self._head is None:
            raise ValueError(
                f"the forward of {self._name}, of {source(self._causal)}, does not call its LM head: a fused loss "
                "cannot take the head's place"
            )
        check_logits(logits, self._head, self._name)

    @property
    def _name(self) -> str:
        return type(self._causal).__name__


@contextmanager
def replaced_head(causal: Any, of_head: OfHead) -> Iterator[HeadCall]:
    """For forwards of `causal` inside: `of_head(hidden, lm_head(causal))` is computed instead of logits."""
    head = head_module(causal)
    if isinstance(getattr(vars(head).get("forward"), "__self__", None), HeadCall):
        raise RuntimeError(f"two threads run the same {type(causal).__name__}: give each a copy")
    call = HeadCall(causal, head, of_head)
    with ExitStack() as stack:
        stack.enter_context(attribute(head, "forward", call.forward))
        stack.callback(head.register_forward_hook(call.behind_hooks).remove)  # the last one, so it runs last
        yield call


@torch.compiler.disable(recursive=False)  # compiled is the model's body
def of_head_in_forward(
    wrapped: nn.Module, model: nn.Module, inputs: dict[str, Any], of_head: OfHead
) -> tuple[tuple[Tensor, ...], Any]:
    """`(of_head(hidden, head), the model's output)`, computed inside the forwards of `wrapped`, `model` and its head.

    Args:
        wrapped: what a parallel wrapper made of the model: a DistributedDataParallel, a DeepSpeedEngine, or the model
            itself (FSDP2 works in place; also without any wrapper).
        model: the model inside, a transformers causal LM or a PEFT model of one.
        inputs: keyword arguments of the causal LM's forward, without labels.
    """
    causal = unwrap(model)
    outputs: list[Any] = []

    def forward() -> tuple[Tensor, ...]:
        # The model's hooks run around this function already; those of a model inside PEFT's do not.
        module = causal.forward if causal is model else causal
        with replaced_head(causal, _at_every_position(inputs["input_ids"], of_head)) as call:
            outputs.append(module(**{"use_cache": False, **inputs, "return_dict": True}))
        call.check(outputs[0].logits)
        outputs.append(call.values)
        return call.values

    hooked = _call_with(wrapped, model, forward)
    output, values = outputs
    return tuple(map(unrounded, hooked, values)), output


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    """The last hidden states `[B, T, H]` of a causal LM, in its dtype: what its head would be applied to.

    Differentiable. The model's own forward runs, without its head, so that they are right for families that scale or
    transform hidden states in front of the head. A DistributedDataParallel's forward runs too where gradients are
    wanted, so that they are reduced: all ranks call this then.

    Args:
        model: as `lm_head` takes it.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding. Pad on the right: models number positions from 0.
        kwargs: further arguments of the model's forward.

    Raises:
        TypeError, ValueError: a head that `lm_head` refuses, or logits that are not what it says; a head that is not
            applied to every position; DistributedDataParallel with find_unused_parameters.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **kwargs}
    causal = unwrap(model)
    ddp = next((w for w in wrappers(model) if isinstance(w, DistributedDataParallel)), None)
    if ddp is not None and torch.is_grad_enabled():
        if ddp.find_unused_parameters:
            raise ValueError(
                "hidden_states(ddp_model) with find_unused_parameters=True: the wrapper would count the head as "
                "unused, since the loss comes later; set it to False, or compute the loss with loss_in_forward"
            )
        return of_head_in_forward(ddp, ddp.module, inputs, _hidden)[0][0]
    if isinstance(causal, FSDPModule):  # its hooks must see the hidden states leave it
        return of_head_in_forward(causal, causal, inputs, _hidden)[0][0]
    with replaced_head(causal, _at_every_position(input_ids, _hidden)) as call:
        call.check(causal(**inputs, return_dict=True).logits)
    return call.values[0]


def _hidden(hidden: Tensor, head: Head) -> tuple[Tensor]:
    return (hidden,)


def _at_every_position(input_ids: Tensor, of_head: OfHead) -> OfHead:
    def checked(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        if hidden.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"input_ids have shape {list(input_ids.shape)} and the model applies its head to "
                f"{list(hidden.shape)} when it is given no labels: every position is needed"
            )
        return of_head(hidden, head)

    return checked


def unrounded(hooked: Tensor, exact: Tensor) -> Tensor:
    """The value of `exact` behind the hooks that `hooked` has passed; mixed precision rounds what forwards return."""
    return exact if hooked is exact else _Unrounded.apply(hooked, exact)


class _Unrounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hooked: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _call_with(wrapped: nn.Module, module: nn.Module, forward: Callable[[], Any]) -> Any:
    """`wrapped()`, in which `forward` stands in for the next forward of `module`."""
    with ExitStack() as replaced:

        def once(*_: Any, **__: Any) -> Any:
            replaced.close()  # `forward` calls the one that was there before
            return forward()

        replaced.enter_context(attribute(module, "forward", once))
        return wrapped()


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance for a while; then what was there before, or nothing."""
    before = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before

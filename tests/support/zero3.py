"""What a loss can see of DeepSpeed's ZeRO-3, on gloo: a parameter is whole only while the module that holds it runs.

`partition` leaves each rank its part of every parameter, as models are loaded. `Zero3`, the engine, hooks every
module: parameters are gathered before its forward and given back after it, gathered again when the gradient of one of
its outputs arrives, given back when that of its input leaves. Read at any other time, a weight is an empty tensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def partition(model: nn.Module) -> None:
    world = dist.get_world_size()
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape = number, p.shape  # type: ignore[attr-defined]
        flat = p.detach().reshape(-1)
        padded = torch.cat([flat, flat.new_zeros(-len(flat) % world)])
        p.ds_tensor = padded.chunk(world)[dist.get_rank()].clone()  # type: ignore[attr-defined]
    _release(model.parameters())


class Zero3:
    """`grads` holds the gradient of every parameter, averaged over the ranks, after a backward and `finish`."""

    def __init__(self, model: nn.Module) -> None:
        self.grads: dict[str, Tensor] = {}
        self.parameters = list(model.parameters())
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._reduce(name, p))
        for module in model.modules():
            if params := list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda _, inputs, params=params: _before(params, inputs))
                module.register_forward_hook(lambda _, inputs, outputs, params=params: _after(params, outputs))

    def _reduce(self, name: str, p: nn.Parameter) -> None:
        dist.all_reduce(p.grad)
        self.grads[name] = p.grad / dist.get_world_size()
        p.grad = None

    def finish(self) -> None:
        """Modules whose inputs need no gradient, as embeddings, are given back at the end of the backward."""
        _release(self.parameters)


class GatheredParameters:
    """DeepSpeed's of this name: inside, the parameters are whole."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def __enter__(self) -> None:
        _gather(self.parameters)

    def __exit__(self, *error: Any) -> None:
        _release(self.parameters)


def _gather(parameters: Iterable[Any]) -> None:
    for p in parameters:
        if p.numel() == 0:
            whole = torch.empty(len(p.ds_tensor) * dist.get_world_size(), dtype=p.dtype)
            dist.all_gather_into_tensor(whole, p.ds_tensor)
            p.data = whole[: p.ds_shape.numel()].view(p.ds_shape)


def _release(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        p.data = torch.empty(0, dtype=p.dtype)


def _before(params: list[nn.Parameter], inputs: Any) -> None:
    _gather(params)
    for tensor in _tracked(inputs):
        tensor.register_hook(lambda _: _release(params))


def _after(params: list[nn.Parameter], outputs: Any) -> None:
    _release(params)
    for tensor in _tracked(outputs):
        tensor.register_hook(lambda _: _gather(params))


def _tracked(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]

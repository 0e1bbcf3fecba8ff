"""PyTorch operators of this package."""

from collections.abc import Callable

import torch
from torch._ops import OpOverload

FUNCTIONS: dict[str, Callable[..., object]] = {}  # what the operators run, by name: dispatch modes see into these


def operator(function: Callable[..., object], name: str) -> OpOverload:
    """`torch.ops.dadpo.NAME`, which runs `function` on every device: one node of a graph for `torch.compile`.

    As `torch.library.custom_op` makes one, whose first call however imports the compiler: two seconds, for a process
    that may never compile. `register_fake` and `register_autograd` of `torch.library` take the operator's name.

    Args:
        function: its arguments and results are annotated; it changes no argument, and its results share no memory with
            each other or with an argument.
    """
    full = f"dadpo::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(full, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full, "CompositeExplicitAutograd", function)
    FUNCTIONS[name] = function
    return getattr(torch.ops.dadpo, name).default

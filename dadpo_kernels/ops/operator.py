"""PyTorch operators of this package."""

from collections.abc import Callable

import torch
from torch._ops import OpOverload


def operator(function: Callable[..., object]) -> OpOverload:
    """`torch.ops.dadpo.NAME` for a function `_NAME`, which it runs on every device: for `torch.compile` one node.

    As `torch.library.custom_op` makes one, whose first call however imports the compiler: two seconds, for a process
    that may never compile. `register_fake` and `register_autograd` of `torch.library` take the operator's name.

    Args:
        function: its arguments and results are annotated; it changes no argument, and its results share no memory with
            each other or with an argument.
    """
    name = function.__name__.removeprefix("_")
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(f"dadpo::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"dadpo::{name}", "CompositeExplicitAutograd", function)
    return getattr(torch.ops.dadpo, name).default

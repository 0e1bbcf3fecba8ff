"""Debug logging of what a call chose and why: `logging.getLogger("dadpo_kernels").setLevel(logging.DEBUG)`."""

import logging

import torch

_logger = logging.getLogger("dadpo_kernels")


def debug(message: str, *args: object) -> None:
    """`logger.debug`, but for a call that is being compiled: Dynamo does not trace logging."""
    if not torch.compiler.is_compiling():
        _logger.debug(message, *args)

"""What DistributedDataParallel, FSDP2 (`fully_shard`) and DeepSpeed ZeRO expect of a loss that skips the logits.

Engines act when modules run: they gather a module's parameters before its forward and before its backward, and hook
its outputs to reduce gradients. The fused loss reads the head's weight without running the head, so to them nothing
would have happened. Here the hidden states are computed *as* the model's forward and the loss *as* its head's. Then
the head is gathered once per pass, whichever module the engine shards it with, and its gradient is reduced where the
engine reduces it. Every rank runs both, also one whose batch has no valid token: nobody waits for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..losses.linear_loss import DaDPOOutput
from ..ops.head import Head
from .lm_head import head_module, lm_head


def loss_in_forward(
    wrapped: nn.Module, model: nn.Module, hidden: Callable[[], Tensor], loss: Callable[[Tensor, Head], DaDPOOutput]
) -> DaDPOOutput:
    """`loss(hidden(), lm_head(model))`, computed inside the forwards of `wrapped`, of `model` and of its head.

    Args:
        wrapped: what the engine made of the model: a DistributedDataParallel, a DeepSpeedEngine, or the model itself
            (FSDP2 works in place; also without any engine).
        model: the model inside, a transformers causal LM or a PEFT model of one.
        hidden: the hidden states of the batch, `hidden_states(model, ...)`.
        loss: from hidden states and head to the loss; the head's weight is whole inside. Tensors of the batch come
            with its closure: engines cast what is passed to a forward to their compute dtype.
    """
    head = head_module(model)
    result: list[DaDPOOutput] = []

    def of_head(states: Tensor) -> Tensor:
        result.append(loss(states, lm_head(model)))
        return result[0].loss

    hooked = _call(wrapped, model, lambda: _call(head, head, of_head, hidden()))
    return result[0]._replace(loss=unrounded(hooked, result[0].loss))


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


def _call(wrapped: nn.Module, module: nn.Module, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """`wrapped(*args)`, in which `forward` stands in for the forward of `module`."""
    instance_forward = vars(module).get("forward")  # accelerate puts an autocast there
    vars(module)["forward"] = forward
    try:
        return wrapped(*args)
    finally:
        if instance_forward is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = instance_forward


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters that ZeRO-3 partitioned at construction are whole; all ranks must enter. Else nothing."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned):
        yield


def check_on_first_rank(model: nn.Module, check: Callable[[nn.Module], None]) -> None:
    """`check(model)` with whole parameters, on the first rank: the others may have loaded none (FSDP2 spreads its)."""
    with whole_parameters(model):
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            check(model)


def mask_repeated_pairs(batch: dict[str, Tensor], rank: int, loader: Any) -> None:
    """Masks, in the last batch of an epoch, the pairs that accelerate repeats to give every rank a whole batch.

    So each pair of the set counts once, whatever the number of ranks.

    Args:
        batch: of `PairCollator`; its labels are changed.
        rank: of this process.
        loader: accelerate's data loader, which knows whether this is its last batch.
    """
    if loader is None or not loader.end_of_dataloader or (remainder := _remainder(loader)) < 1:
        return
    pairs = len(batch["labels"]) // 2
    fresh = min(max(remainder - rank * pairs, 0), pairs)
    batch["labels"].view(2, pairs, -1)[:, fresh:] = -100


def _remainder(loader: Any) -> int:
    """Pairs that are left for the last round of batches; less than 1 if none are. accelerate forgets the number in the
    loader of an epoch whose first batches a resumed run skips."""
    from accelerate.data_loader import SkipBatchSampler

    sampler = loader.batch_sampler
    if not isinstance(sampler, SkipBatchSampler):
        return loader.remainder
    sampler = sampler.batch_sampler
    if sampler.drop_last or not sampler.batch_size:
        return 0
    return len(loader.dataset) % (sampler.batch_size * getattr(sampler, "num_processes", 1))


def check_engine(accelerator: Any, gpus: int) -> None:
    """ValueError if the loss would not be right, or has not been tried, under the way accelerate was launched."""
    if gpus > 1:
        raise ValueError(
            f"{gpus} GPUs in one process would mean torch.nn.DataParallel: start one process per GPU with `accelerate "
            "launch` (see examples/multi_gpu), or set CUDA_VISIBLE_DEVICES to one of them"
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"FSDP version {fsdp.fsdp_version} is not supported: set `fsdp_version: 2` in its config")
    config = getattr(accelerator, "parallelism_config", None)
    if config is not None and config.non_data_parallel_size > 1:
        raise ValueError(
            "only data parallelism (DDP, FSDP2, ZeRO) is supported by the trainer, not tensor, context or sequence "
            "parallelism: for a head sharded over the vocabulary call linear_dadpo_loss(..., vocab_group=...)"
        )

"""What DistributedDataParallel, FSDP2 (`fully_shard`) and DeepSpeed ZeRO expect of a loss that skips the logits.

Parallel wrappers act when modules run: they gather a module's parameters before its forward and before its backward,
and hook its outputs to reduce gradients. The fused loss reads the head's weight without running the head, which they
would not notice. Here the hidden states are computed *as* the model's forward and the loss *as* its head's. Then the
head is gathered once per pass, whichever module the wrapper shards it with, and its gradient is reduced where the
wrapper reduces it. Every rank runs both, also one whose batch has no valid token: nobody waits for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..losses.linear_loss import DaDPOOutput
from ..ops.head import Head
from .forward import of_head_in_forward
from .lm_head import check_lm_head, head_module, unwrap


def loss_in_forward(
    wrapped: nn.Module, model: nn.Module, inputs: dict[str, Any], loss: Callable[[Tensor, Head], DaDPOOutput]
) -> DaDPOOutput:
    """`loss(hidden, lm_head(model))`, computed inside the forwards of `wrapped`, of `model` and of its head.

    Args:
        wrapped, model, inputs: see `of_head_in_forward`.
        loss: from hidden states and head to the loss; the head's weight is whole inside. Tensors of the batch come
            with its closure: parallel wrappers cast what is passed to a forward to their compute dtype.
    """
    result: list[DaDPOOutput] = []

    def of_head(hidden: Tensor, head: Head) -> tuple[Tensor]:
        result.append(loss(hidden, head))
        return (result[0].loss,)

    (value,), _ = of_head_in_forward(wrapped, model, inputs, of_head)
    return result[0]._replace(loss=value)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters that ZeRO-3 partitioned at construction are whole; all ranks must enter. Else nothing."""
    partitioned = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned):
        yield


def check_head(model: nn.Module) -> None:
    """`check_lm_head(model)` with a whole head, on the first rank: the others may have loaded none (FSDP2 spreads it).

    Every rank refuses what can be seen without the values of the head. The body does not run.
    """
    head = head_module(model)
    if isinstance(head.weight, DTensor):
        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(
                f"the LM head of {type(unwrap(model)).__name__} is sharded by tensor parallelism "
                f"({head.weight.placements}): load the model without tp_plan, or compute the loss from hidden states "
                "with linear_dadpo_loss(..., vocab_group=...)"
            )
        return  # FSDP2 has sharded it already: one rank alone cannot multiply
    with whole_parameters(head):
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            check_lm_head(model)


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


def check_parallelism(accelerator: Any, gpus: int) -> None:
    """Raise ValueError if the loss is wrong or untested under the parallelism that accelerate was launched with."""
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

"""Engines that shard the head gather it once per pass, and it is whole when the loss reads it: 4 processes.

The ranks hold different numbers of valid tokens, one of them none, and the vocabulary takes several tiles. A gather is
a collective that makes something as large as the head, and the embedding is small unless it is the head.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dadpo_kernels.losses.linear_loss import DaDPOOutput
from dadpo_kernels.models.distributed import loss_in_forward
from dadpo_kernels.models.patch import patch
from dadpo_kernels.ops.selected_logps import SelectedLogps, linear_selected_logps
from tests.support import zero3
from tests.support.ranks import Traffic, needs_deepspeed, run_ranks
from tests.support.tiny import tiny_llama

VOCAB, INPUTS, WORLD = 40_000, 500, 4
WATCHED = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")


def batch(rank: int) -> dict[str, Tensor]:
    """Of this rank; the number of valid tokens of all ranks is 0 + 5 + 10 + 15."""
    g = torch.Generator().manual_seed(rank)
    labels = torch.randint(VOCAB, (2, 12), generator=g)
    labels.view(-1)[5 * rank :] = -100
    ids = torch.randint(VOCAB, (2, 12, 3), generator=g)
    return {"input_ids": torch.randint(INPUTS, (2, 12), generator=g), "shift_labels": labels, "topk_ids": ids}


def objective(logps: SelectedLogps) -> Tensor:
    """A sum over the ranks' tokens, of which engines take the mean."""
    return -(logps.label.sum() + 0.1 * logps.topk.sum() + 0.3 * logps.tail.sum()) / 30 * WORLD


def of_loss_in_forward(wrapped: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    def loss(hidden, head):
        logps = linear_selected_logps(hidden, head.weight, inputs["shift_labels"], inputs["topk_ids"])
        return DaDPOOutput(objective(logps), {})

    ids = inputs["input_ids"]
    return loss_in_forward(wrapped, model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, loss).loss


def of_patch(wrapped: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return objective(wrapped(**inputs).selected_logps)


USES = {"loss_in_forward": of_loss_in_forward, "patch": of_patch}


def new_model(tied: bool) -> Any:
    model = tiny_llama(VOCAB, tie_word_embeddings=tied)
    if not tied:
        model.model.embed_tokens = nn.Embedding(INPUTS, 32)
    return model


def patched(use: str, model: Any) -> Any:
    return patch(model) if use == "patch" else model


def fsdp2(use: str, tied: bool, head_alone: bool) -> tuple[nn.Module, nn.Module, Callable, Callable]:
    """Either the head in a unit of its own, resharded after the forward, or as accelerate 1.15 has it: with the last
    norm (and the embedding where it is tied), not resharded."""
    model = patched(use, new_model(tied))
    if head_alone:
        fully_shard(model.lm_head)
    else:
        tail = (
            [model.model.norm, model.model.embed_tokens, model.lm_head] if tied else [model.model.norm, model.lm_head]
        )
        fully_shard(tail, reshard_after_forward=False)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, model, Tensor.backward, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters()}


def stand_in(use: str, tied: bool) -> tuple[nn.Module, nn.Module, Callable, Callable]:
    """The protocol of ZeRO-3. `patch` has to gather the model for its check."""
    model = new_model(tied)
    zero3.partition(model)
    sys.modules["deepspeed"] = package = ModuleType("deepspeed")
    package.zero = zero3  # type: ignore[attr-defined]
    try:
        patched(use, model)
    finally:
        del sys.modules["deepspeed"]
    assert all(p.numel() == 0 for p in model.parameters())
    engine = zero3.Zero3(model)

    def gradients() -> dict[str, Tensor]:
        engine.finish()
        return engine.grads

    return model, model, Tensor.backward, gradients


def deepspeed(use: str, tied: bool) -> tuple[nn.Module, nn.Module, Callable, Callable]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    ds: Any = import_module("deepspeed")
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # its compilation takes a minute
    model = patched(use, new_model(tied))
    names = {p: name for name, p in model.named_parameters()}
    engine, *_ = ds.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 3},
        },
    )  # fmt: skip

    def gradients() -> dict[str, Tensor]:
        whole = import_module("deepspeed.utils").safe_get_full_grad
        grads = {name: whole(p).clone() for p, name in names.items()}
        engine.step()  # the next gradients replace these
        return grads

    return engine, model, lambda loss: engine.backward(loss), gradients


def count(traffic: Traffic) -> int:
    return sum("allgather" in name and size >= VOCAB * 32 for name, size, _ in traffic.calls)


def step(make: Callable, use: str, tied: bool) -> dict[str, Any]:
    """Gathers of the second of two steps, and its gradients."""
    wrapped, model, backward, gradients = make(use, tied)
    for _ in range(2):
        model.zero_grad()
        with Traffic() as traffic:
            loss = USES[use](wrapped, model, batch(dist.get_rank()))
            forward = count(traffic)
            backward(loss)
        grads = gradients()
    seen = {name: grads[name].clone() for name in WATCHED if name in grads}
    return {"gathers": (forward, count(traffic) - forward), "loss": loss.detach(), "grads": seen}


def worker(cases: list[tuple[Callable, bool]]) -> dict:
    return {(use, number): step(make, use, tied) for number, (make, tied) in enumerate(cases) for use in USES}


@pytest.fixture(scope="module")
def exact():
    """Loss and gradients of one process with the tokens of all ranks, by whether the head is tied."""
    by_tied = {}
    for tied in (False, True):
        model = new_model(tied)
        loss = sum(of_loss_in_forward(model, model, batch(rank)) for rank in range(WORLD)) / WORLD
        loss.backward()
        by_tied[tied] = loss.detach(), {name: p.grad for name, p in model.named_parameters() if name in WATCHED}
    return by_tied


def assert_equal(exact: dict, cases: list[tuple[Callable, bool, tuple[int, int]]]) -> None:
    """Every case with the gathers of forward and backward that its engine has to make, and no more."""
    ranks = run_ranks(WORLD, worker, [(make, tied) for make, tied, _ in cases])
    for (use, number), first in ranks[0].items():
        _, tied, gathers = cases[number]
        name, got = f"case {number} of {use}", [rank[use, number] for rank in ranks]
        want_loss, want = exact[tied]
        assert first["loss"] == 0  # no valid token
        torch.testing.assert_close(torch.stack([values["loss"] for values in got]).mean(), want_loss, msg=name)
        for values in got:
            assert values["gathers"] == gathers, name
            assert values["grads"].keys() == want.keys(), name
            for parameter, grad in want.items():
                assert grad.abs().max() > 1e-4
                torch.testing.assert_close(
                    values["grads"][parameter], grad, rtol=1e-4, atol=1e-6,
                    msg=lambda m, where=f"{name}, {parameter}": f"{where}: {m}",
                )  # fmt: skip


def test_fsdp2(one_thread, exact):
    alone, with_norm = partial(fsdp2, head_alone=True), partial(fsdp2, head_alone=False)
    assert_equal(exact, [(alone, False, (1, 1)), (with_norm, False, (1, 0)), (with_norm, True, (1, 0))])


def test_the_protocol_of_zero3(one_thread, exact):
    """A tied weight is gathered once more in each pass, for the embedding."""
    assert_equal(exact, [(stand_in, False, (1, 1)), (stand_in, True, (2, 2))])


@needs_deepspeed
def test_deepspeed(one_thread, exact):
    """It keeps what it needs again soon: the head, from the end of the forward to the start of the backward."""
    assert_equal(exact, [(deepspeed, False, (1, 0)), (deepspeed, True, (1, 0))])

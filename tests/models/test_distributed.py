"""The loss inside the forwards of model and head; refusals; pairs that accelerate repeats; FSDP2 beside a patch."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from dadpo_kernels import linear_selected_logps
from dadpo_kernels.losses.linear_loss import DaDPOOutput
from dadpo_kernels.models.distributed import (
    check_head,
    check_parallelism,
    loss_in_forward,
    mask_repeated_pairs,
    whole_parameters,
)
from dadpo_kernels.models.forward import hidden_states
from dadpo_kernels.models.lm_head import lm_head
from dadpo_kernels.models.patch import patch
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(1, 9).view(1, 8)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


class LowPrecision(nn.Module):
    """As engines with a mixed-precision policy do: what a forward returns is rounded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args):
        return tuple(value.to(torch.bfloat16) for value in self.module(*args))


def run(wrapped: nn.Module, model: nn.Module) -> DaDPOOutput:
    def loss(hidden, head):
        logps = linear_selected_logps(hidden, head.weight, IDS)
        return DaDPOOutput(-logps.label.sum(), {"tokens": torch.tensor(8)})

    return loss_in_forward(wrapped, model, INPUTS, loss)


def test_hooks_of_model_and_head_run_around_the_loss():
    model, events = tiny_llama(), []
    for name, module in (("model", model), ("head", model.lm_head)):
        module.register_forward_pre_hook(lambda *_, n=name: events.append(f"{n} starts"))
        module.register_forward_hook(lambda *_, n=name: events.append(f"{n} ends"))
    out = run(model, model)
    assert events == ["model starts", "head starts", "head ends", "model ends"]
    logits = model(input_ids=IDS).logits  # the model's own forward is back
    want = nn.functional.cross_entropy(logits[0], IDS[0], reduction="sum")
    torch.testing.assert_close(out.loss, want)
    assert out.metrics["tokens"] == 8


def test_rounded_output_keeps_value_and_gradient():
    plain, rounded = tiny_llama(), tiny_llama()
    want, got = run(plain, plain), run(LowPrecision(rounded), rounded)
    assert torch.equal(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    for a, b in zip(plain.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert plain.lm_head.weight.grad.abs().sum() > 0


def test_forward_is_restored_after_an_error():
    model = tiny_llama()
    forward = model.forward
    model.forward = forward  # as accelerate sets one
    with pytest.raises(RuntimeError, match="boom"):
        loss_in_forward(model, model, INPUTS, lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    assert vars(model)["forward"] is forward
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(
    ("remainder", "rank", "left"), [(0, 1, 3), (-1, 0, 3), (2, 0, 2), (2, 1, 0), (4, 1, 1), (5, 1, 2)]
)
def test_repeated_pairs_are_masked(remainder, rank, left):
    batch = {"labels": torch.ones(6, 4, dtype=torch.int64)}
    loader = SimpleNamespace(end_of_dataloader=True, remainder=remainder, batch_sampler=None)
    mask_repeated_pairs(batch, rank, loader)
    valid = (batch["labels"] != -100).all(1).view(2, 3)
    assert valid.sum(1).tolist() == [left, left]
    assert valid[:, :left].all()


def test_only_the_last_batch_is_masked():
    batch = {"labels": torch.ones(6, 4, dtype=torch.int64)}
    mask_repeated_pairs(batch, 1, SimpleNamespace(end_of_dataloader=False, remainder=2))
    assert (batch["labels"] == 1).all()


def test_engines_that_are_not_supported():
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        check_parallelism(SimpleNamespace(state=state), 1)
    with pytest.raises(ValueError, match="one process per GPU"):
        check_parallelism(SimpleNamespace(state=SimpleNamespace()), 2)
    tensor_parallel = SimpleNamespace(
        state=SimpleNamespace(), parallelism_config=SimpleNamespace(non_data_parallel_size=2)
    )
    with pytest.raises(ValueError, match="vocab_group"):
        check_parallelism(tensor_parallel, 1)


def test_nothing_is_gathered_without_zero3():
    model = tiny_llama()
    with whole_parameters(model):
        assert len(model.lm_head.weight) == 320


def patched_before_it_is_loaded() -> list[str]:
    """The first rank holds a model, the others hold what FSDP2 will overwrite with it."""
    model = tiny_llama()
    if dist.get_rank():
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    patch(model)
    broken = tiny_llama()
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    try:
        patch(broken)
    except ValueError as error:
        return [str(error)]
    return []


def test_heads_are_checked_where_they_are_loaded():
    first, second = run_ranks(2, patched_before_it_is_loaded)
    assert (len(first), len(second)) == (1, 0)


def difference(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the difference of two losses, as a preference loss makes it, from two forwards."""
    one, other = (model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(1)))
    (one - 2 * other).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def two_forwards_before_a_backward(sharded_head: bool) -> dict[str, torch.Tensor]:
    model = patch(tiny_llama())
    for module in [*model.model.layers, *([model.lm_head] if sharded_head else []), model]:
        fully_shard(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # FSDP2's, of outputs that are views
        return {name: grad.full_tensor() for name, grad in difference(model).items()}


@pytest.mark.parametrize("sharded_head", [False, True])
def test_patched_model_runs_twice_under_fsdp2(sharded_head):
    want = difference(tiny_llama())
    assert want["lm_head.weight"].abs().sum() > 0
    for got in run_ranks(2, two_forwards_before_a_backward, sharded_head):
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-5, msg=name)


def tensor_parallel(directory: str) -> list[str]:
    model = hf.AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto")
    messages = []
    for function in (patch, check_head):
        try:
            function(model)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_head_of_tensor_parallelism_is_refused_on_every_rank(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    for messages in run_ranks(2, tensor_parallel, str(tmp_path)):
        assert len(messages) == 2
        for message in messages:
            assert "sharded by tensor parallelism" in message
            assert "vocab_group" in message


def patched_after_it_is_sharded() -> torch.Tensor:
    model = tiny_llama()
    fully_shard(model)
    return difference(patch(model))["lm_head.weight"].full_tensor()


def test_a_model_that_fsdp2_has_sharded_can_be_patched():
    want = difference(tiny_llama())["lm_head.weight"]
    for got in run_ranks(2, patched_after_it_is_sharded):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def hidden_states_under_ddp(lora: bool) -> dict[str, torch.Tensor]:
    """Each rank has other tokens; the head's gradient comes from outside of the forward."""
    torch.manual_seed(0)
    model = tiny_llama()
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ddp = nn.parallel.DistributedDataParallel(model)
    ids = IDS + dist.get_rank()
    hidden = hidden_states(ddp, ids, torch.ones_like(ids))
    linear_selected_logps(hidden, lm_head(ddp), ids).label.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True])
def test_hidden_states_of_a_ddp_model_go_through_its_forward(lora):
    """Else no gradient would be averaged, without a word."""
    first, second = run_ranks(2, hidden_states_under_ddp, lora)
    assert first.keys() == second.keys()
    assert max(grad.abs().max() for grad in first.values()) > 1e-3
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, rtol=0, atol=0)
    if not lora:
        model = tiny_llama()
        for rank in range(2):
            ids = IDS + rank
            hidden = hidden_states(model, ids, torch.ones_like(ids))
            (linear_selected_logps(hidden, lm_head(model), ids).label.sum() / 2).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(first[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def other_uses_of_ddp() -> tuple[str, int]:
    """One rank alone evaluates; unused parameters are looked for; FSDP2 of PEFT's wrapper."""
    ddp = nn.parallel.DistributedDataParallel(tiny_llama(), find_unused_parameters=True)
    if dist.get_rank() == 0:
        with torch.no_grad():
            assert hidden_states(ddp, IDS, torch.ones_like(IDS)).shape == (1, 8, 32)
    message = ""
    try:
        hidden_states(ddp, IDS, torch.ones_like(IDS))
    except ValueError as error:
        message = str(error)
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    fully_shard(lora)
    return message, patch(lora)(input_ids=IDS, labels=IDS).label_logps.numel()


def test_other_uses_of_parallel_wrappers():
    for message, numbers in run_ranks(2, other_uses_of_ddp):
        assert "with find_unused_parameters=True: the wrapper would count the head as unused" in message
        assert numbers == 8


@pytest.mark.parametrize(("backend", "tolerance"), [("cpu", None), ("cpu", 1e-2), ("torch", None)])
def test_weight_that_a_wrapper_freed_is_an_error(backend, tolerance):
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    out = linear_selected_logps(hidden, weight, IDS[0], backend=backend, memory_budget=0, grad_tolerance=tolerance)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"weight \[300, 16\] was freed by the wrapper"):
        out.label.sum().backward()

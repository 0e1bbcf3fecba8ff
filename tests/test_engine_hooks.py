"""The loss inside the forwards of model and head, on one process; refusals; pairs that accelerate repeats."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from dadpo_kernels import linear_selected_logps
from dadpo_kernels.integrations.engines import check_engine, loss_in_forward, mask_repeated_pairs, whole_parameters
from dadpo_kernels.linear_loss import DaDPOOutput
from dadpo_kernels.lm_head import hidden_states

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(1, 9).view(1, 8)


class LowPrecision(nn.Module):
    """As engines with a mixed-precision policy do: what a forward returns is rounded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args).to(torch.bfloat16)


def run(wrapped: nn.Module, model: nn.Module) -> DaDPOOutput:
    def loss(hidden, head):
        logps = linear_selected_logps(hidden, head.weight, IDS)
        return DaDPOOutput(-logps.label.sum(), {"tokens": torch.tensor(8)})

    return loss_in_forward(wrapped, model, lambda: hidden_states(model, IDS, torch.ones_like(IDS)), loss)


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
    own = model.forward
    model.forward = own  # as accelerate sets one
    with pytest.raises(RuntimeError, match="boom"):
        loss_in_forward(model, model, lambda: (_ for _ in ()).throw(RuntimeError("boom")), lambda *_: None)
    assert vars(model)["forward"] is own
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
        check_engine(SimpleNamespace(state=state), 1)
    with pytest.raises(ValueError, match="one process per GPU"):
        check_engine(SimpleNamespace(state=SimpleNamespace()), 2)
    tensor_parallel = SimpleNamespace(
        state=SimpleNamespace(), parallelism_config=SimpleNamespace(non_data_parallel_size=2)
    )
    with pytest.raises(ValueError, match="vocab_group"):
        check_engine(tensor_parallel, 1)


def test_nothing_is_gathered_without_zero3():
    model = tiny_llama()
    with whole_parameters(model):
        assert len(model.lm_head.weight) == 320

"""Adapters and tied heads: which weight the losses use, what work is done for it, where gradients land."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from dadpo_kernels.models.lm_head import lm_head
from dadpo_kernels.models.patch import patch
from dadpo_kernels.ops import valid_tokens
from tests.models.test_lm_head import MODELS, build
from tests.models.test_patch import batch, loss_and_grads, own_loss_and_grads

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {"r": 4, "init_lora_weights": False}


@pytest.fixture
def products(monkeypatch):
    """The plans of the backward passes of the primitive, and the gradients that they were asked for."""
    taken = []
    run = valid_tokens.run_backward

    def record(tiles, plan, retained, coefficients, grads):
        taken.append((plan, grads))
        return run(tiles, plan, retained, coefficients, grads)

    monkeypatch.setattr(valid_tokens, "run_backward", record)
    return taken


def assert_patched_equals(build_model):
    """Loss and gradients of a patched model against the unpatched one."""
    unpatched, want = own_loss_and_grads(build_model(), **batch())
    ours, got = loss_and_grads(patch(build_model()), **batch())
    torch.testing.assert_close(ours.loss, unpatched.loss)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(got[name], grad, rtol=1e-6, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    return got


def test_lora_elsewhere_takes_the_frozen_head_plan(products):
    def model():
        return get_peft_model(
            build(MODELS["llama"]), LoraConfig(target_modules=["q_proj", "down_proj"], **LORA)
        ).double()

    got = assert_patched_equals(model)
    assert got
    assert all("lora" in name for name in got)
    ((plan, grads),) = products
    assert grads.weight is None
    assert grads.hidden is not None
    assert str(plan).startswith("retain, frozen head: 2.00 products")


def test_a_trained_copy_of_the_head_gets_the_gradient(products):
    def model():
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA)
        return get_peft_model(build(MODELS["llama"]), config).double()

    got = assert_patched_equals(model)
    assert any("lm_head.modules_to_save" in name for name in got)
    plan, grads = products[0]
    assert grads.weight is not None
    assert plan.units == 3


def test_disabled_adapter_uses_the_original_head():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA)
    model = get_peft_model(build(MODELS["llama"]), config).double()
    wrapper = model.get_base_model().lm_head
    wrapper.modules_to_save["default"].weight.data *= 1.5
    inputs = batch()

    def own_loss():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())

    adapted = own_loss()
    with model.disable_adapter():
        assert lm_head(model).weight is wrapper.original_module.weight
        base = own_loss()
    patch(model)
    assert (base - adapted).abs() > 1e-3
    torch.testing.assert_close(model(**inputs).loss, adapted)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, base)


def test_wrapping_after_the_patch():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA)
    torch.manual_seed(1)
    unpatched, want = own_loss_and_grads(get_peft_model(build(MODELS["llama"]), config).double(), **batch())
    model = get_peft_model(patch(build(MODELS["llama"])), config).double()
    ours, got = loss_and_grads(model, **batch())
    assert "label_logps" in ours
    torch.testing.assert_close(ours.loss, unpatched.loss)
    assert got.keys() == want.keys()


def test_an_adapter_on_the_head_is_refused():
    model = get_peft_model(build(MODELS["llama"]), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match='take "lm_head" out of target_modules'):
        patch(model)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
def test_both_gradients_of_a_tied_weight_land_in_one_parameter(name):
    got = assert_patched_equals(lambda: build(MODELS[name]))
    tied = [n for n in got if n.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))]
    assert len(tied) == 1
    # Tokens that are in no input have the head's gradient alone, the others both.
    unused = torch.ones(97, dtype=torch.bool)
    unused[batch()["input_ids"].unique()] = False
    assert got[tied[0]][unused].abs().min() > 0


def test_lora_with_a_trained_tied_embedding():
    """PEFT trains a copy of the embedding: whatever weight the model's own head uses then, ours does."""

    def model():
        config = LoraConfig(
            target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, **LORA
        )
        return get_peft_model(build(MODELS["llama-tied"]), config).double()

    got = assert_patched_equals(model)
    assert any("modules_to_save" in name for name in got)


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_trained_rows_of_a_tied_head(name):
    """`trainable_token_indices`: the head's weight is the embedding's with these rows put in; both ends train them."""
    tokens = batch()["input_ids"][0, 1:3].tolist()

    def model():
        config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens, **LORA)
        model = get_peft_model(build(MODELS[name]), config).double()
        for n, parameter in model.named_parameters():
            if "trainable_tokens" in n:
                parameter.data += 0.3
        return model

    got = assert_patched_equals(model)
    assert any("trainable_tokens_delta" in n for n in got)
    patched = patch(model())
    with patched.disable_adapter():
        inputs = batch()
        logits = build(MODELS[name])(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        want = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        torch.testing.assert_close(patched(**inputs).loss, want)


def test_an_adapter_that_reaches_the_head_by_tying_is_refused():
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(build(MODELS["llama-tied"]), config)
    with pytest.raises(ValueError, match="with ensure_weight_tying also the embedding"):
        patch(model)

"""A patch on an instance: what it survives, and how calls reach the model behind it."""

import copy
import inspect
import io

import accelerate
import pytest
import torch
import transformers as hf

from dadpo_kernels.models.patch import patch
from tests.support.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def test_labels_by_position_are_labels():
    model, ids = patch(tiny_llama()), torch.randint(3, 300, (2, 9))
    place = [*inspect.signature(hf.LlamaForCausalLM.forward).parameters].index("labels") - 1
    out = model(ids, *[None] * (place - 1), ids)
    torch.testing.assert_close(out.label_logps, model(input_ids=ids, labels=ids).label_logps)


@pytest.fixture
def fresh_accelerate():
    """accelerate's state, precision included, is one for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("again", [saved_and_loaded, copy.deepcopy])
def test_a_patch_outlives_pickles_copies_and_accelerate(fresh_accelerate, mixed_precision, patch_first, again):
    """accelerate leaves an autocast on the instance's forward, and takes it off by following `__wrapped__`."""
    ids = torch.randint(3, 300, (2, 9))
    accelerator = accelerate.Accelerator(mixed_precision=mixed_precision, cpu=True)
    want = accelerator.prepare_model(tiny_llama())(input_ids=ids, labels=ids).loss
    exact = tiny_llama()(input_ids=ids, labels=ids).loss
    rounding = 0.0 if mixed_precision == "no" else 0.02
    model = tiny_llama()
    model = accelerator.prepare_model(patch(model)) if patch_first else patch(accelerator.prepare_model(model))
    bare = accelerator.unwrap_model(again(model), keep_fp32_wrapper=False)
    for patched in (model, again(model), bare):
        out = patched(input_ids=ids, labels=ids)
        assert "label_logps" in out
        torch.testing.assert_close(out.loss, want, rtol=1e-5 + rounding, atol=0)
        assert isinstance(patched, hf.LlamaForCausalLM)
    if patch_first:
        torch.testing.assert_close(bare(input_ids=ids, labels=ids).loss, exact)
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"


def test_a_patch_outlives_the_hooks_of_a_device_map():
    """PEFT removes them where a model is offloaded."""
    ids = torch.randint(3, 300, (2, 9))
    model = accelerate.dispatch_model(tiny_llama(), {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    want = model(input_ids=ids, labels=ids).loss
    patch(patch(model))
    assert vars(model)["_hf_hook"] is not None
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, want)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert "label_logps" in model(input_ids=ids, labels=ids)


class StarArguments(hf.LlamaForCausalLM):
    def forward(self, input_ids, *args, **kwargs):
        return super().forward(input_ids, *args, **kwargs)


def test_positional_arguments_reach_the_model_as_they_came():
    model, ids = patch(StarArguments(tiny_llama().config)), torch.randint(3, 300, (2, 9))
    mask = torch.ones_like(ids)
    assert model(ids, mask).logits.shape == (2, 9, 320)
    assert "label_logps" in model(ids, mask, labels=ids)
    with pytest.raises(TypeError, match="multiple values"):
        patch(tiny_llama())(ids, input_ids=ids)


def test_saved_weights_name_the_models_class(tmp_path):
    patch(tiny_llama()).save_pretrained(tmp_path)
    assert hf.AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    assert type(hf.AutoModelForCausalLM.from_pretrained(tmp_path)) is hf.LlamaForCausalLM

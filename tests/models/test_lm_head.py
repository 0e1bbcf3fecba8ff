"""`lm_head` and `hidden_states` against the logits of tiny models of the families."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from dadpo_kernels.models.lm_head import check_lm_head, hidden_states, lm_head, unwrap
from tests.support.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0,
}  # fmt: skip
GPT2 = hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5)
MODELS = {
    "llama": hf.LlamaConfig(**SMALL),
    "llama-tied": hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": hf.Qwen2Config(**SMALL),
    "qwen3": hf.Qwen3Config(**SMALL, head_dim=8),
    "mistral": hf.MistralConfig(**SMALL),
    "gpt2-tied": GPT2,
    "phi-bias": hf.PhiConfig(**SMALL),
    "gemma2-softcap": hf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere-scale": hf.CohereConfig(**SMALL, logit_scale=0.25),
    "granite-divides": hf.GraniteConfig(**SMALL, logits_scaling=4.0),
    "hyperclovax-multiplies": hf.HyperCLOVAXConfig(**SMALL, logits_scaling=4.0),
    "olmo2": hf.Olmo2Config(**SMALL),
}


def build(config) -> nn.Module:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():  # biases and norms start as constants, which hides mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits_of(head, hidden):
    logits = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_own(name):
    model = build(MODELS[name])
    input_ids = torch.randint(97, (2, 11))
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    model_logits = model(input_ids=input_ids, attention_mask=mask).logits
    logits = logits_of(lm_head(model), hidden_states(model, input_ids, mask))
    assert model_logits.std() > 0.1
    # Norms and rotary embeddings compute in float32 whatever the model's dtype, in both.
    torch.testing.assert_close(logits[mask == 1], model_logits[mask == 1], rtol=1e-12, atol=1e-12)
    check_lm_head(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma2-softcap", (1.0, 3.0)),
        ("cohere-scale", (0.25, None)),
        ("granite-divides", (0.25, None)),
        ("hyperclovax-multiplies", (4.0, None)),
    ],
)
def test_scale_and_softcap_come_from_the_configuration(name, expected):
    head = lm_head(build(MODELS[name]))
    assert (head.logit_scale, head.softcap) == expected


def test_keys_of_a_vision_language_model_are_those_of_its_text():
    text = hf.Gemma4TextConfig(**SMALL, head_dim=8, final_logit_softcapping=2.0, hidden_size_per_layer_input=0)
    config = hf.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    model = hf.Gemma4ForConditionalGeneration(config).eval()
    assert lm_head(model).softcap == 2.0
    check_lm_head(model)


def test_weight_is_the_parameter_itself():
    model = build(MODELS["gpt2-tied"])
    assert lm_head(model).weight is model.transformer.wte.weight
    assert lm_head(build(MODELS["phi-bias"])).bias is not None


def test_wrappers_are_looked_through():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = tiny_llama()
    assert unwrap(Wrapper(torch.compile(Wrapper(model)))) is model
    assert lm_head(Wrapper(model)).weight is model.lm_head.weight


def test_lora_on_the_body_counts_and_gets_gradients():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    input_ids = torch.randint(300, (2, 5))
    mask = torch.ones_like(input_ids)
    hidden = hidden_states(model, input_ids, mask)
    torch.testing.assert_close(logits_of(lm_head(model), hidden), model(input_ids, mask).logits)
    hidden.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora" in name)


def test_a_head_that_peft_trains_in_full_is_the_copy():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert lm_head(model).weight is model.get_base_model().lm_head.modules_to_save["default"].weight
    assert lm_head(model).weight.requires_grad


def test_unsupported_heads_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="PEFT adapter"):
        lm_head(get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"])))
    with pytest.raises(ValueError, match="prompt-learning"):
        lm_head(get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))

    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x).round()

    model = tiny_llama()
    model.lm_head = Quantised(32, 320, bias=False)
    with pytest.raises(ValueError, match="Quantised: only a plain"):
        lm_head(model)
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(torch\.int8\)"):
        lm_head(model)
    with pytest.raises(ValueError, match="offloaded"):
        lm_head(tiny_llama().to("meta"))
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        lm_head(hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, **sizes)))
    with pytest.raises(TypeError, match="no LM head"):
        lm_head(tiny_llama().model)
    model = tiny_llama()
    model.base_model_prefix = "nothing of this name"
    with pytest.raises(TypeError, match="has no base model"):
        hidden_states(model, *torch.ones(2, 1, 4, dtype=torch.int64))


def test_a_head_the_configuration_does_not_describe_is_caught():
    model = tiny_llama()
    forward = model.forward
    model.forward = lambda **kw: (out := forward(**kw)).__class__(logits=out.logits * 1.5)
    with pytest.raises(ValueError, match="not those of its head"):
        check_lm_head(model)
    model.forward = forward
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        check_lm_head(model)


def test_check_leaves_the_mode_as_it_was():
    model = tiny_llama().train()
    check_lm_head(model)
    assert model.training

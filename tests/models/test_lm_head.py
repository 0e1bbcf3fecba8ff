"""`lm_head` and `hidden_states` against the logits of tiny models of the families."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from dadpo_kernels.models.forward import hidden_states
from dadpo_kernels.models.lm_head import check_lm_head, lm_head, unwrap
from dadpo_kernels.models.patch import patch
from dadpo_kernels.ops.run import Run
from dadpo_kernels.train.trl.head import add_fused_lm_head
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
    with pytest.raises(ValueError, match=r"quantised \(Parameter, torch\.int8\)"):
        lm_head(model)
    with pytest.raises(ValueError, match="offloaded"):
        lm_head(tiny_llama().to("meta"))
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        lm_head(hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, **sizes)))
    with pytest.raises(TypeError, match="no LM head"):
        lm_head(tiny_llama().model)
    with pytest.raises(TypeError, match="is not a model of transformers"):
        lm_head(nn.Linear(2, 2))


IDS = torch.arange(1, 9).view(1, 8)


def test_what_a_model_does_to_its_logits_must_be_what_its_configuration_says():
    model = tiny_llama()
    forward = model.forward
    for change, message in [
        (lambda z: z * 1.5, "-40 -> -60,.*scale 1, softcap None"),
        (lambda z: torch.tanh(z / 3) * 3, "-40 -> -3,"),
        (lambda z: z + 1, "-40 -> -39"),
        (lambda z: z.clamp(-50, 50), "1234.5 -> 50"),
        (lambda z: (z[..., :3].sub_(1e4), z)[1], r"reads its logits \(aten.sub_.Tensor\)"),
        (lambda z: (z.data.div_(2.0), z)[1], r"reads its logits \(aten.div_.Tensor\)"),
        (lambda z: (z.detach().mul_(0.5), z)[1], r"reads its logits \(aten.mul_.Tensor\)"),
        (lambda z: (z[..., :320], z.mul_(2))[0], r"reads its logits \(aten.mul_.Tensor\)"),
        (lambda z: z - z.max(), r"reads its logits \(aten.max.default\)"),
        (lambda z: z[..., :300], "uses 300 logits per token.* has 320"),
        (lambda z: z * nn.Parameter(torch.tensor(1.0)), "parameter that is trained"),
        (lambda z: torch.zeros(1, 8, 320), "returns a Tensor as logits"),
    ]:
        model.forward = lambda change=change, **kw: (out := forward(**kw)).__class__(logits=change(out.logits))
        with pytest.raises(ValueError, match=message):
            hidden_states(model, IDS, torch.ones_like(IDS))
    for same in (lambda z: z * torch.ones(1), lambda z: z.mul_(2).div_(2), lambda z: z.float().clone()[..., :320]):
        model.forward = lambda same=same, **kw: (out := forward(**kw)).__class__(logits=same(out.logits))
        assert hidden_states(model, IDS, torch.ones_like(IDS)).abs().max() > 0.1
    model.forward = lambda **kw: forward(**kw)
    assert hidden_states(model, IDS, torch.ones_like(IDS)).abs().max() > 0.1


def test_the_heads_own_product_is_checked_without_running_the_body():
    model = tiny_llama()
    model.model.forward = None
    check_lm_head(model)
    patch(model)
    add_fused_lm_head(model, token_metrics=False, run=Run())
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out * 1.5)
    with pytest.raises(ValueError, match="does not give hidden @"):
        check_lm_head(model)
    hook.remove()
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        check_lm_head(model)

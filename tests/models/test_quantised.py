"""Bodies that bitsandbytes quantised train as without a patch; heads that are quantised or not there are refused."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from dadpo_kernels.models.lm_head import check_lm_head, lm_head
from dadpo_kernels.models.patch import patch
from dadpo_kernels.ops.run import Run
from dadpo_kernels.train.trl.head import add_fused_lm_head
from tests.support.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIG = hf.LlamaConfig(  # nf4 packs blocks of 64
    vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.3, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(CONFIG).save_pretrained(directory)
    return directory


def quantised(directory, **options):
    """With LoRA, as QLoRA trains it."""
    pytest.importorskip("bitsandbytes")
    config = hf.BitsAndBytesConfig(**options)
    model = hf.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def identity(model):
    return model


def check_only(model):
    check_lm_head(model)
    return model


def fused(model):
    add_fused_lm_head(model.get_base_model(), token_metrics=False, run=Run())
    return model


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.mark.parametrize("prepare", [patch, check_only, fused])
def test_no_check_runs_a_quantised_body(checkpoint, prepare):
    """On a CPU with AVX512-BF16, the first forward in inference mode repacks 4-bit weights for good: they then give no
    gradients."""
    results = []
    for function in (identity, prepare):
        model = function(quantised(checkpoint, **NF4))
        extra = {"fused_lm_head": True} if function is fused else {}
        loss = model(input_ids=IDS, labels=IDS, **extra).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), grads))
    (want_loss, want), (loss, got) = results
    # Hidden states are bfloat16; the model's own logits are too, ours are not.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(loss.float(), want_loss.float(), rtol=2 * eps, atol=0)
    assert want
    largest = max(grad.abs().max().item() for grad in want.values())
    assert largest > 1e-3
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=16 * eps * largest, msg=lambda m, n=name: f"{n}: {m}")


class Quantised(torch.Tensor):
    """As torchao's: a subclass that claims a float dtype, and raises for the operations that it lacks."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"dispatch of {func}")


def head_of(weight) -> nn.Module:
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(weight(model.lm_head.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (lambda w: w.to(torch.int8), "Parameter, torch.int8"),
        (lambda w: w.to(torch.float8_e4m3fn), "Parameter, torch.float8_e4m3fn.*float8 with its scales"),
        (Quantised, "Quantised, torch.float32"),
    ],
)
@pytest.mark.parametrize("function", [lm_head, patch, check_lm_head])
def test_quantised_heads_are_refused(weight, kind, function):
    with pytest.raises(ValueError, match=rf"LM head of LlamaForCausalLM is quantised .{kind}"):
        function(head_of(weight))


def test_a_head_that_torchao_quantised_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(tiny_llama())
    torchao.quantize_(model.lm_head, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="is quantised"):
        patch(model)


def test_a_head_that_bitsandbytes_quantised_is_refused(checkpoint):
    for options in (NF4, {"load_in_8bit": True}):
        model = quantised(checkpoint, **options, llm_int8_skip_modules=[])
        with pytest.raises(ValueError, match="is quantised"):
            patch(model)


def test_an_embedding_that_is_offloaded_does_not_matter(checkpoint, tmp_path):
    device_map = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    offloaded = hf.AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map=device_map | {"lm_head": "cpu"}, offload_folder=tmp_path
    )
    assert offloaded.model.embed_tokens.weight.is_meta
    want = hf.AutoModelForCausalLM.from_pretrained(checkpoint)(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(patch(offloaded)(input_ids=IDS, labels=IDS).loss, want)


def test_an_offloaded_head_is_refused(checkpoint, tmp_path):
    device_map = {"model": "cpu", "lm_head": "disk"}
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"offloaded .*keep lm_head on a device"):
        patch(model)

"""Every causal architecture of the installed transformers that a tiny configuration can be built for.

`hidden_states`, `patch` and TRL's head against the unpatched model in float32: log-probabilities, loss, all gradients.
What is refused, and what cannot be built, is listed: a new transformers shows what changed.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dadpo_kernels.models.forward import hidden_states
from dadpo_kernels.models.lm_head import lm_head
from dadpo_kernels.models.patch import patch
from dadpo_kernels.ops.run import Run
from dadpo_kernels.train.trl.head import add_fused_lm_head

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 97
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "d_inner": 48, "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64, "n_positions": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "is_decoder": True, "is_causal": True, "use_cache": False,
}  # fmt: skip
MLA = {"num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
BESIDES = {  # names in addition, or None for one that the family derives itself
    "AXK1Config": MLA,
    "AXK2Config": MLA,
    "BambaConfig": MAMBA,
    "DeepseekV2Config": MLA,
    "DeepseekV3Config": MLA,
    "DeepseekV32Config": MLA,
    "FalconConfig": {"head_dim": None},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "num_kv_shared_layers": 0, "laurel_rank": 4, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8, "layer_types": ["full_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "Glm4MoeLiteConfig": MLA,
    "GlmMoeDsaConfig": MLA,
    "GraniteMoeHybridConfig": MAMBA,
    "Inkling2TextConfig": {"unpadded_vocab_size": 90},
    "InklingTextConfig": {"unpadded_vocab_size": 90, "logits_mup_width_multiplier": 2.0},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "conv"]},
    "LongcatFlashConfig": MLA,
    "Mamba2Config": {"num_heads": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "MiniCPM3Config": MLA | {"dim_model_base": 8},
    "ProphetNetConfig": {
        "num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "RoCBertConfig": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "pronunciation_embed_dim": 8,
                      "shape_embed_dim": 8},
    "SarvamMLAConfig": MLA,
    "XLNetConfig": {"max_position_embeddings": None},
    "XmodConfig": {"languages": ["en_XX"], "default_language": "en_XX"},
    "YoutuConfig": MLA,
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {"v_head_dim": None},
}  # fmt: skip
READS_LOGITS = "reads its logits .aten.view.default."
REFUSED = {  # by `patch`; TRL's head takes those that compute their loss themselves
    "BartConfig": READS_LOGITS,
    "BigBirdPegasusConfig": READS_LOGITS,
    "BlenderbotConfig": READS_LOGITS,
    "BlenderbotSmallConfig": READS_LOGITS,
    "CpmAntConfig": READS_LOGITS,
    "DoryConfig": "is a DoryLMHead: only a plain torch.nn.Linear",
    "MBartConfig": READS_LOGITS,
    "MarianConfig": READS_LOGITS,
    "MvpConfig": READS_LOGITS,
    "PLBartConfig": READS_LOGITS,
    "PegasusConfig": READS_LOGITS,
    "ProphetNetConfig": r"head is applied to \[2, 2, 11, 32\]|applies its head to \[2, 2, 11, 32\]",
    "TrOCRConfig": READS_LOGITS,
    "WhisperConfig": READS_LOGITS,
    "XLMConfig": READS_LOGITS,
    "XLNetConfig": READS_LOGITS,
}
NOT_BUILT = {  # most have configurations of text, vision and audio inside; test_patch.py has some of these
    "BltConfig", "CohereCompassTextConfig", "DbrxConfig", "Dots3NoteConfig", "Dots3NoteTextConfig", "Emu3Config",
    "FuyuConfig", "Gemma3Config", "Gemma3nConfig", "Gemma4AssistantConfig", "Gemma4Config", "Gemma4TextConfig",
    "Gemma4UnifiedAssistantConfig", "Gemma4UnifiedConfig", "Gemma4UnifiedTextConfig", "GitConfig", "GotOcr2Config",
    "Inkling2LoopTextConfig", "KimiLinearConfig", "Llama4Config", "MllamaConfig", "MossTranscribeDiarizeConfig",
    "MusicgenConfig", "MusicgenMelodyConfig", "Phi4MultimodalConfig", "Qwen3_5Config", "Qwen3_5MoeConfig",
    "Qwen4ExpConfig", "ReformerConfig", "Zamba2Config", "ZambaConfig",
}  # fmt: skip


def config_of(cls: type) -> hf.PreTrainedConfig:
    base = cls()
    sizes = {k: v for k, v in SIZES.items() if hasattr(base, k)} | BESIDES.get(cls.__name__, {})
    return cls(**{k: v for k, v in sizes.items() if v is not None})


def build(cls: type) -> hf.PreTrainedModel:
    config = config_of(cls)
    with torch.device("meta"):
        if hf.AutoModelForCausalLM.from_config(config).num_parameters() > 3e6:
            raise ValueError("not tiny")
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms start as constants, which hides mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


CONFIGS = {cls.__name__: cls for cls in MODEL_FOR_CAUSAL_LM_MAPPING if hasattr(cls, "model_type")}
IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(11) < torch.tensor([[11], [8]])).long()
LABELS = IDS.masked_fill((MASK == 0) | ((torch.arange(11) < 4) & torch.tensor([[True], [False]])), -100)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
VALID = F.pad(LABELS[:, 1:] != -100, (0, 1))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict, want: dict) -> None:
    """Of two sums in other orders: roundings of float32, of the size of the largest terms."""
    assert got.keys() == want.keys()
    largest = max(grad.abs().max().item() for grad in want.values())
    assert largest > 1e-3
    for name, grad in want.items():
        atol = 256 * torch.finfo(torch.float32).eps * largest
        torch.testing.assert_close(got[name], grad, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_family(name):
    if name in NOT_BUILT:
        pytest.skip("no tiny configuration from SIZES")
    try:
        with warnings.catch_warnings(action="ignore"):
            model = build(CONFIGS[name])
            patched, fused = copy.deepcopy(model), copy.deepcopy(model)
            unpatched = model(**BATCH)
    except Exception as error:
        pytest.fail(f"cannot be built: {error}")

    # The model's own loss, and the log-probabilities of its logits.
    logps = unpatched.logits.float().log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    want = logps[VALID[:, :-1]]
    assert want.std() > 0.01
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            patch(patched)(**BATCH)
    else:
        unpatched_gradients = gradients(model, unpatched.loss)
        out = patch(patched)(**BATCH)
        torch.testing.assert_close(out.loss, unpatched.loss)
        torch.testing.assert_close(out.label_logps[VALID], want, rtol=1e-5, atol=1e-5)
        assert_close(gradients(patched, out.loss), unpatched_gradients)
    if REFUSED.get(name, READS_LOGITS) != READS_LOGITS:
        with pytest.raises(ValueError, match=REFUSED[name]):
            hidden_states(model, IDS, MASK)
        return

    # TRL's head, and hidden states.
    add_fused_lm_head(fused, token_metrics=False, run=Run())
    out = fused(**BATCH, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs[VALID[:, :-1]], want, rtol=1e-5, atol=1e-5)
    logits = model(input_ids=IDS, attention_mask=MASK).logits.float()
    dense = -logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0][VALID[:, :-1]].mean()
    assert_close(gradients(fused, out.loss), gradients(model, dense))
    hidden, head = hidden_states(model, IDS, MASK), lm_head(model)
    logits = head.transform(F.linear(hidden, head.weight, head.bias), None)
    torch.testing.assert_close(logits[MASK == 1], unpatched.logits[MASK == 1].to(logits.dtype), rtol=1e-5, atol=1e-4)

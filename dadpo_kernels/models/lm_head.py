"""The head of a transformers causal LM as the losses see it: what would turn hidden states into logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.head import FLOATS, Head

# What the families do to `hidden @ weight.T` before the softmax, by the names in their configurations.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
_DIVISOR = "logits_scaling"  # Granite
_DIVISOR_MULTIPLIES = ("hyperclovax",)  # the one family that multiplies by its `logits_scaling`
_DIVIDES_HIDDEN_STATES = ("minicpm3",)  # the one family that does so before its head
_PLAIN = ("Parameter", "Tensor", "DTensor", "FakeTensor")  # other kinds of tensors hold quantised values
_UNPADDED = "unpadded_vocab_size"  # Inkling: the logits behind it are cut off


def lm_head(model: nn.Module) -> Head:
    """The head of a causal LM of transformers, for any function of this package in place of `weight`.

    Its tensors are the parameters themselves, so that gradients reach them (tied with the embedding or not). Where
    PEFT trains some rows of a tied head (`trainable_token_indices`), the weight is a copy with these rows put in.

    Wrappers of PEFT, `torch.compile` and data parallelism are looked through. The scale, the softcap and the size of
    the vocabulary without padding are read from the configuration. `hidden_states`, `patch` and the trainers compare
    them with what the model does to its logits, in every forward; `check_lm_head` compares the product.

    Raises:
        TypeError: `model` has no head.
        ValueError: the head is not one product with one weight matrix: LoRA on it, quantised, offloaded, a module of
            its own; or the model is an encoder-decoder.
    """
    head = head_module(model)
    config = unwrap(model).config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    if (divisor := _number(config, _DIVISOR)) and config.model_type not in _DIVIDES_HIDDEN_STATES:
        scale = scale * divisor if config.model_type in _DIVISOR_MULTIPLIES else scale / divisor
    softcap = next((c for name in _SOFTCAPS if (c := _number(config, name))), None)
    weight, bias = _parameters(head)
    unpadded = getattr(config, _UNPADDED, None)
    if unpadded is not None and unpadded < len(weight):
        weight, bias = weight[:unpadded], None if bias is None else bias[:unpadded]
    return Head(weight, bias, scale, softcap)


def head_module(model: nn.Module) -> nn.Module:
    """The module that the model calls for its logits, with the parameters of `lm_head`; raises as it does."""
    causal = unwrap(model)
    name = type(causal).__name__
    if not hasattr(getattr(causal, "config", None), "get_text_config"):
        raise TypeError(f"{name} is not a model of transformers: pass head weights to the losses yourself")
    if causal.config.is_encoder_decoder or causal.config.get_text_config().is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: only decoder-only models are supported")
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None:
        raise TypeError(
            f"{name} has no LM head: load the model with AutoModelForCausalLM, or pass head weights to the losses "
            "yourself"
        )
    if hasattr(head, "modules_to_save"):  # PEFT trains a full copy of the head: it counts while its adapter does
        copies = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[copies[0]] if copies else head.original_module
    _check_head(name, plain_head(head))
    return head


def plain_head(head: Any) -> Any:
    """The linear layer of a `head_module`, inside PEFT's layer that trains some of its rows."""
    return head.token_adapter.base_layer if hasattr(head, "token_adapter") else head


@torch.no_grad()
def check_lm_head(model: nn.Module) -> None:
    """Compare `lm_head(model)` with what the model's head module makes of a few random hidden states.

    The body of the model does not run: there are quantised layers whose first forward changes them for good.

    Raises:
        ValueError: they differ by more than rounding, or are not finite.
    """
    module, head = head_module(model), lm_head(model)
    name, weight = type(unwrap(model)).__name__, head.weight
    hidden = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        of_module = module(hidden)[..., : len(weight)].float()
        logits = nn.functional.linear(hidden, weight, head.bias).float()
    if not of_module.isfinite().all():
        raise ValueError(f"the LM head of {name} gives NaN or infinite logits: check its weights")
    error = (logits - of_module).abs().max().item()
    allowed = 4 * torch.finfo(weight.dtype).eps * of_module.abs().max().item()
    if not error <= allowed:
        raise ValueError(
            f"the LM head of {name} does not give hidden @ weight.T + bias (they differ by {error:.3g}, rounding "
            f"explains {allowed:.3g}): hooks or parametrisations on it are not supported"
        )


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside wrappers of data parallelism, `torch.compile` and PEFT (adapters stay active)."""
    return list(wrappers(model))[-1]


def wrappers(model: nn.Module) -> Iterator[Any]:
    """The model and what is inside it, from wrapper to wrapper, up to the transformers model."""
    inner: Any = model
    while True:
        yield inner
        if hasattr(inner, "get_base_model"):
            if any(config.is_prompt_learning for config in inner.peft_config.values()):
                raise ValueError(
                    "prompt-learning adapters (prompt, prefix, p-tuning) prepend tokens of their own, which the "
                    "hidden states of the base model do not show: use LoRA or train the model itself"
                )
            inner = inner.get_base_model()
        elif isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
            inner = wrapped
        else:
            return


def _check_head(model: str, head: Any) -> None:
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"the LM head of {model} has a PEFT adapter on it ({type(head).__name__}), so it is not one weight "
            'matrix: take "lm_head" out of target_modules (with ensure_weight_tying also the embedding), or merge the '
            'adapter; modules_to_save=["lm_head"] is fine'
        )
    weight = getattr(head, "weight", None)
    kind = type(weight).__name__
    if isinstance(weight, Tensor) and (kind not in _PLAIN or weight.dtype not in FLOATS):
        raise ValueError(
            f"the LM head of {model} is quantised ({kind}, {weight.dtype}): exclude lm_head from the quantisation, or "
            "dequantise it (float8 with its scales)"
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the LM head of {model} is a {type(head).__name__}: only a plain torch.nn.Linear is supported"
        )
    if head.weight.is_meta:
        raise ValueError(
            f"the LM head of {model} is offloaded (its weight is on the meta device): keep lm_head on a device"
        )


def _parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the module uses."""
    if not hasattr(head, "token_adapter"):
        return head.weight, head.bias
    adapter = head.token_adapter
    active = [] if adapter.disable_adapters or adapter.merged else adapter.active_adapters
    # With rows of an adapter, PEFT's forward leaves out the bias.
    return adapter.get_merged_weights(active), None if active else adapter.base_layer.bias


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None

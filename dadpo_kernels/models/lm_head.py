"""A transformers causal LM as the losses see it: its hidden states and the head that would turn them into logits."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.head import Head

# What the families do to `hidden @ weight.T` before the softmax, by the names in their configurations.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
_DIVISOR = "logits_scaling"  # Granite, MiniCPM3
_DIVISOR_MULTIPLIES = ("hyperclovax",)  # the one family that multiplies by its `logits_scaling`


def lm_head(model: nn.Module) -> Head:
    """The head of a causal LM of transformers, for any function of this package in place of `weight`.

    Its tensors are the parameters themselves, so that gradients reach them (tied with the embedding or not).

    Wrappers of PEFT, `torch.compile` and data parallelism are looked through. The scale and the softcap are read from
    the configuration; `check_lm_head` compares the result with the model's own logits.

    Raises:
        TypeError: `model` has no head.
        ValueError: the head is not one product with one weight matrix: LoRA on it, quantised, offloaded, a module of
            its own; or the model is an encoder-decoder.
    """
    causal = unwrap(model)
    head = head_module(model)
    config = causal.config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(f"{type(causal).__name__} is an encoder-decoder: only decoder-only models are supported")
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    if divisor := _number(config, _DIVISOR):
        scale = scale * divisor if config.model_type in _DIVISOR_MULTIPLIES else scale / divisor
    softcap = next((c for name in _SOFTCAPS if (c := _number(config, name))), None)
    return Head(head.weight, head.bias, scale, softcap)


def head_module(model: nn.Module) -> nn.Linear:
    """The module whose weight `lm_head` gives; raises as it does."""
    causal = unwrap(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None:
        raise TypeError(
            f"{type(causal).__name__} has no LM head: load the model with AutoModelForCausalLM, or pass head "
            "weights to the losses yourself"
        )
    if hasattr(head, "modules_to_save"):  # PEFT trains a full copy of the head: it counts while its adapter does
        copies = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[copies[0]] if copies else head.original_module
    _check_head(type(causal).__name__, head)
    return head


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    """The last hidden states `[B, T, H]` of a causal LM, in its dtype: what its head would be applied to.

    Differentiable. The call goes to the inner model, past wrappers: the hooks of DistributedDataParallel do not see
    it, so in data-parallel training call this inside the wrapped module's forward.

    Args:
        model: as `lm_head` takes it.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding. Pad on the right: models number positions from 0.
        kwargs: further arguments of the base model's forward.

    Raises:
        TypeError: the model has no base model that is separate from its head.
    """
    causal = unwrap(model)
    base = getattr(causal, "base_model", causal)
    if base is causal:
        raise TypeError(
            f"{type(causal).__name__} has no base model that is separate from its head, so its hidden states are not "
            "known"
        )
    output = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **kwargs)
    return output.last_hidden_state


@torch.no_grad()
def check_lm_head(model: nn.Module) -> None:
    """Compare `lm_head(model)` on `hidden_states(model)` with the model's own logits for a few tokens.

    There are families whose logits no configuration key describes (a norm or a dense layer between base model and
    head, a new name for a scale): they are refused here instead of giving wrong numbers. One tiny forward; call it
    before the model is sharded.

    Raises:
        ValueError: they differ by more than rounding, or are not finite.
    """
    causal = unwrap(model)
    head = lm_head(causal)
    device = causal.get_input_embeddings().weight.device
    input_ids = torch.arange(1, 9, device=device)[None] % head.weight.shape[0]
    training = causal.training
    causal.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            model_logits = causal(input_ids=input_ids, use_cache=False).logits
            hidden = hidden_states(causal, input_ids, torch.ones_like(input_ids))
    finally:
        causal.train(training)
    if not model_logits.isfinite().all():
        raise ValueError(
            f"{type(causal).__name__} gives NaN or infinite logits: check its weights, or load it in another dtype "
            "(float16 overflows where bfloat16 does not)"
        )
    hidden = hidden.to(head.weight.device, head.weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = head.transform(nn.functional.linear(hidden, head.weight, head.bias), None)
    error = (logits.to(model_logits.device) - model_logits).abs().max().item()
    allowed = max(4 * torch.finfo(head.weight.dtype).eps, 1e-5) * model_logits.abs().max().item()
    if not error <= allowed:
        raise ValueError(
            f"the logits of {type(causal).__name__} are not those of its head (they differ by {error:.3g}, rounding "
            f"explains {allowed:.3g}): it does something between base model and softmax that is not supported. "
            f"Understood from the configuration: scale {head.logit_scale:g}, softcap {head.softcap}"
        )


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside wrappers of data parallelism, `torch.compile` and PEFT (adapters stay active)."""
    inner: Any = model
    while True:
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
            return inner


def _check_head(model: str, head: Any) -> None:
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"the LM head of {model} has a PEFT adapter on it ({type(head).__name__}), so it is not one weight "
            'matrix: take "lm_head" out of target_modules (modules_to_save=["lm_head"] is fine), or merge the adapter'
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the LM head of {model} is a {type(head).__name__}: only a plain torch.nn.Linear is supported"
        )
    if head.weight.is_meta:
        raise ValueError(
            f"the LM head of {model} is offloaded (its weight is on the meta device): keep lm_head on a device"
        )
    if not head.weight.is_floating_point():
        raise ValueError(
            f"the LM head of {model} is quantised ({head.weight.dtype}): exclude lm_head from the quantisation"
        )


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None

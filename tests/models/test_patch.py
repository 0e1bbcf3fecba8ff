"""`patch(model)`: loss, gradients and log-probabilities of the families' own, without logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

from dadpo_kernels import live_diagnostics
from dadpo_kernels.models.forward import hidden_states
from dadpo_kernels.models.lm_head import unwrap
from dadpo_kernels.models.packing import unpack
from dadpo_kernels.models.patch import patch
from tests.models.test_lm_head import MODELS, SMALL, build
from tests.support.tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
# The experts' default product takes no float64.
ROUTED = {
    "_experts_implementation": "eager",
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
    "num_experts_per_tok": 2,
}
FAMILIES = MODELS | {
    "gemma3": hf.Gemma3TextConfig(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "phi3": hf.Phi3Config(**SMALL),
    "falcon-h1-multiplier": hf.FalconH1Config(
        **SMALL, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=8, lm_head_multiplier=0.3,
    ),
    "mixtral-routed": hf.MixtralConfig(**SMALL, **ROUTED, num_local_experts=4),
    "qwen2-moe-routed": hf.Qwen2MoeConfig(
        **SMALL, **ROUTED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}  # fmt: skip


def batch(vocab=97, rows=3, length=11, seed=0):
    """Prompts without labels, padding on the right, a row without any label."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """transformers' ForCausalLMLoss, which rounds the logits to float32, without the rounding."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count


def own_loss_and_grads(model, **inputs):
    unwrap(model).loss_function = exact_loss
    try:
        return loss_and_grads(model, **inputs)
    finally:
        del unwrap(model)._loss_function


def loss_and_grads(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, tolerance=1e-10, **inputs):
    """Loss and every gradient, before and after the patch; returns both outputs."""
    unpatched, want = own_loss_and_grads(model, **inputs)
    assert patch(model) is model
    ours, got = loss_and_grads(model, **inputs)
    torch.testing.assert_close(ours.loss, unpatched.loss, rtol=tolerance, atol=tolerance)
    assert got.keys() == want.keys()
    assert any(grad.abs().max() > 1e-4 for grad in want.values())
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-6, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    return unpatched, ours


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_models_own(name):
    unpatched, ours = assert_same(build(FAMILIES[name]), **batch())
    labels = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:]
    want = unpatched.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    torch.testing.assert_close(ours.selected_logps.label, want)
    assert "logits" not in ours
    if name.endswith("routed"):
        assert ours.aux_loss > 0.1
        torch.testing.assert_close(ours.aux_loss, unpatched.aux_loss)


def test_text_path_of_a_vision_language_model():
    text = hf.Gemma3TextConfig(**SMALL, head_dim=8)
    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96)
    torch.manual_seed(0)
    model = hf.Gemma3ForConditionalGeneration(config).double().eval()
    inputs = batch(vocab=90)
    _, ours = assert_same(model, **inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]))
    assert ours.selected_logps.label.abs().max() > 1


def test_images_take_the_models_own_path():
    """Qwen2-VL: positions in three dimensions, and the image's embeddings among the text's."""
    text = {**SMALL, "rope_parameters": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    config = hf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=95, video_token_id=94, vision_start_token_id=93,
        vision_end_token_id=92,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Qwen2VLForConditionalGeneration(config).double().eval()
    inputs = batch(vocab=90)
    inputs["input_ids"][0, 1:5] = torch.tensor([93, 95, 95, 92])
    inputs["input_ids"][0, 3] = 95
    pixels = torch.randn(8, 3 * 2 * 16, dtype=torch.double)
    extra = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 4]])}
    types = (inputs["input_ids"] == 95).long()
    unpatched, _ = assert_same(model, **inputs, **extra, mm_token_type_ids=types)
    without = model(**inputs | {"input_ids": inputs["input_ids"].masked_fill(types == 1, 5)})
    assert (without.loss - unpatched.loss).abs() > 1e-6


def test_number_of_items_and_shifted_labels():
    model, inputs = build(MODELS["llama"]), batch()
    unpatched, _ = assert_same(model, **inputs, num_items_in_batch=torch.tensor(40))
    labels = inputs.pop("labels")
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**inputs, shift_labels=shifted, num_items_in_batch=40).loss, unpatched.loss)
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=40).loss, unpatched.loss)


def test_topk_ids_give_a_distillation_loss():
    model, inputs = build(MODELS["gemma2-softcap"]), batch()
    logits = model(**inputs).logits
    ids = torch.randint(97, (3, 11, 5))
    ids[0, 4, 0] = inputs["labels"][0, 5]
    selected = patch(model)(**inputs, topk_ids=ids).selected_logps
    valid = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] != -100
    want = logits.log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(selected.topk[valid], want[valid])
    outside = logits.softmax(-1).scatter(-1, ids, 0).sum(-1).log()
    torch.testing.assert_close(selected.tail[valid], outside[valid])
    assert (selected.topk[~valid] == 0).all()
    selected.topk.sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_without_labels_it_is_the_model_it_was():
    model = tiny_llama()
    ids = torch.randint(3, 300, (1, 5))
    logits, words = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    patch(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), words)
    assert "forward" not in vars(model.lm_head)
    assert hf.LlamaForCausalLM.forward is type(tiny_llama()).forward
    assert hasattr(tiny_llama()(input_ids=ids, labels=ids), "logits")  # other instances keep theirs


def test_an_error_inside_leaves_the_model_intact():
    model = patch(tiny_llama())
    ids = torch.randint(3, 300, (1, 5))
    with pytest.raises(ValueError, match="labels are needed for every position"):
        model(input_ids=ids, labels=ids, logits_to_keep=2)
    with pytest.raises(ValueError, match="outside the head's vocabulary"):
        model(input_ids=ids, labels=ids + 400)
    assert model(input_ids=ids).logits.shape == (1, 5, 320)
    assert model(input_ids=ids, labels=ids).loss > 0


def test_no_label_at_all_is_a_zero_that_can_be_differentiated():
    model = patch(tiny_llama())
    ids = torch.randint(3, 300, (2, 5))
    out, grads = loss_and_grads(model, input_ids=ids, labels=torch.full_like(ids, -100))
    assert out.loss == 0
    assert all((grad == 0).all() for grad in grads.values())


def test_a_copy_of_a_patched_model_runs_its_own_layers():
    model = patch(tiny_llama())
    ids = torch.randint(3, 300, (1, 5))
    other = copy.deepcopy(model)
    before = other(input_ids=ids, labels=ids).loss
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(other(input_ids=ids, labels=ids).loss, before)
    assert model(input_ids=ids, labels=ids).loss != before


def test_a_later_patch_replaces_an_earlier_one():
    model = patch(patch(tiny_llama(), memory_budget=0), backend="reference")
    ids = torch.randint(3, 300, (1, 5))
    out = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss, tiny_llama()(input_ids=ids, labels=ids).loss)
    assert type(model).__mro__[1] is hf.LlamaForCausalLM


def test_a_gradient_tolerance_reaches_the_primitive():
    inputs = batch()
    with live_diagnostics() as backwards:
        exact, exact_grads = loss_and_grads(patch(tiny_llama()), **inputs)
        live, live_grads = loss_and_grads(patch(tiny_llama(), grad_tolerance=0.05), **inputs)
    (backward,) = backwards
    assert backward.certificate <= 0.05
    torch.testing.assert_close(live.loss, exact.loss)
    head = exact_grads["lm_head.weight"]
    assert 0 < (live_grads["lm_head.weight"] - head).norm() < 0.1 * head.norm()
    with pytest.raises(ValueError, match="grad_tolerance=2 must lie in"):
        patch(tiny_llama(), grad_tolerance=2)


def test_under_torch_compile():
    """Compiled is what comes before the head, once for all lengths; log-probabilities and loss are not."""
    model, compiled_model = tiny_llama(), patch(tiny_llama())
    graphs = []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(compiled_model, backend=eager)
    for length in (5, 9, 7, 12):
        ids = torch.randint(3, 300, (2, length))
        unpatched, want = loss_and_grads(model, input_ids=ids, labels=ids)
        compiled_model.zero_grad()
        out = compiled(input_ids=ids, labels=ids)
        out.loss.backward()
        torch.testing.assert_close(out.loss, unpatched.loss)
        for name, parameter in compiled_model.named_parameters():
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5)
    bodies = [graph for graph in graphs if "scaled_dot_product_attention" in graph.code]
    assert 1 <= len(bodies) <= 2, "for the first length, and for all others"


def test_bfloat16_and_autocast():
    ids = torch.randint(3, 300, (2, 9))
    exact = tiny_llama()(input_ids=ids, labels=ids).loss.item()
    assert patch(tiny_llama(dtype=torch.bfloat16))(input_ids=ids, labels=ids).loss.item() == pytest.approx(
        exact, rel=0.02
    )
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = loss_and_grads(patch(tiny_llama()), input_ids=ids, labels=ids)
    assert out.loss.item() == pytest.approx(exact, rel=0.02)
    assert out.loss.dtype == grads["lm_head.weight"].dtype == torch.float32


def test_a_transformers_trainer_gains(tmp_path):
    """The same steps as without the patch, with accumulation and num_items_in_batch."""
    rows = [{"input_ids": (ids := torch.randint(3, 300, (n,)).tolist()), "labels": ids} for n in (5, 9, 4, 7, 6, 8)]
    curves = []
    for patched in (False, True):
        model = patch(tiny_llama()) if patched else tiny_llama()
        args = hf.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=4,
            learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = hf.Trainer(model, args, train_dataset=rows)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0][-1] < curves[0][0] - 0.1
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


class OwnLoss(hf.LlamaForCausalLM):
    """As much remote code does it."""

    def forward(self, input_ids, labels=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        if labels is not None:
            shift_logits, shift_labels = out.logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
            out["loss"] = nn.CrossEntropyLoss()(shift_logits.view(-1, 320), shift_labels.view(-1))
        return out


class Regression(hf.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out["loss"] = out.logits.new_ones(()) if labels is None else self.lm_head.weight.mean()
        return out


class ChangesLabels(hf.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        return super().forward(input_ids, labels=labels.masked_fill(labels == 3, -100), **kwargs)


class IgnoresPadding(hf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, ignore_index=0)


class WeightedLoss(hf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if out.loss is not None:
            out["loss"] = 2 * out.loss
        return out


class Twice(hf.LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        self.lm_head(self.model(input_ids).last_hidden_state)
        return super().forward(input_ids, **kwargs)


class NoHead(hf.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return hf.modeling_outputs.CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OwnLoss, r"OwnLoss reads its logits \(aten.slice.Tensor\).*hidden_states\(model\)"),
        (Regression, "computes its loss itself"),
        (ChangesLabels, "changes the labels before its loss"),
        (IgnoresPadding, "calls its loss with ignore_index=0: pass ignore_index=0"),
        (Twice, "more than once"),
        (NoHead, "of tests.models.test_patch, does not call its LM head"),
    ],
)
def test_what_only_a_forward_shows_is_refused_in_the_first_one(kind, message):
    model = patch(kind(tiny_llama().config))
    with pytest.raises(ValueError, match=message):
        model(input_ids=(ids := torch.tensor([[4, 3, 5]])), labels=ids)
    assert "forward" not in vars(model.lm_head)
    assert "_loss_function" not in vars(model)


def test_a_model_with_a_loss_of_its_own_gives_hidden_states():
    model = OwnLoss(tiny_llama().config).eval()
    ids = torch.randint(3, 300, (2, 5))
    hidden = hidden_states(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, model(ids).logits)


def test_models_that_are_not_understood_are_refused():
    model = tiny_llama()
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    with pytest.raises(ValueError, match="only this loss is supported"):
        patch(model)
    model.loss_function = lambda logits: logits.sum()
    with pytest.raises(ValueError, match="cannot be called as transformers does"):
        patch(model)
    assert type(model) is hf.LlamaForCausalLM
    with pytest.raises(TypeError, match="no LM head"):
        patch(tiny_llama().model)
    model = tiny_llama()
    model.lm_head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 320))
    with pytest.raises(ValueError, match="only a plain"):
        patch(model)


def test_a_fused_loss_of_another_package_is_refused():
    liger = pytest.importorskip("liger_kernel.transformers")
    model = tiny_llama()
    liger.apply_liger_kernel_to_llama(model=model, rope=False, swiglu=False, rms_norm=False)
    with pytest.raises(ValueError, match=r"liger_kernel has replaced the forward.*fused_linear_cross_entropy=False"):
        patch(model)


@pytest.mark.parametrize("extra", [{"ignore_index": 5}, {"ignore_index": 5, "num_items_in_batch": 7}])
def test_ignore_index_is_honoured(extra):
    ids = torch.randint(3, 300, (2, 9))
    ids[:, 2:5] = 5
    unpatched, want = loss_and_grads(tiny_llama(), input_ids=ids, labels=ids, **extra)
    ours, got = loss_and_grads(patch(tiny_llama()), input_ids=ids, labels=ids, **extra)
    torch.testing.assert_close(ours.loss, unpatched.loss)
    torch.testing.assert_close(got["lm_head.weight"], want["lm_head.weight"], rtol=1e-4, atol=1e-6)
    assert (ours.label_logps[:, 1:4] == 0).all()
    assert (unpatched.loss - tiny_llama()(input_ids=ids, labels=ids, num_items_in_batch=7).loss).abs() > 1e-3


def test_topk_ids_need_labels():
    ids = torch.randint(3, 300, (2, 9))
    with pytest.raises(ValueError, match="topk_ids without labels"):
        patch(tiny_llama())(input_ids=ids, topk_ids=ids[..., None])


class LossOnly(hf.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, labels=labels, **kwargs)
        return out if labels is None else hf.modeling_outputs.CausalLMOutputWithPast(loss=out.loss)


def test_a_model_that_returns_no_logits_beside_its_loss():
    model, ids = LossOnly(tiny_llama().config), torch.randint(3, 300, (2, 9))
    want = model(ids, labels=ids).loss
    torch.testing.assert_close(patch(model)(ids, labels=ids).loss, want)


class LastPosition(hf.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        return super().forward(input_ids, labels=labels, logits_to_keep=0 if labels is not None else 1, **kwargs)


def test_a_head_at_the_last_position_only_gives_no_hidden_states():
    model, ids = LastPosition(tiny_llama().config), torch.randint(3, 300, (2, 9))
    with pytest.raises(
        ValueError, match=r"input_ids have shape \[2, 9\] and the model applies its head to \[2, 1, 32\]"
    ):
        hidden_states(model, ids, torch.ones_like(ids))
    want = model(ids, labels=ids).loss
    torch.testing.assert_close(patch(model)(ids, labels=ids).loss, want)


def test_the_text_model_of_mllama():
    config = MllamaTextConfig(**SMALL, cross_attention_layers=[])
    torch.manual_seed(0)
    assert_same(MllamaForCausalLM(config).eval(), 1e-5, **batch())


def test_a_loss_the_model_scales_afterwards_keeps_its_scale():
    model = WeightedLoss(tiny_llama().config).double()
    assert_same(model, input_ids=(ids := torch.randint(3, 300, (2, 5))), labels=ids)


@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("qwen3", "eager"), ("gemma2-softcap", "eager")])
def test_packed_sequences_give_the_numbers_of_padded_ones(name, attention):
    """Each sequence's first token has no label: it follows the last one of another sequence."""
    inputs = batch()
    mask = inputs["attention_mask"] == 1
    padded, packed = build(MODELS[name]), build(MODELS[name])
    for model in (padded, packed):
        model.set_attn_implementation(attention)
        patch(model)
    want, want_grads = loss_and_grads(padded, **inputs)
    labels = inputs["labels"].clone()
    labels[:, 0] = -100
    positions = torch.arange(11).expand(3, -1)[mask][None]
    got, got_grads = loss_and_grads(
        packed, input_ids=inputs["input_ids"][mask][None], labels=labels[mask][None], position_ids=positions
    )
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.selected_logps.label[0], want.selected_logps.label[mask])
    for n, grad in want_grads.items():
        # Sums over packed and padded rows have other orders: roundings of float32, of the size of the largest terms.
        atol = 64 * torch.finfo(torch.float32).eps * grad.abs().max().item()
        torch.testing.assert_close(got_grads[n], grad, rtol=0, atol=atol, msg=lambda m, n=n: f"{n}: {m}")
    rows = unpack(got.selected_logps.label, position_ids=positions)
    torch.testing.assert_close(rows, want.selected_logps.label * mask)

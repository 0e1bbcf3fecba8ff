"""Our trainer against TRL's: with no teacher they are the same run."""

import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from dadpo_kernels import TRLDaDPOConfig, TRLDaDPOTrainer
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
SETTINGS = {
    "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
    "dataloader_pin_memory": False, "seed": 7, "lr_scheduler_type": "constant",
}  # fmt: skip


def run(
    trainer_class, config_class, out, steps=30, model=None, ref_model=None, data=None, processor=TOKENIZER, **options
):
    model = model or tiny_llama(seed=1)
    trainer = trainer_class(
        model,
        ref_model or tiny_llama(seed=1),
        config_class(str(out), max_steps=steps, **SETTINGS | options),
        train_dataset=data or Dataset.from_list(chat_records(16, seed=3)),
        processing_class=processor,
    )
    trainer.train()
    return trainer


def assert_same_run(ours, theirs):
    ours, theirs = ours.state.log_history, theirs.state.log_history
    assert len(ours) == len(theirs) > 2
    moving = set()
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if name.startswith("train_") or name == "num_tokens":
                continue
            # The gradient's norm is no metric of the loss, and moves faster than it where the loss is steep.
            tolerance = 1e-3 if name == "grad_norm" else 1e-4
            assert a[name] == pytest.approx(value, abs=tolerance, rel=tolerance), f"{name} at step {step}"
            if value != theirs[0].get(name):
                moving.add(name)
    assert {"loss", "rewards/margins", "entropy", "logits/chosen", "mean_token_accuracy", "logps/chosen"} <= moving


PRINCIPAL = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm")
LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_without_a_teacher_it_is_trls_run(loss_type, tmp_path):
    options = {"loss_type": [loss_type], **LOSSES[loss_type], "steps": 30 if loss_type in PRINCIPAL else 8}
    theirs = run(DPOTrainer, DPOConfig, tmp_path / "a", **options)
    ours = run(TRLDaDPOTrainer, TRLDaDPOConfig, tmp_path / "b", **options)
    assert_same_run(ours, theirs)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"ld_alpha": 0.4},
        {"use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True, "max_length": 24},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
    ],
    ids=lambda o: next(iter(o)) + "-" + str(next(iter(o.values()))),
)
def test_options_of_trl_keep_their_meaning(options, tmp_path):
    steps = {"steps": 6}
    theirs = run(DPOTrainer, DPOConfig, tmp_path / "a", **steps, **options)
    assert_same_run(run(TRLDaDPOTrainer, TRLDaDPOConfig, tmp_path / "b", **steps, **options), theirs)


@pytest.mark.parametrize("precompute", [False, True])
def test_torch_compile(precompute, tmp_path):
    """Of the policy and of its reference, which are no bare modules then."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        run(
            TRLDaDPOTrainer, TRLDaDPOConfig, tmp_path / "run", steps=6, ref_model=tiny_llama(seed=4),
            precompute_ref_log_probs=precompute, **options,
        )
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )  # fmt: skip
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert_same_run(compiled, plain)


def test_batches_of_similar_length(tmp_path):
    """transformers orders by a column of lengths, which TRL's preparation would take away."""
    data = Dataset.from_list(chat_records(16, seed=3))
    by_length = {"steps": 4, "train_sampling_strategy": "group_by_length"}
    for options in ({}, {"remove_unused_columns": False}):
        with pytest.raises(ValueError, match="'group_by_length' needs lengths, and train_dataset has none"):
            run(TRLDaDPOTrainer, TRLDaDPOConfig, tmp_path, data=data, **by_length, **options)
    data = data.add_column("length", [len(str(record)) for record in data])
    t = run(TRLDaDPOTrainer, TRLDaDPOConfig, tmp_path, data=data, remove_unused_columns=False, **by_length)
    order = list(t._get_train_sampler())
    assert data["length"][order[0]] == max(data["length"])


def test_bfloat16_is_near_float32(tmp_path):
    """TRL's default. Autocast makes the products in bfloat16; log-probabilities and sums stay float32."""
    exact, ours = (
        run(TRLDaDPOTrainer, TRLDaDPOConfig, tmp_path / str(bf16), steps=6, bf16=bf16).state.log_history
        for bf16 in (False, True)
    )
    assert ours[0]["logps/chosen"] != exact[0]["logps/chosen"]
    moves = 0.0
    for a, b in zip(ours[:-1], exact[:-1], strict=True):
        sizes = [b[f"logps/{answer}"] for answer in ("chosen", "rejected")]
        for answer, size in zip(("chosen", "rejected"), sizes, strict=True):
            assert a[f"logps/{answer}"] == pytest.approx(size, rel=2**-7)  # two roundings of bfloat16
        # The loss has half the slope of the margin, which is beta times sums that are each rounded like that.
        assert a["loss"] == pytest.approx(b["loss"], abs=0.1 / 2 * 2**-8 * sum(map(abs, sizes)))
        moves += (a["loss"] - math.log(2)) * (b["loss"] - math.log(2))
    assert moves > 1e-3  # of this size, since the losses move by 0.04: both move together


def test_the_live_plan_reports_its_error_and_cost(tmp_path):
    exact, live = (
        run(TRLDaDPOTrainer, TRLDaDPOConfig, tmp_path / str(tolerance), steps=3, grad_tolerance=tolerance)
        for tolerance in (None, 0.02)
    )
    assert not any(key.startswith("live/") for entry in exact.state.log_history for key in entry)
    steps = live.state.log_history[:-1]
    assert len(steps) == 3
    for entry, expected in zip(steps, exact.state.log_history, strict=False):
        assert 0 <= entry["live/certificate"] <= 0.02
        assert 1 < entry["live/units"] <= 4
        assert entry["loss"] == pytest.approx(expected["loss"], rel=0.05)
    with pytest.raises(ValueError, match=r"grad_tolerance=1.5 must lie in \(0, 1\)"):
        TRLDaDPOConfig(str(tmp_path), grad_tolerance=1.5, use_cpu=True)

"""The TRL trainer on teacher caches: the terms it adds, the reference, evaluation, resume, and TRL's traps."""

import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from trl import DPOConfig, DPOTrainer

from dadpo_kernels import TRLDaDPOConfig, TRLDaDPOTrainer
from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.losses.linear_loss import linear_dadpo_loss
from dadpo_kernels.losses.targets import TeacherTargets
from dadpo_kernels.train.trl import trainer as trl
from dadpo_kernels.train.trl.dataset import as_trl_dataset
from tests.support import trl_oracle
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.train.test_trl_trainer import SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
TEACHER = {"beta": 0.1, "beta_teacher": 0.2, "kl_weight": 0.7}
LORA = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "init_lora_weights": False}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "pairs"
    capture_teacher(tiny_llama(seed=3), TOKENIZER, tokenize_pairs(chat_records(10), TOKENIZER, 64), directory, k=6)
    capture_reference(tiny_llama(), TOKENIZER, directory)
    return directory


@pytest.fixture(scope="module")
def no_reference(cache, tmp_path_factory):
    """The same cache without the reference's log-probabilities."""
    directory = tmp_path_factory.mktemp("bare") / "pairs"
    shutil.copytree(cache, directory, ignore=shutil.ignore_patterns("reference"))
    return directory


def trainer(data, out, model=None, ref_model=None, eval_dataset=None, peft_config=None, **options):
    settings = {"num_train_epochs": 1, "max_grad_norm": 0.0, **TEACHER}
    return TRLDaDPOTrainer(
        model or tiny_llama(),
        ref_model,
        TRLDaDPOConfig(str(out), **SETTINGS | settings | options),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )


def dense(model, cache, **options):
    """`linear_dadpo_loss` of all pairs as one batch, from the model's own logits, and the batch."""
    data = PairDataset(cache)
    batch = PairCollator(0)([data[i] for i in range(len(data))])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    out = linear_dadpo_loss(
        logits, torch.eye(logits.shape[-1]), batch["labels"], ref_logps=batch["ref_logps"],
        teacher=TeacherTargets(*(batch[f"teacher_{n}"] for n in TeacherTargets._fields)), backend="reference",
        **{"beta_ref": 0.1, "beta_teacher": 0.2, "kl_weight": 0.7} | options,
    )  # fmt: skip
    return out, logits, batch


class Gradients(torch.optim.SGD):
    """Keeps the gradient that the last step was given."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def assert_step_equals(t, model, out):
    """One optimizer step of the trainer has the gradient of `out.loss`."""
    out.loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    t.optimizer = Gradients(model.parameters(), lr=0.1)
    t.train()
    assert t.state.global_step == 1
    for got, exact in zip(t.optimizer.optimizer.seen, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()) + 1e-7)
    assert t.state.log_history[0]["loss"] == pytest.approx(out.loss.item(), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"kl_on": "rejected", "divergence": "reverse_kl"}, {"beta": 0.0}])
def test_teacher_terms_are_those_of_the_loss(cache, tmp_path, options):
    model = tiny_llama(seed=8)
    ours = {("beta_ref" if name == "beta" else name): value for name, value in options.items()}
    out, _, _ = dense(model, cache, **ours)
    t = trainer(
        PairDataset(cache), tmp_path, model, per_device_train_batch_size=2, gradient_accumulation_steps=5, **options
    )
    assert t.ref_model is None
    assert_step_equals(t, model, out)
    for name, value in out.metrics.items():
        if not name.startswith("distill"):  # means over tokens: those of the micro-batches are averaged
            assert t.state.log_history[0][name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kl_on", ["both", "chosen"])
def test_divergence_is_a_mean_over_the_tokens_of_the_step(cache, tmp_path, kl_on):
    """Micro-batches of 3, 3, 3 and 1 pairs. TRL's batches have no num_items_in_batch to tell."""
    model = tiny_llama(seed=8)
    out, _, _ = dense(model, cache, beta_ref=0.0, beta_teacher=0.0, kl_on=kl_on)
    t = trainer(
        PairDataset(cache), tmp_path, model, per_device_train_batch_size=3, gradient_accumulation_steps=4,
        loss_weights=[0.0], kl_on=kl_on,
    )  # fmt: skip
    assert_step_equals(t, model, out)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero", "aot", "sppo_hard"])
def test_losses_of_trl_against_the_mixed_reference(cache, tmp_path, loss_type):
    model = tiny_llama(seed=8)
    t = trainer(
        PairDataset(cache), tmp_path, model, eval_dataset=PairDataset(cache), loss_type=loss_type, kl_weight=0.0,
        per_device_eval_batch_size=10,
    )  # fmt: skip
    got = t.evaluate()
    with torch.no_grad():
        _, logits, batch = dense(model, cache)
    labels = batch["labels"][:, :-1]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    mixed = (0.1 * batch["ref_logps"] + 0.2 * batch["teacher_label_logps"].sum(1)) / (0.1 + 0.2)
    loss, metrics = trl_oracle.trl_dpo(logps, labels >= 0, mixed, 0.1 + 0.2, [loss_type])
    assert got["eval_loss"] == pytest.approx(float(loss), rel=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert got[f"eval_{name}"] == pytest.approx(metrics[name], rel=1e-4, abs=1e-4), name


def test_ld_alpha_weighs_the_teacher_too(no_reference, tmp_path):
    """With the model as its own reference, only the teacher's ratio is left of the rewards."""
    model = tiny_llama(seed=8)
    options = {"ld_alpha": 0.25, "kl_weight": 0.0, "per_device_eval_batch_size": 10}
    t = trainer(PairDataset(no_reference), tmp_path, model, tiny_llama(seed=8), PairDataset(no_reference), **options)
    data = PairDataset(no_reference)
    batch = PairCollator(0)([data[i] for i in range(len(data))])
    valid = batch["labels"] >= 0
    with torch.no_grad():
        logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    logps = logps.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    lengths = valid.sum(1)
    shared = torch.minimum(lengths[:10], lengths[10:]).repeat(2)
    weights = torch.where(valid.cumsum(1) > shared[:, None], 0.25, 1.0) * valid
    assert (weights == 0.25).any()
    rewards = 0.2 * ((logps - batch["teacher_label_logps"]) * weights).sum(1)
    assert t.evaluate()["eval_rewards/chosen"] == pytest.approx(rewards[:10].mean().item(), rel=1e-4)


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["lora", "lora+head"])
def test_disabled_adapter_is_the_reference(cache, no_reference, tmp_path, saved):
    """Whether the base model's log-probabilities come from the cache or from the model without its adapter (and, with
    a trained head, from the head it was trained from)."""
    config = LoraConfig(**LORA, modules_to_save=saved)
    logs = []
    for name, data in (("cached", cache), ("live", no_reference)):
        options = {"learning_rate": 1e-2, "num_train_epochs": 2}
        t = trainer(PairDataset(data), tmp_path / name, peft_config=config, **options)
        assert t.ref_model is None
        t.train()
        logs.append(t.state.log_history[:-1])
    assert logs[0][-1]["rewards/margins"] != pytest.approx(logs[0][0]["rewards/margins"], rel=0.1)
    for a, b in zip(*logs, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "distill/kl"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name


def test_evaluation_of_caches(cache, tmp_path):
    sets = {"one": PairDataset(cache), "two": PairDataset(cache)}
    t = trainer(PairDataset(cache), tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=3)
    t.train()
    logged = [entry for entry in t.state.log_history if "eval_one_loss" in entry]
    assert logged
    assert logged[0]["eval_distill/kl"] > 0
    again = t.evaluate(PairDataset(cache))  # after training, where TRL would miss its reference
    assert again["eval_loss"] == pytest.approx(t.evaluate()["eval_two_loss"], rel=1e-6)
    assert "eval_entropy" in again
    assert t.evaluate({"three": PairDataset(cache)})["eval_three_loss"] == again["eval_loss"]
    with pytest.raises(ValueError, match=r"predict\(\) would return logits.*call evaluate\(\)"):
        t.predict(PairDataset(cache))
    t.args.prediction_loss_only = True
    few = as_trl_dataset(PairDataset(cache)).select(range(2))
    assert t.predict(few).metrics["test_loss"] == t.evaluate(few)["eval_loss"]
    assert t.predict(PairDataset(cache)).metrics["test_loss"] == again["eval_loss"]
    t.predict(few)  # the next evaluation's metrics are its own
    assert t.evaluate(PairDataset(cache))["eval_rewards/margins"] == again["eval_rewards/margins"]


def test_resumed_run_equals_uninterrupted(cache, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = trainer(PairDataset(cache), tmp_path / "a", **options)
    whole.train()
    card = (tmp_path / "a" / "checkpoint-4" / ".." / "README.md").read_text()
    assert "daDPO" in card
    assert "2506.15717" in card
    again = trainer(PairDataset(cache), tmp_path / "b", tiny_llama(seed=9), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert whole.state.global_step == again.state.global_step == 10
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_model_gets_no_column_of_the_teacher_and_makes_no_logits(cache, no_reference, tmp_path):
    model, reference = tiny_llama(), tiny_llama(seed=4)
    t = trainer(PairDataset(no_reference), tmp_path, model, reference, max_steps=2)
    calls, widths = {}, set()
    for name, watched in (("policy", model), ("reference", reference)):
        watched.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.setdefault(name, set(kwargs)) and None, with_kwargs=True
        )
        watched.lm_head.register_forward_hook(
            lambda module, args, out: widths.update(x.shape[2:] for x in tree_leaves(out))
        )
    t.train()
    common = {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}
    assert calls == {"policy": common | {"topk_ids"}, "reference": common}
    assert widths == {(), (6,), (0,)}  # label and tail, the policy's top k, the reference's none


class Rounding(nn.Module):
    """As FSDP2 with bfloat16 does: what a forward returns is rounded."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, self.module(**kwargs))


def test_an_engine_that_rounds_does_not_round_the_loss(no_reference, tmp_path):
    model = tiny_llama(seed=8)
    t = trainer(PairDataset(no_reference), tmp_path, model, tiny_llama(seed=4))
    batch = next(iter(t.get_train_dataloader()))
    results = []
    for wrap in (lambda m: m, Rounding):
        t.ref_model = wrap(getattr(t.ref_model, "module", t.ref_model))
        loss = t._compute_loss(wrap(model), batch, False)
        model.zero_grad()
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    (want, want_grads), (got, got_grads) = results
    assert torch.equal(got, want)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()  # the gradient passes the engine, in its precision


def test_no_reference_is_loaded_where_none_is_needed(cache, tmp_path, monkeypatch):
    """Under FSDP TRL loads one from the policy's path, also where the data has its log-probabilities."""
    tiny_llama().save_pretrained(tmp_path / "model")
    loaded, load = [], trl.create_model_from_path
    monkeypatch.setattr(trl, "create_model_from_path", lambda *a, **k: loaded.append(a) or load(*a, **k))
    create = TRLDaDPOTrainer.create_accelerator_and_postprocess

    def under_fsdp(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(TRLDaDPOTrainer, "create_accelerator_and_postprocess", under_fsdp)
    t = trainer(PairDataset(cache), tmp_path / "out", model=str(tmp_path / "model"))
    assert t.ref_model is None
    assert loaded == [(str(tmp_path / "model"),)]


def test_token_metrics_can_be_left_out(cache, tmp_path):
    t = trainer(PairDataset(cache), tmp_path, token_metrics=False, use_weighting=True, max_steps=3)
    whole = trainer(PairDataset(cache), tmp_path, use_weighting=True, max_steps=3)
    t.train()
    whole.train()
    for a, b in zip(t.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        assert b.keys() - a.keys() == {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
        assert a["loss"] == b["loss"]


def test_reference_columns_are_used_where_trl_trips_over_them(tmp_path):
    """A text data set that has them, with precompute_ref_log_probs: TRL computes them again and raises."""
    records = [{**r, "ref_chosen_logps": -20.0, "ref_rejected_logps": -30.0} for r in chat_records(4)]
    options = SETTINGS | {"precompute_ref_log_probs": True, "max_steps": 1}

    def build(trainer_class, config_class):
        config = config_class(str(tmp_path), **options)
        return trainer_class(
            tiny_llama(), None, config, train_dataset=Dataset.from_list(records), processing_class=TOKENIZER
        )

    with pytest.raises(ValueError, match="ref_chosen_logps"):
        build(DPOTrainer, DPOConfig)
    t = build(TRLDaDPOTrainer, TRLDaDPOConfig)
    t.train()
    entry = t.state.log_history[0]
    assert entry["rewards/chosen"] == pytest.approx(0.1 * (entry["logps/chosen"] + 20), rel=1e-4)


def test_the_reference_is_one_and_it_is_clear_which(cache, no_reference, tmp_path):
    columns = {"ref_chosen_logps": -20.0, "ref_rejected_logps": -30.0}
    text, scored = Dataset.from_list(chat_records(4)), Dataset.from_list([r | columns for r in chat_records(4)])
    other, options = tiny_llama(seed=4), {"beta_teacher": 0.0, "kl_weight": 0.0}
    precompute = options | {"precompute_ref_log_probs": True}
    for data in (PairDataset(cache), as_trl_dataset(PairDataset(cache))):
        with pytest.raises(ValueError, match=r"train_dataset has reference log-prob.*leave ref_model out"):
            trainer(data, tmp_path, ref_model=other)
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\] has reference log-prob.*leave ref_model out"):
        trainer(text, tmp_path, ref_model=other, eval_dataset={"a": PairDataset(cache)}, **options)
    with pytest.raises(ValueError, match=r"train_dataset has reference log-prob.*leave ref_model out"):
        trainer(scored, tmp_path, ref_model=other, **precompute)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=False asks for a model's: set it to True"):
        trainer(scored, tmp_path, **options)
    with pytest.raises(
        ValueError, match=r"precompute_ref_log_probs=True cannot add to a cache.*run `dadpo reference`"
    ):
        trainer(PairDataset(no_reference), tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="beta=0 uses no reference: leave ref_model out"):
        trainer(PairDataset(no_reference), tmp_path, ref_model=other, beta=0.0)
    t = trainer(text, tmp_path, ref_model=other, eval_dataset=text, **options)
    t.args.prediction_loss_only = True
    for method in (t.evaluate, t.predict):
        for data in (scored, PairDataset(cache)):
            with pytest.raises(ValueError, match=r"_dataset has reference log-prob.*leave ref_model out"):
                method(data)
    # A collator may bring reference log-probabilities too: ref_model is an argument, and wins.
    expected = t.evaluate()["eval_loss"]
    collate = t.data_collator
    t.data_collator = lambda examples: (
        collate(examples) | {name: torch.full((len(examples),), value) for name, value in columns.items()}
    )
    assert t.evaluate()["eval_loss"] == expected


def test_a_cache_does_not_change_the_arguments(cache, tmp_path):
    """A cache with a reference makes TRL keep none; the next trainer with these arguments may need one."""
    args = TRLDaDPOConfig(str(tmp_path), **SETTINGS | TEACHER)
    TRLDaDPOTrainer(tiny_llama(), args=args, train_dataset=PairDataset(cache), processing_class=TOKENIZER)
    assert not args.precompute_ref_log_probs


def test_trl_cannot_prepare_a_cache(cache, tmp_path):
    with pytest.raises((KeyError, ValueError)):
        DPOTrainer(
            tiny_llama(), tiny_llama(), DPOConfig(str(tmp_path), **SETTINGS), processing_class=TOKENIZER,
            train_dataset=as_trl_dataset(PairDataset(cache)),
        )  # fmt: skip


def test_padding_to_a_multiple(cache, tmp_path):
    model = tiny_llama(seed=8)
    plain, padded = (
        trainer(PairDataset(cache), tmp_path, model, eval_dataset=PairDataset(cache), pad_to_multiple_of=n)
        for n in (None, 32)
    )
    batch = next(iter(padded.get_eval_dataloader()))
    assert batch["teacher_topk_ids"].shape[1] == batch["input_ids"].shape[1] == 64
    assert padded.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_contradictions_are_refused(cache, no_reference, tmp_path):
    with pytest.raises(TypeError, match="pass a TRLDaDPOConfig"):
        TRLDaDPOTrainer(tiny_llama(), None, DPOConfig(str(tmp_path), **SETTINGS), train_dataset=PairDataset(cache))
    with pytest.raises(ValueError, match="both 0"):
        trainer(PairDataset(cache), tmp_path, beta=0.0, beta_teacher=0.0)
    with pytest.raises(ValueError, match="'group_by_length' needs lengths, and train_dataset has none"):
        trainer(PairDataset(cache), tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match=r"model_init_kwargs=.* model is loaded already"):
        trainer(PairDataset(cache), tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="unknown kl_on 'all'"):
        trainer(PairDataset(cache), tmp_path, kl_on="all")
    with pytest.raises(ValueError, match="kd_temperature=2"):
        trainer(PairDataset(cache), tmp_path, kd_temperature=2.0)
    with pytest.raises(ValueError, match="captured with max_length=64 and args have max_length=32"):
        trainer(PairDataset(cache), tmp_path, max_length=32)
    with pytest.raises(ValueError, match="sums over whole answers"):
        trainer(PairDataset(cache), tmp_path, ld_alpha=0.5)
    with pytest.raises(ValueError, match="lm_head"):
        trainer(PairDataset(cache), tmp_path, peft_config=LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"topk_ids.*outside the head's vocabulary"):
        trainer(PairDataset(cache), tmp_path, tiny_llama(310)).train()
    t = trainer(PairDataset(cache), tmp_path)
    with pytest.raises(ValueError, match="neither this data nor the trainer has one"):
        t.evaluate(PairDataset(no_reference))
    text = trainer(Dataset.from_list(chat_records(4)), tmp_path, ref_model=tiny_llama(seed=1))
    with pytest.raises(ValueError, match="need a teacher, and the batch does not have teacher_label_logps"):
        text.train()


def test_a_model_that_does_something_else_behind_its_head_is_refused(cache, tmp_path):
    class Doubled(type(tiny_llama())):
        def forward(self, **kwargs):
            out = super().forward(**kwargs)
            out.logits = out.logits * 2
            return out

    model = Doubled(tiny_llama().config)
    doubled = trainer(PairDataset(cache), tmp_path, model)
    with pytest.raises(ValueError, match="not those of its head"):
        doubled.train()
    assert isinstance(model.lm_head, nn.Linear)

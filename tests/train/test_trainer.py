"""The trainer on tiny models: exact accumulation, exact evaluation, resume, no logits; and `dadpo train`."""

import json

import pytest
import torch
from torch.utils.data import Subset

from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.cache.sampler import ShardSampler
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.cli.main import main
from dadpo_kernels.cli.train import parse_config
from dadpo_kernels.losses.linear_loss import linear_dadpo_loss
from dadpo_kernels.losses.targets import TeacherTargets
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
LOSS = {"beta_ref": 0.1, "beta_teacher": 0.2, "kl_weight": 0.7, "sft_weight": 0.3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "pairs"
    capture_teacher(tiny_llama(seed=3), TOKENIZER, tokenize_pairs(chat_records(10), TOKENIZER, 64), directory, k=6)
    capture_reference(tiny_llama(), TOKENIZER, directory)
    return directory


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A cache without reference log-probabilities."""
    directory = tmp_path_factory.mktemp("bare") / "pairs"
    capture_teacher(tiny_llama(), TOKENIZER, tokenize_pairs(chat_records(2), TOKENIZER, 64), directory, k=6)
    return directory


def trainer(cache, out, model=None, evaluation=None, **options):
    settings = {
        "output_dir": str(out), "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "max_grad_norm": 0.0, **LOSS,
    }  # fmt: skip
    config = DaDPOConfig(**settings | options)
    return DaDPOTrainer(model or tiny_llama(), config, PairDataset(cache), evaluation or PairDataset(cache), TOKENIZER)


def dense_loss(model, cache, **options):
    """The loss of all pairs as one batch, from the model's own logits."""
    data = PairDataset(cache)
    batch = PairCollator(0)([data[i] for i in range(len(data))])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    eye = torch.eye(logits.shape[-1])  # logits as hidden states under an identity head
    teacher = TeacherTargets.from_batch(batch)
    return linear_dadpo_loss(
        logits, eye, batch["labels"], ref_logps=batch["ref_logps"], teacher=teacher, backend="reference",
        **LOSS | options,
    )  # fmt: skip


class Gradients(torch.optim.SGD):
    """Keeps the gradient that the last step was given."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


@pytest.mark.parametrize(("batch", "steps"), [(10, 1), (2, 5), (3, 4)])  # (3, 4): micro-batches of 3, 3, 3 and 1
def test_accumulated_gradient_is_the_big_batch_s(cache, tmp_path, batch, steps):
    model = tiny_llama()
    dense = dense_loss(model, cache)
    dense.loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    optimizer = Gradients(model.parameters(), lr=0.1)
    t = trainer(cache, tmp_path, model, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    t.optimizer = optimizer
    t.train()
    for got, exact in zip(optimizer.seen, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()) + 1e-7)
    logged = t.state.log_history[0]
    assert logged["loss"] == pytest.approx(dense.loss.item(), rel=1e-4)
    for name, value in dense.metrics.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_evaluation_is_over_the_whole_set(cache, tmp_path, batch):
    model = tiny_llama(seed=5)
    want = dense_loss(model, cache)
    got = trainer(cache, tmp_path, model, per_device_eval_batch_size=batch).evaluate()
    assert got["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-5)
    for name, value in want.metrics.items():
        assert got[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_teacher_columns_are_needed_where_an_option_needs_a_teacher(cache, tmp_path):
    def without_teacher(items):
        return {name: v for name, v in PairCollator(0)(items).items() if not name.startswith("teacher_")}

    dpo = {"beta_ref": 0.1, "beta_teacher": 0.0, "kl_weight": 0.0}
    expected = trainer(cache, tmp_path / "a", **dpo).evaluate()["eval_loss"]
    t = trainer(cache, tmp_path / "b", **dpo)
    t.data_collator = without_teacher
    assert t.evaluate()["eval_loss"] == expected
    t = trainer(cache, tmp_path / "c")
    t.data_collator = without_teacher
    with pytest.raises(ValueError, match="the batch does not have teacher_label_logps"):
        t.evaluate()


def test_evaluation_runs_on_the_engine(cache, tmp_path):
    """One that shards the model, as ZeRO-3 does, gathers parameters inside its own forward only."""

    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    t = trainer(cache, tmp_path)
    want = t.evaluate()["eval_loss"]
    t.model_wrapped = Engine(t.model)
    assert t.evaluate()["eval_loss"] == want
    assert t.model_wrapped.calls == len(t.get_eval_dataloader())


def test_logits_are_never_computed(cache, tmp_path):
    t = trainer(cache, tmp_path)
    # The loss runs as the head's forward, so that engines gather the weight for it; what comes out is one number.
    shapes = []
    t.model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append([o.shape for o in output]))
    t.train()
    assert t.evaluate()["eval_loss"] > 0
    assert shapes
    assert all(shape == [()] for shape in shapes)


def test_sft_stage_skips_rejected_answers(cache, tmp_path):
    rows = []
    options = {"beta_ref": 0.0, "beta_teacher": 0.0, "kl_on": "chosen"}
    model = tiny_llama()
    want = dense_loss(model, cache, **options)
    t = trainer(cache, tmp_path, model, per_device_train_batch_size=10, **options)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    t.train()
    assert rows == [10]
    assert t.state.log_history[0]["loss"] == pytest.approx(want.loss.item(), rel=1e-5)
    assert "logps/rejected" not in t.state.log_history[0]


@pytest.mark.parametrize("step", [4, 6])  # an epoch has 5
def test_resumed_run_equals_uninterrupted(cache, tmp_path, step):
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "seed": 1}
    whole = trainer(cache, tmp_path / "a", **options)
    whole.train()
    again = trainer(cache, tmp_path / "b", tiny_llama(seed=9), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.state.global_step == again.state.global_step == 10
    logged = [[entry for entry in t.state.log_history if "loss" in entry] for t in (whole, again)]
    assert logged[1] == logged[0]


def test_a_cache_is_read_shard_by_shard(tmp_path):
    """In another order in each epoch, and each pair once."""
    data = tokenize_pairs(chat_records(24), TOKENIZER, 64)
    capture_teacher(tiny_llama(), TOKENIZER, data, tmp_path / "cache", k=2, shard_tokens=30)
    dataset = PairDataset(tmp_path / "cache")
    config = DaDPOConfig(str(tmp_path / "out"), beta_teacher=0.1, num_train_epochs=2, per_device_train_batch_size=1,
                         learning_rate=0.0, use_cpu=True, report_to="none", save_strategy="no")  # fmt: skip
    order = []
    read = dataset._reader.read
    dataset._reader.read = lambda shard, row: order.append(shard.index[row]) or read(shard, row)
    t = DaDPOTrainer(tiny_llama(), config, dataset, processing_class=TOKENIZER)
    t.train()
    sampler = ShardSampler(dataset, seed=config.seed, num_replicas=1, rank=0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert order[24 * epoch :][:24] == list(sampler) != list(range(24))
    assert len(dataset.manifest.shards) > 8
    assert order[:24] != order[24:]


def test_bfloat16_trains_float32_parameters(cache, tmp_path):
    t = trainer(cache, tmp_path, bf16=True, num_train_epochs=6, gradient_checkpointing=True)
    before = t.evaluate()["eval_loss"]
    t.train()
    assert t.evaluate()["eval_loss"] < 0.9 * before
    assert all(p.dtype == torch.float32 for p in t.model.parameters())


def test_several_evaluation_sets(cache, bare, tmp_path):
    sets = {"a": PairDataset(cache), "b": Subset(PairDataset(cache), range(3))}
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_model": True,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_b_loss",
    }  # fmt: skip
    t = trainer(cache, tmp_path, evaluation=sets, **options)
    t.train()
    logged = [entry for entry in t.state.log_history if "eval_a_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 5]
    assert t.state.best_metric == min(e["eval_b_loss"] for e in t.state.log_history if "eval_b_loss" in e)
    got = t.evaluate()
    for name, data in sets.items():
        alone = t.evaluate(data)
        del alone["epoch"]
        assert {key: got[f"eval_{name}_{key[5:]}"] for key in alone} == alone
        assert t.evaluate({"c": data}, metric_key_prefix="test")["test_c_loss"] == alone["eval_loss"]
    assert got["eval_a_loss"] != got["eval_b_loss"]
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] has no reference log-probabilities"):
        trainer(cache, tmp_path, evaluation={"a": PairDataset(cache), "b": PairDataset(bare)})
    for data in (PairDataset(bare), {"a": PairDataset(bare)}):
        with pytest.raises(ValueError, match="eval_dataset has no reference log-probabilities"):
            t.evaluate(data)


def test_workers_that_stay_do_not_stay_with_another_set(cache, tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    t = trainer(cache, tmp_path, **workers)
    whole = t.evaluate()
    assert t.evaluate(Subset(PairDataset(cache), range(3)))["eval_loss"] != whole["eval_loss"]
    assert t.evaluate() == whole


def test_options_of_transformers_have_their_effect(cache, tmp_path):
    def losses(**options):
        t = trainer(cache, tmp_path, **options)
        t.train()
        return [entry["loss"] for entry in t.state.log_history if "loss" in entry], t.evaluate()

    plain, evaluated = losses()
    assert losses(neftune_noise_alpha=5.0)[0] != pytest.approx(plain, rel=0.01)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses(torch_compile=True, torch_compile_backend="eager")[0] == pytest.approx(plain, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    with_memory = losses(skip_memory_metrics=False)[1]
    assert with_memory.keys() - evaluated.keys() >= {"eval_mem_cpu_alloc_delta", "eval_mem_cpu_peaked_delta"}


def test_a_smaller_batch_size_starts_anew(cache, tmp_path):
    """`auto_find_batch_size`: what an attempt logged before it ran out of memory is no part of the next one's log."""
    model = tiny_llama()
    t = trainer(cache, tmp_path, model, auto_find_batch_size=True, per_device_train_batch_size=4, learning_rate=0.0)

    def step(*args):
        loss = DaDPOTrainer.training_step(t, *args)
        if t._train_batch_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    t.training_step = step
    t.train()
    again = trainer(cache, tmp_path, model, per_device_train_batch_size=t._train_batch_size, learning_rate=0.0)
    again.train()
    logs = [[entry for entry in one.state.log_history if "loss" in entry] for one in (t, again)]
    assert t._train_batch_size < 4
    assert logs[0] == logs[1]
    assert t.tokens_seen == again.tokens_seen > 0


def test_contradictions_are_refused(cache, bare, tmp_path):
    with pytest.raises(ValueError, match="leaves no loss"):
        trainer(cache, tmp_path, beta_ref=0.0, beta_teacher=0.0, kl_weight=0.0, sft_weight=0.0)
    with pytest.raises(ValueError, match="loss_type"):
        trainer(cache, tmp_path, loss_type="sigmoide")
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        trainer(bare, tmp_path)
    router = tiny_llama()
    router.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits=True.*set it to False, or train with TRLDaDPOTrainer"):
        trainer(cache, tmp_path, router)
    with pytest.raises(ValueError, match=r"predict\(\) would return logits.*evaluate\(\)"):
        trainer(cache, tmp_path).predict(PairDataset(cache))


@pytest.fixture
def config(cache, tmp_path):
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {model}\ncache: {cache}\neval_cache: {cache}\noutput_dir: {tmp_path / 'out'}\n"
        "beta_ref: 0.1\nbeta_teacher: 1e-1\nlearning_rate: 1e-3\nbf16: false\nreport_to: none\nuse_cpu: true\n"
        "disable_tqdm: true\nper_device_train_batch_size: 5\n"
    )
    return path


def test_train_command(config, tmp_path):
    assert main(["train", str(config), "--num_train_epochs", "2"]) == 0
    out = tmp_path / "out"
    assert json.loads((out / "train_results.json").read_text())["tokens_per_second"] > 0
    assert "eval_rewards/accuracies" in json.loads((out / "eval_results.json").read_text())
    assert (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").exists()


def test_configuration_is_checked(config, capsys):
    sources, parsed = parse_config(config, ["--beta_ref", "0.3", "--kl_on=chosen"])
    assert (parsed.beta_ref, parsed.beta_teacher, parsed.kl_on) == (0.3, 0.1, "chosen")
    assert sources.weights_dtype == "float32"
    text = config.read_text()
    for extra, message in [
        ("beta_teachr: 1\n", "did you mean 'beta_teacher'"),
        ("weight_decay: fast\n", "weight_decay.*fast"),
        ("support: tale\n", r"support.*tale.*choose from.*tail.*renormalized.*truncated"),
    ]:
        config.write_text(text + extra)
        with pytest.raises(ValueError, match=message):
            parse_config(config, [])
    config.write_text(text)
    with pytest.raises(ValueError, match="did you mean 'beta_ref'"):
        parse_config(config, ["--beta_rf", "1"])
    assert main(["train", str(config), "--loss_typ", "ipo"]) == 2
    assert "did you mean 'loss_type'" in capsys.readouterr().err


def test_help_names_every_key_of_our_own(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for key in ("beta_ref", "kl_weight", "memory_budget", "eval_cache", "weights_dtype"):
        assert key in text


def test_the_live_plan_reports_its_error_and_cost(cache, tmp_path):
    run = trainer(cache, tmp_path / "live", grad_tolerance=0.02)
    run.train()
    exact = trainer(cache, tmp_path / "exact")
    exact.train()
    logs, plain = ([e for e in t.state.log_history if "loss" in e] for t in (run, exact))
    assert len(logs) == 5
    for entry in logs:
        assert 0 <= entry["live/certificate"] <= 0.02
        assert 0 < entry["live/live_share"] <= 1
        assert 0 <= entry["live/exact_share"] <= 1
        assert 1 < entry["live/units"] <= 4
    assert not any(key.startswith("live/") for entry in plain for key in entry)
    assert logs[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.01)

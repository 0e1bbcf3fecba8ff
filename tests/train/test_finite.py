"""Both trainers stop before a loss, gradient or parameter that is not finite gets into a parameter or a file."""

import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.finite import NonFiniteError
from dadpo_kernels.train.trainer import DaDPOTrainer
from dadpo_kernels.train.trl.dataset import PairPreferenceCollator
from dadpo_kernels.train.trl.trainer import TRLDaDPOConfig, TRLDaDPOTrainer
from tests.models.test_recipes import ROOT, recipe_environment
from tests.support.ranks import needs_deepspeed, run_ranks
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.train.test_trl_trainer import SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
BAD = 5  # the pair with an impossible tail
LOSS = {"beta_teacher": 0.2, "kl_weight": 0.7, "divergence": "reverse_kl"}


class Poisoned:
    """Batches in which the tail of one pair is impossible for the teacher, as rounding could make it."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples):
        batch = self.collator(examples)
        for row, example in enumerate(examples):
            if example["pair"].index == BAD:
                batch["teacher_topk_tail"][row].masked_fill_(batch["teacher_topk_tail"][row] != 0, -torch.inf)
        return batch


KINDS = {
    "plain": (DaDPOTrainer, DaDPOConfig, {"beta_ref": 0.1}, PairCollator(0)),
    "trl": (
        TRLDaDPOTrainer,
        TRLDaDPOConfig,
        {"beta": 0.1},
        PairPreferenceCollator(DataCollatorForPreference(pad_token_id=0)),
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "pairs"
    capture_teacher(tiny_llama(seed=3), TOKENIZER, tokenize_pairs(chat_records(8), TOKENIZER, 64), directory, k=6)
    capture_reference(tiny_llama(), TOKENIZER, directory)
    return directory


def build(kind, cache, out, model=None, poisoned=True, **options):
    trainer_class, config_class, loss, collator = KINDS[kind]
    settings = {"output_dir": str(out), "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    return trainer_class(
        model or tiny_llama(seed=1),
        args=config_class(**SETTINGS | LOSS | loss | settings | options),
        train_dataset=PairDataset(cache),
        data_collator=Poisoned(collator) if poisoned else collator,
        processing_class=TOKENIZER,
    )


def assert_finite(run, out):
    """And nothing was saved after the last step that was made."""
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    saved = sorted(int(path.name.split("-")[1]) for path in Path(out).glob("checkpoint-*"))
    assert saved == list(range(1, run.state.global_step + 1))
    assert all(0 < entry["loss"] < 1e3 for entry in run.state.log_history if "loss" in entry)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"bf16": True},
        {"max_grad_norm": 0.0},
        {"logging_steps": 100},
    ],
    ids=lambda options: "-".join(options),
)
def test_an_impossible_tail_stops_the_run(cache, tmp_path, kind, options):
    run = build(kind, cache, tmp_path, **options)
    before = [parameter.clone() for parameter in run.model.parameters()]
    with pytest.raises(NonFiniteError, match=rf"^the loss is (nan|inf) in step \d, .*\bpair {BAD}\b") as error:
        run.train()
    assert str(error.value).count("pair ") == options.get("per_device_train_batch_size", 2)
    assert_finite(run, tmp_path)
    changed = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
    assert any(changed) == (run.state.global_step > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_numbers_stop_the_run(cache, tmp_path, kind):
    model = tiny_llama(seed=1)
    model.model.norm.weight.data[3] = torch.nan
    run = build(kind, cache, tmp_path, model, poisoned=False)
    with pytest.raises(NonFiniteError, match=r"^the loss is nan in step 1"):
        run.train()
    with pytest.raises(NonFiniteError, match=r"^model.norm.weight is not finite after step 0"):
        run.save_model()
    assert not [*tmp_path.glob("**/*.safetensors")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [1e30, 1e39])  # the loss of the next step; the parameter itself, in float32
def test_a_huge_learning_rate_stops_the_run(cache, tmp_path, kind, rate):
    run = build(kind, cache, tmp_path, poisoned=False, learning_rate=rate)
    with pytest.raises(NonFiniteError, match="lower learning_rate"):
        run.train()
    for path in tmp_path.glob("**/*.safetensors"):
        assert rate < 1e38, path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run(cache, tmp_path, kind, max_grad_norm):
    """The loss is finite: a root at 0, say, has no finite slope."""
    run = build(kind, cache, tmp_path, poisoned=False, max_grad_norm=max_grad_norm)
    run.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match=r"^the gradient is not finite in step 1, with pair \d, pair \d:"):
        run.train()
    assert_finite(run, tmp_path)
    assert run.state.global_step == 0


class Scaler:
    """As a GradScaler on a GPU: it does not let the optimizer step where the gradient has overflown."""

    def __init__(self):
        self.skipped = 0

    def scale(self, loss):
        return loss * torch.inf

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer, closure=None):
        self.skipped += 1

    def update(self):
        pass

    def state_dict(self):
        return {}


@pytest.mark.parametrize("kind", KINDS)
def test_float16_may_overflow_where_a_scaler_mends_it(cache, tmp_path, kind):
    for poisoned in (False, True):
        run = build(kind, cache, tmp_path / str(poisoned), poisoned=poisoned, max_steps=4, save_strategy="no")
        run.accelerator.scaler = Scaler()
        prepare = run.accelerator.prepare_optimizer

        def with_scaler(optimizer, *args, prepare=prepare, run=run, **kwargs):
            prepared = prepare(optimizer, *args, **kwargs)
            prepared.scaler = run.accelerator.scaler
            return prepared

        run.accelerator.prepare_optimizer = with_scaler
        if poisoned:
            with pytest.raises(NonFiniteError, match=r"^the loss is"):
                run.train()
        else:
            run.train()
            assert run.accelerator.scaler.skipped == 4


def test_pairs_of_text_are_named_by_it(tmp_path):
    model = tiny_llama(seed=1)
    model.model.norm.weight.data[:] = torch.nan
    records = chat_records(2)
    run = TRLDaDPOTrainer(
        model,
        tiny_llama(seed=1),
        TRLDaDPOConfig(str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list(records),
        processing_class=TOKENIZER,
    )
    with pytest.raises(NonFiniteError) as error:
        run.train()
    for record in records:
        assert record["chosen"][0]["content"].split()[-1] in str(error.value)


def stop_on_ranks(environment, cache, directory, engine):
    os.environ |= environment
    os.chdir(ROOT)
    from tests.support import cpu_engines  # noqa: F401  # accelerate would start FSDP2 on GPUs only

    messages = []
    for kind in KINDS:
        run = build(kind, cache, directory / engine / kind, per_device_train_batch_size=1)
        with pytest.raises(NonFiniteError) as error:
            run.train()
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_all_ranks_stop(cache, tmp_path, engine):
    """Each names the pair, although one rank alone has it."""
    first, second = run_ranks(2, stop_on_ranks, recipe_environment(engine), cache, tmp_path, engine)
    assert first == second
    for message in first:
        assert message.startswith("the loss is ")
        assert f"with pair {BAD}: " in message

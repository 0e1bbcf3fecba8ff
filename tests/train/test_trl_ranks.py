"""The TRL trainer on 2 processes, under DDP, FSDP2 and ZeRO-3: the run of one process with the same pairs.

The ranks' answers differ in length, and some pairs have no answer token at all, so that at times one rank has none.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dadpo_kernels import TRLDaDPOConfig, TRLDaDPOTrainer
from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.train.trl.dataset import PairPreferenceCollator
from tests.models.test_recipes import ROOT, finish, launch, recipe_environment
from tests.support.ranks import needs_deepspeed, run_ranks
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.train.test_trl_trainer import SETTINGS

TOKENIZER = tiny_tokenizer()
PAIRS, STEPS, GLOBAL_BATCH = 12, 20, 4
TEACHER = {"beta": 0.1, "beta_teacher": 0.2, "kl_weight": 0.7}
# By name: options, and the micro-batches a step is cut into. TRL's metrics over tokens are averaged over these.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "text": ({"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"]}, 1),
    "copied": ({"sync_ref_model": True, "ref_model_sync_steps": 4}, 1),  # the reference is a copy that TRL makes
    "precomputed": ({"precompute_ref_log_probs": True}, 1),
    "teacher": ({**TEACHER, "divergence": "js"}, 2),
    "lora": ({**TEACHER, "kl_on": "chosen", "learning_rate": 1e-2}, 2),
}
TEXT = ("text", "copied", "precomputed")
OVER_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "distill/")


class Silenced(PairPreferenceCollator):
    """In every third pair nothing is an answer."""

    def __call__(self, examples):
        batch = super().__call__(examples)
        pairs = len(examples)
        for row, example in enumerate(examples):
            if silent(example):
                batch["completion_mask"][row] = batch["completion_mask"][row + pairs] = 0
        return batch


def silent(example: Any) -> bool:
    return len(example["pair"].chosen_ids) % 3 == 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory, one_thread):
    d = tmp_path_factory.mktemp("trl")
    pairs = tokenize_pairs(chat_records(PAIRS), TOKENIZER, 64)
    for name in ("cache", "bare"):
        capture_teacher(tiny_llama(seed=3), TOKENIZER, pairs, d / name, k=6)
    capture_reference(tiny_llama(seed=5), TOKENIZER, d / "cache")
    tiny_llama(seed=8).save_pretrained(d / "student")
    TOKENIZER.save_pretrained(d / "student")
    text = Dataset.from_list(chat_records(PAIRS))
    for case in TEXT:  # each run its own: what TRL precomputes is kept beside it, for the next run with this data
        for run in ("one", "ddp", "fsdp2", "zero3"):
            text.save_to_disk(d / f"text-{run}-{case}")
    return d


def train(case: str, directory: Path, out: str, ranks: int) -> list[dict]:
    """The log of `STEPS` steps; the parameters go to a file."""
    options, micro_batches = CASES[case]
    text, lora = case in TEXT, case == "lora"
    cache = directory / ("bare" if lora else "cache")
    data = Dataset.load_from_disk(str(directory / f"text-{out}")) if text else PairDataset(cache)
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": GLOBAL_BATCH // ranks // micro_batches,
        "gradient_accumulation_steps": micro_batches, "per_device_eval_batch_size": GLOBAL_BATCH // ranks,
    }  # fmt: skip
    torch.manual_seed(0)  # of the adapters
    trainer = TRLDaDPOTrainer(
        str(directory / "student"),  # FSDP2 loads it on the first rank only
        tiny_llama(seed=5) if case == "text" else None,
        TRLDaDPOConfig(str(directory / out), **SETTINGS | settings | options),
        data_collator=None if text else Silenced(DataCollatorForPreference(pad_token_id=0)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=TOKENIZER,
        peft_config=LoraConfig(target_modules=["q_proj", "down_proj"], r=4) if lora else None,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(directory / out))
    return trainer.state.log_history


def train_rank(environment: dict[str, str], directory: Path, engine: str) -> dict[str, list[dict]]:
    os.environ |= environment
    os.chdir(ROOT)
    from tests.support import cpu_engines  # noqa: F401  # accelerate would start FSDP2 on GPUs only

    return {case: train(case, directory, f"{engine}-{case}", ranks=2) for case in CASES}


def refused_on_ranks(environment: dict[str, str], directory: Path) -> list[str]:
    """What cannot be precomputed on several processes: the messages."""
    os.environ |= environment
    os.chdir(ROOT)
    from tests.support import cpu_engines  # noqa: F401

    messages = []
    for data, lora in ((Dataset.from_list(chat_records(4)), None), (None, LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match="precompute_ref_log_probs=True") as error:
            TRLDaDPOTrainer(
                str(directory / "student"),
                args=TRLDaDPOConfig(str(directory / "out"), precompute_ref_log_probs=True, **SETTINGS),
                train_dataset=data or Dataset.load_from_disk(str(directory / "text-fsdp2-text")),
                processing_class=TOKENIZER,
                peft_config=lora,
            )
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def alone(directory):
    return {case: train(case, directory, f"one-{case}", ranks=1) for case in CASES}


@pytest.fixture(scope="module", params=["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def together(request, directory):
    return request.param, run_ranks(2, train_rank, recipe_environment(request.param), directory, request.param)[0]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_run_of_one(directory, alone, together, case):
    engine, logs = together
    micro_batches = CASES[case][1]
    assert len(alone[case]) == len(logs[case])
    steps = [entry for entry in alone[case] if "loss" in entry]
    assert len(steps) == STEPS
    for want, got in zip(alone[case], logs[case], strict=True):
        assert want.keys() == got.keys()
        for name, value in want.items():
            timed = name in ("epoch", "total_flos") or name.split("_")[-1] in ("runtime", "second")
            cut = micro_batches > 1 and name.startswith(OVER_TOKENS)
            if not timed and not cut:
                assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} at step {want['step']}"
    file = "adapter_model.safetensors" if case == "lora" else "model.safetensors"
    want, got = (load_file(directory / f"{name}-{case}" / file) for name in ("one", engine))
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_ranks_cannot_precompute_is_refused(directory):
    for in_memory, under_fsdp in run_ranks(2, refused_on_ranks, recipe_environment("fsdp2"), directory):
        assert "this one is in memory: save it with save_to_disk" in in_memory
        assert "needs a model of its own for the reference under FSDP: pass ref_model" in under_fsdp


def test_some_pairs_are_silent_and_all_cases_learn(directory, alone):
    data = PairDataset(directory / "cache")
    assert 0 < sum(silent(data[i]) for i in range(len(data))) < PAIRS / 2
    for case, log in alone.items():
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), case


def test_the_example_under_accelerate_launch(directory):
    options = {
        "model": directory / "student", "cache": directory / "cache", "output_dir": directory / "example",
        "beta": 0.1, "beta_teacher": 0.2, "kl_weight": 0.7, "max_steps": 2, "per_device_train_batch_size": 2,
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    script = "examples/multi_gpu/trl_dpo.py"
    finish(launch("ddp", "--num_processes", "2", "--main_process_port", "0", script, *words))
    before, after = (load_file(directory / name / "model.safetensors") for name in ("student", "example"))
    assert before.keys() == after.keys()
    assert all(after[name].isfinite().all() and not torch.equal(after[name], before[name]) for name in before)

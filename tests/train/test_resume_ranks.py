"""bfloat16 on 2 processes, under DDP, FSDP2 and ZeRO-3, both trainers: near one process, and the same when resumed.

Under DDP the parameters are float32 and autocast rounds operands of products. DeepSpeed makes the parameters bfloat16,
and FSDP2 those that a module runs with, so their runs are compared with one process that does so too.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.train import config, trainer
from dadpo_kernels.train.trl import trainer as trl
from tests.models.test_recipes import ROOT, recipe_environment
from tests.support.ranks import needs_deepspeed, run_ranks
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer
from tests.train.test_trl_trainer import SETTINGS

TOKENIZER = tiny_tokenizer()
STEPS, SAVED = 5, 4  # an epoch has 3: what is saved lies in the middle of the second one
LOSS = {"beta_teacher": 0.2, "kl_weight": 0.7}
TRAINERS = {
    "plain": (trainer.DaDPOTrainer, config.DaDPOConfig, {"beta_ref": 0.1}),
    "trl": (trl.TRLDaDPOTrainer, trl.TRLDaDPOConfig, {"beta": 0.1}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, one_thread):
    d = tmp_path_factory.mktemp("resume")
    capture_teacher(tiny_llama(seed=3), TOKENIZER, tokenize_pairs(chat_records(12), TOKENIZER, 64), d / "cache", k=6)
    capture_reference(tiny_llama(seed=5), TOKENIZER, d / "cache")
    for name, seed in (("student", 8), ("another", 9)):
        tiny_llama(seed=seed).save_pretrained(d / name)
        TOKENIZER.save_pretrained(d / name)
    return d


def train(kind: str, directory: Path, out: str, model: str = "student", resume: Path | None = None, **options) -> Any:
    """The log of a run; the parameters go to a file."""
    run = build(kind, directory, out, model, **options)
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    run.save_model(str(directory / out))
    return [entry for entry in run.state.log_history if "loss" in entry]


class FloatCopies(torch.optim.Optimizer):
    """AdamW on float32 copies of bfloat16 parameters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": SETTINGS["learning_rate"]})
        self.parameters = self.param_groups[0]["params"]
        self.copies = [p.detach().float().requires_grad_() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.copies, lr=SETTINGS["learning_rate"], weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for copy, p in zip(self.copies, self.parameters, strict=True):
            copy.grad = p.grad.float()
        self.adamw.step()
        for copy, p in zip(self.copies, self.parameters, strict=True):
            p.copy_(copy)


def build(
    kind: str, directory: Path, out: str, model: str = "student", dtype: torch.dtype = torch.float32, **options
) -> Any:
    trainer_class, config_class, loss = TRAINERS[kind]
    settings = {
        "output_dir": str(directory / out), "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED,
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(directory / model, dtype=dtype)
    return trainer_class(
        loaded,
        args=config_class(**SETTINGS | LOSS | loss | settings | options),
        train_dataset=PairDataset(directory / "cache"),
        processing_class=TOKENIZER,
        optimizers=(None if dtype == torch.float32 else FloatCopies(loaded.parameters()), None),
    )


def train_rank(environment: dict[str, str], directory: Path, engine: str) -> dict[str, Any]:
    os.environ |= environment
    os.chdir(ROOT)
    from tests.support import cpu_engines  # noqa: F401  # accelerate would start FSDP2 on GPUs only

    logs = {}
    for kind in TRAINERS:
        out = f"{engine}-{kind}"
        whole = train(kind, directory, out, bf16=True)
        checkpoint = directory / out / f"checkpoint-{SAVED}"
        logs[kind] = whole, train(kind, directory, f"{out}-resumed", "another", checkpoint, bf16=True)
    return logs


def parameters(directory: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(directory / name / "model.safetensors")


@pytest.fixture(scope="module")
def exact(directory):
    """The logs of one process in float32."""
    return {kind: train(kind, directory, kind, per_device_train_batch_size=4) for kind in TRAINERS}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_bfloat16_and_resuming(directory, exact, engine):
    logs = run_ranks(2, train_rank, recipe_environment(engine), directory, engine)[0]
    stored = torch.bfloat16 if engine == "zero3" else torch.float32
    for kind, (log, resumed_log) in logs.items():
        near, drift = exact[kind], 0.03
        if engine != "ddp":
            near = train(kind, directory, f"{kind}-bfloat16", dtype=torch.bfloat16, gradient_accumulation_steps=2)
            drift = 0.06  # one such process is that far from float32 after 5 steps
            for name in ("loss", "logps/chosen"):  # nothing else is rounded: bfloat16 has 3 digits
                assert log[0][name] == pytest.approx(near[0][name], rel=1e-5)
        whole, resumed = (parameters(directory, f"{engine}-{kind}{end}") for end in ("", "-resumed"))
        for name, value in whole.items():
            assert value.dtype == stored
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        saved = parameters(directory, f"{engine}-{kind}/checkpoint-{SAVED}")
        assert any(not torch.equal(saved[name], value) for name, value in whole.items())
        for want, got in zip(near, log, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=drift)
            assert got["logps/chosen"] == pytest.approx(want["logps/chosen"], rel=0.01)
        assert log[0]["logps/chosen"] != exact[kind][0]["logps/chosen"]
        (again,) = (entry for entry in resumed_log if entry["step"] > SAVED)
        for name in ("loss", "logps/chosen", "rewards/margins", "distill/kl"):
            assert again[name] == log[-1][name], f"{name} of {kind}"


@pytest.mark.parametrize("kind", TRAINERS)
def test_deepspeed_does_not_round_log_probabilities(directory, kind):
    """transformers gives its batches the compute dtype; a sum over an answer in bfloat16 says nothing of a margin."""
    run = build(kind, directory, "rounding")
    batch = next(iter(run.get_train_dataloader()))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    run.is_deepspeed_enabled = True
    run.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    prepared = run._prepare_inputs(batch)
    assert prepared.keys() == batch.keys()
    assert sum(values.is_floating_point() for values in batch.values()) >= 4
    for name, values in batch.items():
        assert prepared[name].dtype == values.dtype, name
        assert torch.equal(prepared[name], values)

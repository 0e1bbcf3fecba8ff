"""What comes before the methods: the pruned student, distilled SFT, teacher and reference caches; each done once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.studies.recovery.settings import SETTINGS, Setting
from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from examples.quickstart.precision import bfloat16_is_fast
from examples.quickstart.prune import DATA, prune
from examples.smollm2 import smollm2_dir

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Stage:
    """Where everything is. `out` also gets `runs/`, one file a run."""

    out: Path
    setting: Setting

    @classmethod
    def of(cls, out: Path, setting: str) -> "Stage":
        return cls(out, SETTINGS[setting])

    @property
    def teacher(self) -> Path:
        return smollm2_dir()

    @property
    def pruned(self) -> Path:
        return self.out / "pruned"

    @property
    def sft(self) -> Path:
        return self.out / "sft"

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    def cache(self, split: str) -> Path:
        return self.out / f"cache-{split}"

    def pairs(self, split: str) -> Dataset:
        """`heldout`; and of the training pairs, `validation` and, all others, `train`."""
        if split == "heldout":
            return Subset(PairDataset(self.cache("heldout")), range(self.setting.heldout))
        pairs = PairDataset(self.cache("train"))
        edge = len(pairs) - self.setting.validation
        return Subset(pairs, range(edge) if split == "train" else range(edge, len(pairs)))


def load(path: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to("cuda") if torch.cuda.is_available() else model


def train(model: Any, tokenizer: Any, pairs: Dataset, out: Path, seed: int, **options: Any) -> None:
    """`DaDPOTrainer` with what all runs share."""
    config = DaDPOConfig(
        output_dir=str(out), seed=seed, data_seed=seed, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.0,
        bf16=bfloat16_is_fast(), logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    DaDPOTrainer(model, config, pairs, processing_class=tokenizer).train()


def prepare(stage: Stage) -> None:
    """Pruning, capture and SFT, as far as they are not there yet."""
    stage.runs.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(stage.teacher)
    prune(stage.teacher, stage.pruned)
    teacher = load(stage.teacher)
    for split in SPLITS:
        pairs = tokenize_pairs(read_pairs(DATA / f"{split}.jsonl"), tokenizer)
        capture_teacher(teacher, tokenizer, pairs, stage.cache(split), k=stage.setting.k, progress=True)
    if not (stage.sft / "config.json").exists():
        student = load(stage.pruned)
        train(
            student, tokenizer, stage.pairs("train"), stage.out / "logs-sft", seed=0, sft_weight=1.0,
            learning_rate=3e-4, num_train_epochs=1, per_device_train_batch_size=8,
        )  # fmt: skip
        student.save_pretrained(stage.sft)
    reference = load(stage.sft)
    for split in SPLITS:
        capture_reference(reference, tokenizer, stage.cache(split), progress=True)

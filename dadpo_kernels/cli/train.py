"""Trains a student from a cache of teacher targets.

The configuration is a YAML file. Its keys are those of transformers' TrainingArguments and the ones below; `--key
value` after the file overrides one of them. An interrupted run continues from its last checkpoint."""

import argparse
import difflib
import json
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..train.options import LossOptions


@dataclass
class TrainSources:
    """The model to train, and the data."""

    model: str = field(metadata={"help": "The student: a directory or a name on the hub."})
    cache: str = field(metadata={"help": "Directory of `dadpo teacher` to train on."})
    eval_cache: str | None = field(default=None, metadata={"help": "Directory of `dadpo teacher` to evaluate on."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the hub."})
    weights_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the parameters; for mixed precision keep float32 and set bf16."},
    )


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="override keys of the file")
    lines = "\n".join(map(_describe, [*fields(TrainSources), *fields(LossOptions)])).replace("%", "%%")
    parser.epilog = f"keys in addition to those of TrainingArguments:\n{lines}"


def _describe(option: Field) -> str:
    choices = get_args(option.type) if get_origin(option.type) is Literal else ()
    return f"  {option.name:<16} {option.metadata['help']}" + (f" One of {', '.join(choices)}." if choices else "")


def parse_config(path: Path, overrides: list[str]) -> tuple[TrainSources, Any]:
    """Read `(TrainSources, DaDPOConfig)` from a YAML file and `--key value` overrides.

    Raises:
        ValueError: the file is not a mapping, a key is unknown (the message names the most similar one), or a value
            has the wrong type.
    """
    import yaml
    from transformers import HfArgumentParser

    from ..train.config import DaDPOConfig

    # Read the file, and refuse unknown keys.
    settings = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not hold `key: value` lines")
    known = {f.name for f in [*fields(TrainSources), *fields(DaDPOConfig)] if f.init}
    given = [word[2:].split("=")[0].replace("-", "_") for word in overrides if word.startswith("--")]
    for key in [*settings, *given]:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else f" in {path}"))

    # Parse the values as command line arguments: that checks their types, and reads 1e-4 as a number, unlike YAML.
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    groups: list[Any] = [TrainSources, DaDPOConfig]
    parser = HfArgumentParser(groups, allow_abbrev=False)

    def refuse(message: str) -> None:
        raise ValueError(f"{path}: {message}")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    sources, config = parser.parse_args_into_dataclasses(args=[*words, *overrides])
    return sources, config


def run(args: argparse.Namespace) -> int:
    sources, config = parse_config(args.config, args.overrides)

    from transformers import AutoModelForCausalLM, set_seed

    from ..cache.dataset import PairDataset
    from ..capture.load import load_tokenizer
    from ..train.trainer import DaDPOTrainer

    # Load the model and the data.
    set_seed(config.seed)
    tokenizer = load_tokenizer(sources.model, revision=sources.revision)
    model = AutoModelForCausalLM.from_pretrained(sources.model, revision=sources.revision, dtype=sources.weights_dtype)
    vocab_size = model.get_output_embeddings().out_features  # not from the weight, which may be sharded

    def pairs(cache: str) -> PairDataset:
        return PairDataset(cache, tokenizer=tokenizer, vocab_size=vocab_size, require_reference=config.beta_ref > 0)

    evaluation = pairs(sources.eval_cache) if sources.eval_cache else None

    # Train, from the last checkpoint if there is one.
    trainer = DaDPOTrainer(model, config, pairs(sources.cache), evaluation, tokenizer)
    metrics = trainer.train(config.resume_from_checkpoint or trainer.last_checkpoint()).metrics
    if trainer.tokens_seen:  # else the run was stopped after its last step, and these are no metrics of it
        metrics["tokens_per_second"] = trainer.tokens_seen / metrics["train_runtime"]
        trainer.save_metrics("train", metrics, combined=False)

    # Evaluate and save.
    if evaluation is not None:
        results = trainer.evaluate()
        trainer.save_metrics("eval", results, combined=False)
        trainer.log_metrics("eval", results)
    trainer.save_state()
    trainer.save_model()
    return 0

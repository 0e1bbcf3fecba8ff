"""Trains a student from a cache of teacher targets.

The configuration is a YAML file. Its keys are those of transformers' TrainingArguments and the ones below; `--key
value` after the file overrides one of them. An interrupted run continues from its last whole checkpoint; a finished
one stays as it is."""

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
    weights_dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = field(
        default="float32",
        metadata={"help": "Dtype of the parameters (auto: as saved); for mixed precision keep float32 and set bf16."},
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
    from transformers import HfArgumentParser

    from ..train.config import DaDPOConfig
    from .yaml_file import read_settings

    # Read the file, and refuse unknown keys.
    settings = read_settings(path)
    known = {f.name: f for f in [*fields(TrainSources), *fields(DaDPOConfig)] if f.init}
    given = [word[2:].split("=")[0].replace("-", "_") for word in overrides if word.startswith("--")]
    for key in [*settings, *given]:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else f" in {path}"))

    # Parse the values as command line arguments: that checks their types, and reads 1e-4 as a number, unlike YAML.
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool) and "bool" not in str(known[key].type):
            raise ValueError(f"{path}: {key} is no yes or no, which YAML reads {value} for: write the word in quotes")
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

    from accelerate.utils import broadcast_object_list
    from transformers import set_seed

    from ..cache.dataset import PairDataset
    from ..train.trainer import DaDPOTrainer
    from .finished import LENGTH, differences, record_finished, settings_of
    from .model_args import is_first_process

    # Load the model and the data.
    set_seed(config.seed)
    tokenizer, model = _load(sources)
    vocab_size = model.get_output_embeddings().out_features  # not from the weight, which may be sharded

    def pairs(cache: str) -> PairDataset:
        return PairDataset(cache, tokenizer=tokenizer, vocab_size=vocab_size, require_reference=config.beta_ref > 0)

    training, evaluation = pairs(sources.cache), pairs(sources.eval_cache) if sources.eval_cache else None
    try:
        trainer = DaDPOTrainer(model, config, training, evaluation, tokenizer)
    except RuntimeError as error:  # the library of a report_to is not installed
        raise ValueError(str(error)) from error

    # What is there: a finished run, or checkpoints.
    out = Path(config.output_dir)
    settings = settings_of(sources, config, training, evaluation)
    answer = [differences(out, settings) if trainer.is_world_process_zero() else None]
    broadcast_object_list(answer)
    changed = answer[0] if config.resume_from_checkpoint is None else None
    if changed == {}:
        if is_first_process():
            print(f"{out} holds the finished run of these settings: nothing to do")
        return 0
    if others := [text for name, text in (changed or {}).items() if name not in LENGTH]:
        raise ValueError(f"{out} holds a finished run, whose {others[0]}: choose another output_dir, or delete it")
    checkpoint = config.resume_from_checkpoint or trainer.last_checkpoint()
    if changed and checkpoint is None:
        raise ValueError(
            f"{out} holds a finished run, whose {' and '.join(changed.values())}, and no checkpoint to go on from: "
            "choose another output_dir, or delete it"
        )

    # Train, evaluate and save.
    metrics = trainer.train(checkpoint).metrics
    if trainer.tokens_seen:  # else the run was stopped after its last step, and these are no metrics of it
        metrics["tokens_per_second"] = trainer.tokens_seen / metrics["train_runtime"]
        trainer.save_metrics("train", metrics, combined=False)
    if evaluation is not None:
        results = trainer.evaluate()
        trainer.save_metrics("eval", results, combined=False)
        trainer.log_metrics("eval", results)
    trainer.save_state()
    trainer.save_model()
    if config.should_save:
        record_finished(out, settings)
    return 0


def _load(sources: TrainSources) -> tuple[Any, Any]:
    """The student's tokenizer and the student."""
    from transformers import AutoModelForCausalLM

    from ..capture.load import load_tokenizer, loading

    if sources.revision is not None and Path(sources.model).is_dir():
        raise ValueError(f"revision={sources.revision!r} is for models on the hub, and {sources.model} is a directory")
    load: Any = AutoModelForCausalLM.from_pretrained
    tokenizer = load_tokenizer(sources.model, revision=sources.revision)
    with loading(sources.model):
        model, report = load(
            sources.model, revision=sources.revision, dtype=sources.weights_dtype, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{sources.model} has no {missing[0]} (and {len(missing) - 1} other parameters are missing), which would "
            "be random: save the whole model"
        )
    return tokenizer, model

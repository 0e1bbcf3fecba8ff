"""What a finished `dadpo train` records in its output_dir, and what a second one makes of it."""

import hashlib
import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train.checkpoints import LIST, CheckpointError, read_list, write_list

if TYPE_CHECKING:
    from ..cache.dataset import PairDataset
    from ..train.config import DaDPOConfig
    from .train import TrainSources

logger = logging.getLogger("dadpo_kernels")

LENGTH = {"max_steps", "num_train_epochs"}  # a run that is to be longer goes on from its last checkpoint
# Options that do not change what is trained, by the beginnings of their names.
_FREE = (
    "dataloader_", "ddp_", "disable_tqdm", "do_", "hub_", "local_rank", "log_", "logging_", "output_dir", "project",
    "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "skip_memory_metrics", "trackio_", "use_cpu",
)  # fmt: skip


def settings_of(sources: "TrainSources", config: "DaDPOConfig", *caches: "PairDataset | None") -> dict[str, Any]:
    """What makes a run this run: its options, and the content of its caches."""
    options = asdict(sources) | {option.name: getattr(config, option.name) for option in fields(config)}
    shards = [[shard.sha256 for shard in cache.manifest.shards] for cache in caches if cache is not None]
    settings = {name: value for name, value in options.items() if not name.startswith(_FREE)}
    settings["content of the caches"] = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    return json.loads(json.dumps(settings, default=str))


def record_finished(out: Path, settings: dict[str, Any]) -> None:
    """List the files of a finished run, its checkpoints apart. `settings` are of `settings_of`."""
    write_list(out, (path for path in out.iterdir() if path.is_file()), settings=settings)


def differences(out: Path, settings: dict[str, Any]) -> dict[str, str] | None:
    """Of a finished run: each setting that is another one now, with both values. None: there is no finished run."""
    if not (out / LIST).is_file():
        return None
    try:
        recorded = read_list(out).get("settings", {})
    except CheckpointError as error:
        logger.warning("The finished run is made again, as far as it must be: %s", error)
        return None
    return {
        name: f"{name} was {recorded.get(name)!r} and is {settings.get(name)!r} now"
        for name in dict.fromkeys((*recorded, *settings))
        if recorded.get(name) != settings.get(name)
    }

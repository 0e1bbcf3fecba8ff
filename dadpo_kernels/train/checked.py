"""What both trainers do beyond transformers' Trainer so that no run goes wrong without a word."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from .checkpoints import LIST, CheckpointError, check_resumable, checkpoints, write_list
from .finite import FiniteSteps, check_parameters, pair_names

logger = logging.getLogger("dadpo_kernels")


class CheckedTrainer(Trainer):
    """A Trainer that stops where numbers are not finite (`NonFiniteError`), saves none that are not, and resumes from
    whole checkpoints only.

    A subclass calls `_watch` with the loss of each micro-batch that it trains on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finite = FiniteSteps(self)
        self.add_callback(_Checks(self._finite))

    def _watch(self, loss: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """The loss of a micro-batch, before its backward."""
        self._finite.add(loss, pair_names(inputs, self.processing_class))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's; `resume_from_checkpoint=True` is the last checkpoint that is whole.

        Raises:
            CheckpointError: the checkpoint is damaged, incomplete, of another model, or of more steps than this run;
                or there is none.
            NonFiniteError: the loss or the gradient of a step is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_checkpoint()
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        elif resume_from_checkpoint and (fault := self.fault(check_resumable, resume_from_checkpoint)):
            raise CheckpointError(f"resume_from_checkpoint: {fault}")
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint in `output_dir` that is whole, the same on all ranks; others are logged with what they
        lack."""
        paths = [checkpoints(self.args.output_dir or "")]
        broadcast_object_list(paths)
        for path in paths[0]:
            fault = self.fault(check_resumable, path)
            if fault is None:
                return path
            logger.warning("A checkpoint is skipped: %s", fault)
        return None

    def fault(self, check: Callable[..., Any], *args: Any) -> str | None:
        """The message of the error that `check(*args)` raises, on the first rank where it does; else None.

        All ranks call it, and the first one of each node checks.
        """
        message: str | None = None
        if self.args.local_process_index == 0:
            try:
                check(*args)
            except (OSError, ValueError) as error:
                message = str(error)
        return next((fault for fault in gather_object([message]) if fault is not None), None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, which would train one more step of a run that has made all its steps."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is no metric of the evaluation: choose "
                f"one of {', '.join(metrics)}"
            ) from error

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The parent's, then the list of its files; only then are older checkpoints deleted."""
        run = self._get_output_dir(trial)
        directory = Path(run) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (directory / LIST).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with _writing(directory):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # other ranks write files too
        if self.args.should_save:
            write_list(directory, optimizer=not self.args.save_only_model)
            rotate_checkpoints(run, limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's.

        Raises:
            CheckpointError: the files cannot be written.
            NonFiniteError: a parameter is not finite.
        """
        model: Any = self.model
        check_parameters(model, self)
        with _writing(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{resume_from_checkpoint} is not a checkpoint of this model, choose another output_dir: {error}"
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Instead of the parent's warnings: parameters that are missing or too many are another model's."""
        model: Any = self.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = {id(p) for name, p in parameters.items() if name not in load_result.missing_keys}
        missing = [
            name for name in load_result.missing_keys if id(parameters.get(name)) not in loaded
        ]  # not tied ones
        if different := [*missing, *load_result.unexpected_keys]:
            raise CheckpointError(
                f"the checkpoint is not one of this model, choose another output_dir: {different[0]} and "
                f"{len(different) - 1} other parameters are missing or unknown"
            )


@contextmanager
def _writing(directory: Any) -> Iterator[None]:
    """torch and safetensors raise errors of their own where a file cannot be written."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error


class _Checks(TrainerCallback):
    def __init__(self, finite: FiniteSteps) -> None:
        self._finite = finite

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > state.max_steps:
            raise CheckpointError(
                f"the checkpoint has made {state.global_step} steps and this run has {state.max_steps}: raise "
                "max_steps or num_train_epochs, or choose another checkpoint or output_dir"
            )
        self._finite.watch(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finite.check_losses()

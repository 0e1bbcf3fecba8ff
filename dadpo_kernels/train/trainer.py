"""The minimal trainer: transformers.Trainer, with all it has for precision and checkpoints, and the fused loss."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..cache.dataset import PairCollator, PairDataset
from ..cache.sampler import ShardSampler
from ..losses.linear_loss import DaDPOOutput, pair_counts
from ..losses.targets import TeacherTargets
from ..models.distributed import check_head, check_parallelism, loss_in_forward, mask_repeated_pairs
from ..ops.head import Head
from .arguments import Refused, check_options, named_sets
from .checked import CheckedTrainer
from .config import DaDPOConfig
from .live_metrics import LiveMetrics

_LOSS = "the loss is that of the options of DaDPOConfig, without logits: leave it out"
# Of Trainer.__init__.
REFUSED_ARGUMENTS = {
    "compute_loss_func": Refused(_LOSS),
    "compute_metrics": Refused("evaluate() gives the loss's own metrics, without predictions: leave it out"),
    "model_init": Refused("the head is checked before training: pass the model"),
    "preprocess_logits_for_metrics": Refused(_LOSS),
}


class DaDPOTrainer(CheckedTrainer):
    """Trains a causal LM on pairs with cached teacher targets; `model(...).logits` is never computed.

    The loss of an optimizer step is that of all its pairs together: the gradients of its micro-batches add up to the
    big batch's gradient exactly, whatever their lengths. Metrics carry TRL's names and are means over the pairs (or
    tokens) of each step, averaged over the steps since the last log; evaluation averages over the whole set.

    Under `accelerate launch` (DDP, FSDP2, DeepSpeed ZeRO) the pairs of a step are those of all ranks, and its loss,
    gradients and metrics are those of one process with all of them, whatever the ranks' shares of tokens.

    A cache is shuffled by `ShardSampler`, so that a large one is read shard by shard, in an order that depends on the
    seed and the epoch alone; `train_sampling_strategy` names others.

    Args:
        model: a transformers causal LM whose head is a plain linear layer. Keep its parameters in float32 and set
            `bf16=True` for mixed precision: AdamW loses small updates of bfloat16 parameters.
        args: DaDPOConfig; batch sizes count pairs.
        train_dataset: PairDataset.
        eval_dataset: PairDataset, or a dictionary of several, whose metrics are named `eval_{name}_loss` and so on.
        processing_class: the student's tokenizer, for the padding token; saved with the model.

    Raises:
        TypeError: `args` is a plain TrainingArguments.
        ValueError: options that contradict each other or an argument of Trainer that would have no effect
            (`REFUSED_ARGUMENTS`), a head that `lm_head` refuses, a router loss, a dataset without the targets the
            options need, or a parallel wrapper that is not supported (FSDP1, DataParallel, tensor parallelism).
    """

    args: DaDPOConfig
    loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        args: DaDPOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DaDPOConfig):
            raise TypeError(f"args is a {type(args).__name__}: pass a DaDPOConfig, which has all its options")
        check_options(kwargs, dict.fromkeys(REFUSED_ARGUMENTS), REFUSED_ARGUMENTS)
        check_head(model)
        self.linear_loss = args.loss()
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            raise ValueError(
                "model.config.output_router_logits=True asks for the router loss of a mixture of experts, which is no "
                "part of this loss: set it to False, or train with TRLDaDPOTrainer"
            )
        _check_sets(args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        pad = getattr(processing_class, "pad_token_id", None)
        if pad is None:
            pad = getattr(processing_class, "eos_token_id", None) or 0  # never attended to: any id serves
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = PairCollator(pad)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                         processing_class=processing_class, **kwargs)  # fmt: skip
        check_parallelism(self.accelerator, args.n_gpu)
        self._shard_sampler: ShardSampler | None = None
        self.add_callback(_SetPosition(self))
        # Rejected answers are not even read by a stage that has no use for them.
        alone = isinstance(train_dataset, PairDataset) and not train_dataset.has_rejected
        self.chosen_only = not _uses_rejected(args) or alone
        self.uses_teacher = bool(args.beta_teacher or args.kl_weight)
        self.tokens_seen = 0
        self._metrics: dict[str, Tensor] = {}
        self._metrics_since = 0
        self._live = LiveMetrics(args.grad_tolerance, self._sum_of_ranks, self.accelerator.device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, PairDataset) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._shard_sampler = ShardSampler(dataset, seed=seed, num_replicas=1, rank=0)  # accelerate deals out batches
        return self._shard_sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of a step, and what its loss is a mean over: `pair_counts` of them all, on all ranks.

        Divided by the number of ranks, because parallel wrappers average gradients.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        mask_repeated_pairs(batches[-1], self.args.process_index, self.accelerator.gradient_state.active_dataloader)
        counts = [pair_counts(batch["labels"]) for batch in batches]
        tokens = [self._rows_used(batch["attention_mask"]).sum()[None] for batch in batches]
        of_this_rank = torch.cat([torch.stack(counts), torch.stack(tokens)], 1).sum(0)
        of_all_ranks = self._sum_of_ranks(of_this_rank.to(device))
        self.tokens_seen += int(of_all_ranks[3])
        return batches, of_all_ranks[:3] / self.args.world_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; `num_items_in_batch` holds the counts of the whole step."""
        labels = inputs["labels"]
        ids, attention_mask = (self._rows_used(inputs[name]) for name in ("input_ids", "attention_mask"))
        if self.chosen_only:
            labels = labels.clone()
            labels[len(ids) :] = -100

        def loss(hidden: Tensor, head: Head) -> DaDPOOutput:
            if self.chosen_only:
                hidden = nn.functional.pad(hidden, (0, 0, 0, 0, 0, len(labels) - len(ids)))
            return self.linear_loss(
                hidden,
                head,
                labels,
                ref_logps=inputs.get("ref_logps"),
                teacher=TeacherTargets.from_batch(inputs) if self.uses_teacher else None,
                counts=num_items_in_batch if isinstance(num_items_in_batch, Tensor) else None,
            )

        inner: Any = self.model
        with self.accelerator.autocast():
            out = loss_in_forward(model, inner, {"input_ids": ids, "attention_mask": attention_mask}, loss)
        metrics = {k: v for k, v in out.metrics.items() if not (self.chosen_only and k.startswith("logps/"))}
        if model.training:
            self._watch(out.loss, inputs)
            for name, value in metrics.items():
                self._metrics[name] = self._metrics.get(name, 0) + value
        return (out.loss, metrics) if return_outputs else out.loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """To the device, and no more: under DeepSpeed the parent rounds all floats to the compute dtype, here
        log-probabilities."""
        return send_to_device(inputs, self.args.device)

    def _rows_used(self, rows: Tensor) -> Tensor:
        return rows.chunk(2)[0] if self.chosen_only else rows

    def _sum_of_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def _mean_of_ranks(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every rank divides by its share of the step's counts, so the mean over ranks is the step's."""
        if not metrics:
            return {}
        total = self._sum_of_ranks(torch.stack([*metrics.values()]))
        return dict(zip(metrics, total / self.args.world_size, strict=True))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; what the live plan reports of its backward joins the metrics, weighted by tokens."""
        with self._live.collect():
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last training log, averaged over its steps."""
        if "loss" in logs:
            steps = self.state.global_step - self._metrics_since
            logs |= {k: float(v) / max(1, steps) for k, v in self._mean_of_ranks(self._metrics).items()}
            self._metrics, self._metrics_since = {}, self.state.global_step
            logs |= self._live.pop()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics over the whole set: the same numbers whatever the batch size. Logs and returns them.

        Raises:
            ValueError: a set without the targets the options need, or under DeepSpeed before `train`, which starts the
                wrapper that holds the parameters.
        """
        if isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # calls this for each of its sets
        self._memory_tracker.start()
        _check_sets(self.args, train_dataset=self.train_dataset, eval_dataset=eval_dataset)
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise ValueError(
                "evaluate() before train() has no DeepSpeed engine to run on: set eval_on_start, or evaluate "
                "without DeepSpeed"
            )
        loader = self.get_eval_dataloader(eval_dataset)
        # A parallel wrapper that shards the model gathers it only inside its own forward.
        model: Any = self.model_wrapped
        training = model.training
        model.eval()
        counts = torch.stack([pair_counts(batch["labels"]) for batch in self._whole_set(loader)]).sum(0)
        counts = self._sum_of_ranks(counts) / self.args.world_size
        sums: dict[str, Tensor] = {}
        for batch in self._whole_set(loader):
            loss, metrics = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=counts)
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0) + value
        model.train(training)
        results = {f"{metric_key_prefix}_{k}": float(v) for k, v in self._mean_of_ranks(sums).items()}
        self.log(results)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        self._memory_tracker.stop_and_update_metrics(results)
        return results

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: predictions would be logits, which this trainer never computes."""
        raise ValueError(
            "predict() would return logits, which this trainer never computes: evaluate() gives the loss and metrics "
            "of a data set"
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The parent's, which would give a set of its own the last one's loader if workers are persistent."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        return self.get_test_dataloader(eval_dataset)

    def _whole_set(self, loader: Any) -> Iterator[dict[str, Tensor]]:
        """This rank's batches, in which no pair that another rank has counts again."""
        for batch in loader:
            mask_repeated_pairs(batch, self.args.process_index, loader)
            yield batch


def _uses_rejected(args: DaDPOConfig) -> bool:
    return bool(args.beta_ref or args.beta_teacher or (args.kl_weight and args.kl_on != "chosen"))


def _check_sets(args: DaDPOConfig, **sets: Any) -> None:
    """What can be known of data sets before the first batch."""
    pairs = {name: dataset for name, dataset in named_sets(**sets).items() if isinstance(dataset, PairDataset)}
    alone = [name for name, dataset in pairs.items() if not dataset.has_rejected]
    on_rejected = args.beta_ref or args.beta_teacher or (args.kl_weight and args.kl_on == "rejected")
    if alone and on_rejected:
        raise ValueError(
            f"{alone[0]} has no rejected answers, and beta_ref={args.beta_ref}, beta_teacher={args.beta_teacher}, "
            f"kl_on={args.kl_on!r} need them: train on pairs, or with sft_weight and kl_weight alone"
        )
    if alone and len(alone) < len(pairs) and _uses_rejected(args):
        raise ValueError(
            f"{', '.join(alone)} has no rejected answers, and another set has: set kl_on='chosen' for both"
        )
    for name, dataset in pairs.items():
        if args.beta_ref and not dataset.has_reference:
            raise ValueError(
                f"{name} has no reference log-probabilities and beta_ref={args.beta_ref}: run `dadpo reference` "
                "on its cache, or set beta_ref=0"
            )


class _SetPosition(TrainerCallback):
    """Begin anew to count, after a resume or an attempt of `auto_find_batch_size`; and set the sampler's epoch, which
    accelerate does not do for a multi-rank resume in the middle of an epoch."""

    def __init__(self, trainer: DaDPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._metrics, trainer._metrics_since, trainer.tokens_seen = {}, state.global_step, 0
        trainer._live.pop()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._shard_sampler is not None:
            self._trainer._shard_sampler.set_epoch(int(state.epoch))

"""TRL's `DPOTrainer` (1.16) on the fused primitive, with a teacher.

Two seams, and everything else is TRL's. *Below*: TRL's trainer asks its model for per-token log-probabilities by
`model(..., labels=labels, fused_lm_head=True)`; that forward is ours. *Above*: with `beta = beta_ref + beta_teacher`,
daDPO is DPO against the reference log-probabilities `(beta_ref ref + beta_teacher teacher) / beta`, so a batch that
brings these gives every loss type, f-divergence and weighting of TRL its teacher term. The token-level divergence is
then added to TRL's loss.
"""

import copy
import functools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model, send_to_device
from datasets import is_caching_enabled
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import create_model_from_path

from ...losses.divergence import check_divergence_options, topk_divergence
from ...losses.linear_loss import pair_counts
from ...losses.options import Sides
from ...losses.targets import TeacherTargets
from ...ops.run import Run
from ...ops.selected_logps import SelectedLogps
from ..arguments import RANGES, REFUSED, Range, Refused, check_options, check_ranges, defaults_of, named_sets
from ..checked import CheckedTrainer
from ..live_metrics import LiveMetrics
from ..options import TeacherOptions
from .dataset import PairPreferenceCollator, as_trl_dataset, cached_pairs
from .head import FusedSelectedOutput, add_fused_lm_head, instead_of_trls, run_fused

_TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
_BY_LENGTH = ("group_by_length", "batch_rebalance")  # values of train_sampling_strategy


def _for_losses(*losses: str) -> Refused:
    return Refused(
        f"it is for loss_type {', '.join(losses)}: choose one of these, or leave it out",
        lambda options: not {*losses}.isdisjoint(options["loss_type"]),
    )


def _together_with(option: str, value: Any = True) -> Refused:
    return Refused(f"it needs {option}={value!r}: set this, or leave it out", lambda options: options[option] == value)


# Of DPOConfig.
REFUSED_OPTIONS = REFUSED | {
    "discopop_tau": _for_losses("discopop"),
    "f_alpha_divergence_coef": _together_with("f_divergence_type", "alpha_divergence"),
    "label_smoothing": _for_losses("exo_pair", "robust", "aot", "aot_unpaired"),
    "length_column_name": Refused(
        f"it is for train_sampling_strategy {', '.join(_BY_LENGTH)}: choose one of these, or leave it out",
        lambda options: options["train_sampling_strategy"] in _BY_LENGTH,
    ),
    "padding_free": Refused("TRL pads all the same: set it to False"),
    "precompute_ref_batch_size": _together_with("precompute_ref_log_probs"),
    "ref_model_mixup_alpha": _together_with("sync_ref_model"),
    "ref_model_sync_steps": _together_with("sync_ref_model"),
    "sync_ref_model": Refused("beta=0 uses no reference: set it to False", lambda options: options["beta"] > 0),
}
_RANGES = {
    "dataset_num_proc": Range(1),
    "ld_alpha": Range(0, 1),
    "max_length": Range(1),
    "pad_to_multiple_of": Range(1),
    "precompute_ref_batch_size": Range(1),
    "ref_model_mixup_alpha": Range(0, 1),
    "ref_model_sync_steps": Range(1),
    "router_aux_loss_coef": Range(0),
}


@dataclass
class TRLDaDPOConfig(TeacherOptions, DPOConfig):
    """TRL's DPOConfig and the teacher. `beta` is the strength of the reference, as in TRL (`beta_ref` elsewhere here).

    With `beta_teacher=0` and `kl_weight=0` it is DPOConfig, without the options of it that TRL would accept and ignore
    (`REFUSED_OPTIONS`).
    """

    token_metrics: bool = field(
        default=True,
        metadata={
            "help": "Log TRL's entropy, logits/* and mean_token_accuracy: one more product with the LM head a step."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(vars(self), defaults_of(TRLDaDPOConfig), RANGES | _RANGES)
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run, and is never logged as another
        super().__post_init__()
        check_options(vars(self), defaults_of(TRLDaDPOConfig), REFUSED_OPTIONS)
        Run(self.backend, self.memory_budget, self.grad_tolerance)  # checks them
        check_divergence_options(self.divergence, self.support, self.js_mix, self.kd_temperature)
        for name in ("beta", "beta_teacher", "kl_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.kl_on not in get_args(Sides):
            raise ValueError(f"unknown kl_on {self.kl_on!r}: choose one of {', '.join(get_args(Sides))}")
        if self.beta + self.beta_teacher == 0:
            raise ValueError(
                "beta and beta_teacher are both 0, which leaves no preference: make one of them positive, or distil "
                "with dadpo_kernels.DaDPOTrainer"
            )


class TRLDaDPOTrainer(CheckedTrainer, DPOTrainer):
    """TRL's DPOTrainer with our log-probabilities underneath and a teacher on top.

    All of TRL's arguments, options and metrics keep their meaning. Datasets may be TRL's, or `PairDataset`s: teacher
    caches, whose pairs are tokenized already. A cache with reference log-probabilities (`dadpo reference`) needs no
    reference model, and none is loaded; else TRL's is used (a copy of the model, a given `ref_model`, or with PEFT the
    model without its adapter). Text with columns `ref_chosen_logps` and `ref_rejected_logps` needs
    `precompute_ref_log_probs=True`. The teacher's terms need caches.

    The divergence is a mean over the answer tokens of the whole optimizer step, across micro-batches and processes:
    micro-batches with few tokens do not count more (in evaluation, it is a mean over each batch of all processes).
    TRL's own terms are means over pairs, as in TRL. Further metrics: `distill/kl`, `distill/teacher_mass` and
    `distill/student_mass` (the masses of the top-k), means over tokens.

    Raises:
        TypeError: `args` is a plain DPOConfig.
        ValueError: options, datasets or a `ref_model` that contradict each other, or a head that `lm_head` refuses.
    """

    args: TRLDaDPOConfig
    model: nn.Module
    _signature_columns: Any

    _tag_names = ["trl", "dpo", "dadpo"]  # noqa: RUF012  # as in TRL
    _name = "daDPO"
    _paper = {  # noqa: RUF012
        "title": "daDPO: Distribution-Aware DPO for Distilling Conversational Abilities",
        "id": "2506.15717",
        "citation": textwrap.dedent("""\
            @inproceedings{zhang-etal-2025-dadpo,
                title     = {{daDPO: Distribution-Aware DPO for Distilling Conversational Abilities}},
                author    = {Zhengze Zhang and Shiqi Wang and Yiqun Shen and Simin Guo and Dahua Lin and Xiaoliang Wang and Nguyen Cam-Tu and Fei Tan},
                year      = 2025,
                booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
                url       = {https://aclanthology.org/2025.findings-acl.796/},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TRLDaDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = TRLDaDPOConfig()
        if not isinstance(args, TRLDaDPOConfig):
            raise TypeError(f"args is a {type(args).__name__}: pass a TRLDaDPOConfig, which has all of DPOConfig's")
        if ref_model is not None and args.beta == 0:
            raise ValueError("ref_model is given, and beta=0 uses no reference: leave ref_model out, or set beta")
        if args.model_init_kwargs and not isinstance(model, str):
            raise ValueError(
                f"model_init_kwargs={args.model_init_kwargs!r} are for loading a model, and model is loaded already: "
                "leave them out, or pass its name"
            )
        self._ref_model_given = ref_model is not None
        sets = named_sets(train_dataset=train_dataset, eval_dataset=eval_dataset)
        for name, data in sets.items():
            _check_dataset(name, data, args, self._ref_model_given)
            if args.precompute_ref_log_probs and args.beta and _is_cache(data) and not _has_reference(data):
                raise ValueError(
                    f"precompute_ref_log_probs=True cannot add to a cache, and that of {name} has no reference "
                    "log-probabilities: run `dadpo reference` on it, or set precompute_ref_log_probs=False"
                )
        # TRL's trainer with our head and, where a cache has reference log-probabilities, without a reference model.
        ours: dict[str, Any] = {
            "add_fused_lm_head": functools.partial(
                add_fused_lm_head,
                token_metrics=args.token_metrics,
                run=Run(args.backend, args.memory_budget, args.grad_tolerance),
            )
        }
        if args.beta == 0 or all(_is_cache(data) and _has_reference(data) for data in sets.values()):
            args = copy.copy(args)
            args.precompute_ref_log_probs = True  # TRL then keeps no reference model
            ours["create_model_from_path"] = self._load_policy_only
        with instead_of_trls(**ours):
            super().__init__(
                model,
                ref_model,
                args,
                data_collator,
                as_trl_dataset(train_dataset),
                as_trl_dataset(eval_dataset),
                **kwargs,
            )
        if data_collator is None and not self._is_vision_dataset:
            self.data_collator = PairPreferenceCollator(self.data_collator)
        self.beta = args.beta + args.beta_teacher
        self._step_counts: Tensor | None = None
        reduce = functools.partial(self.accelerator.reduce, reduction="sum")
        self._live = LiveMetrics(args.grad_tolerance, reduce, self.accelerator.device)

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first:
            self._signature_columns.append("position")

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Caches are tokenized: TRL would look for text in them."""
        return dataset if _is_cache(dataset) else super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Not what is there already, nor what nobody needs.

        Raises:
            ValueError: under FSDP with PEFT, whose model is not where its batches are before training; or on several
                processes without a file that passes the result from the first to the others.
        """
        if self.args.beta == 0 or _is_cache(dataset) or _has_reference(dataset):
            return dataset
        if self.is_fsdp_enabled and self.ref_model is None:
            raise ValueError(
                "precompute_ref_log_probs=True needs a model of its own for the reference under FSDP: pass ref_model, "
                "or set precompute_ref_log_probs=False"
            )
        if self.accelerator.num_processes > 1 and not (is_caching_enabled() and getattr(dataset, "cache_files", True)):
            raise ValueError(
                f"precompute_ref_log_probs=True on {self.accelerator.num_processes} processes passes its result by a "
                "file beside those of the data set, and this one is in memory: save it with save_to_disk and load it "
                "with load_from_disk (with datasets.enable_caching()), or set precompute_ref_log_probs=False"
            )
        # TRL asks for the truth of its reference, which a compiled module does not have.
        reference, self.ref_model = self.ref_model, getattr(self.ref_model, "_orig_mod", self.ref_model)
        try:
            return super()._precompute_ref_logps(dataset, *args, **kwargs)
        finally:
            self.ref_model = reference

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """TRL's, of log-probabilities that no engine has rounded."""
        return super().compute_ref_log_probs(functools.partial(run_fused, model), inputs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Also counts what the step's divergence is a mean over: `pair_counts`, over micro-batches and processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.kl_weight and batches:
            counts = torch.stack([_counts(batch["completion_mask"]) for batch in batches]).sum(0)
            self._step_counts = self.accelerator.reduce(counts.to(device), "sum")
        return batches, items

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's; for caches without what it does to text and to missing reference log-probabilities."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, *args, **kwargs)
        for name, data in named_sets(eval_dataset=eval_dataset).items():
            _check_dataset(name, data, self.args, self._ref_model_given)
        if isinstance(eval_dataset, dict) or _is_cache(eval_dataset):  # of a dictionary, transformers evaluates each
            return super(DPOTrainer, self).evaluate(as_trl_dataset(eval_dataset), *args, **kwargs)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, also of caches; without predictions, which would be incomplete.

        Raises:
            ValueError: `prediction_loss_only=False`.
        """
        if not self.args.prediction_loss_only:
            raise ValueError(
                "predict() would return logits of 2 rows per pair, of which transformers drops some, as if there were "
                "one: call evaluate(), or set prediction_loss_only=True"
            )
        _check_dataset("test_dataset", test_dataset, self.args, self._ref_model_given)
        output = super().predict(as_trl_dataset(test_dataset), *args, **kwargs)
        self._metrics["eval"].clear()  # the next evaluation would average over them too
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The parent's, which would give a set of its own the last one's loader if workers are persistent."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        return self.get_test_dataloader(eval_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """TRL's; but under DeepSpeed log-probabilities are not rounded to the compute dtype."""
        names = (*TeacherTargets.columns(), "ref_chosen_logps", "ref_rejected_logps")
        logps = {name: inputs[name] for name in names if name in inputs}
        return super()._prepare_inputs(inputs) | send_to_device(logps, self.args.device)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        result = self._loss(model, inputs, return_outputs)
        if self.model.training:
            self._watch(result[0] if return_outputs else result, inputs)
        return result

    def _loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # The teacher and the reference, as TRL's loss takes them.
        inputs = dict(inputs)
        uses_teacher = bool(self.args.beta_teacher or self.args.kl_weight)
        teacher = TeacherTargets.from_batch(inputs) if uses_teacher else None
        for column in ("index", *TeacherTargets.columns()):  # not for the model: TRL passes on what it gets
            inputs.pop(column, None)
        self._reference(inputs, teacher)
        policy_outputs: list[FusedSelectedOutput] = []

        def policy(**kwargs: Any) -> Any:
            if "labels" not in kwargs:  # TRL asks for logits, for compute_metrics
                return model(**kwargs)
            ids = {"topk_ids": teacher.topk_ids} if teacher is not None and self.args.kl_weight else {}
            policy_outputs.append(run_fused(model, **kwargs, **ids))
            return policy_outputs[0]

        # TRL reads the reference from the batch where it was precomputed. Ours is there by now in every case.
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        # Metrics, and the divergence.
        metrics = self._metrics["train" if self.model.training else "eval"]
        if not self.args.token_metrics:
            for name in _TOKEN_METRICS:
                metrics.pop(name, None)
        if teacher is None or not self.args.kl_weight:
            return result
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + self.args.kl_weight * self._divergence(
            policy_outputs[0].selected_logps, teacher, inputs["completion_mask"], metrics
        )
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._live.collect():
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the live plan reported since the last training log."""
        super().log(logs | self._live.pop() if "loss" in logs else logs, start_time)

    def _load_policy_only(self, *args: Any, **kwargs: Any) -> nn.Module | None:
        """Not the reference, which TRL loads under FSDP all the same; it does so when the Trainer has its policy."""
        return None if hasattr(self, "model") else create_model_from_path(*args, **kwargs)

    def _reference(self, inputs: dict[str, Any], teacher: TeacherTargets | None) -> None:
        """Puts `(beta ref + beta_teacher teacher) / (beta + beta_teacher)` into the batch, a sum per answer."""
        mask = inputs["completion_mask"]
        if self.args.beta == 0:
            reference = torch.zeros(2, len(mask) // 2, device=mask.device)
        elif "ref_chosen_logps" in inputs and (self.precompute_ref_logps or not self._ref_model_given):
            reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        elif self.ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                f"beta={self.args.beta} needs a reference, and neither this data nor the trainer has one: run "
                "`dadpo reference` on the cache, or pass ref_model"
            )
        else:
            model = self.model if self.ref_model is None else self.ref_model
            reference = torch.stack(self.compute_ref_log_probs(model, inputs))
        if teacher is not None and self.args.beta_teacher:
            teacher_logps = _answer_logps(teacher, _aligned(mask), self.ld_alpha).view(2, -1)
            reference = (self.args.beta * reference + self.args.beta_teacher * teacher_logps) / self.beta
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference

    def _divergence(
        self, student: SelectedLogps, teacher: TeacherTargets, mask: Tensor, metrics: dict[str, list[float]]
    ) -> Tensor:
        """This micro-batch's share of the step's mean divergence, as the Trainer wants it scaled; logs the metrics."""
        valid = _aligned(mask) > 0
        teacher.checked_topk(valid)
        pairs = len(mask) // 2
        rows, counted = {
            "both": (slice(None), slice(1, 3)),
            "chosen": (slice(pairs), slice(1, 2)),
            "rejected": (slice(pairs, None), slice(2, 3)),
        }[self.args.kl_on]
        valid = valid[rows]
        per_token = topk_divergence(
            student.topk[rows], student.tail[rows], teacher.topk_logps[rows], teacher.topk_tail[rows],
            kind=self.args.divergence, support=self.args.support,
            js_mix=self.args.js_mix, kd_temperature=self.args.kd_temperature,
        )  # fmt: skip
        total = per_token.masked_fill(~valid, 0).sum()
        masses = [x[rows].detach().exp().sum(-1) for x in (teacher.topk_logps, student.topk)]
        sums = torch.stack([x.masked_fill(~valid, 0).sum() for x in (per_token.detach(), *masses)])
        tokens = self.accelerator.reduce(valid.sum(), "sum").clamp(min=1)
        means = self.accelerator.reduce(sums, "sum") / tokens
        for name, mean in zip(("kl", "teacher_mass", "student_mass"), means.tolist(), strict=True):
            metrics[f"distill/{name}"].append(mean)
        scale = self.accelerator.num_processes  # over which losses and gradients are averaged
        if self.model.training and self._step_counts is not None:
            tokens = self._step_counts[counted].sum().clamp(min=1)
            scale *= self.current_gradient_accumulation_steps  # by which the Trainer divides
        return total * scale / tokens


def _aligned(completion_mask: Tensor) -> Tensor:
    """TRL's mask says which tokens count; here, which positions predict one."""
    return F.pad(completion_mask[:, 1:], (0, 1))


def _counts(completion_mask: Tensor) -> Tensor:
    return pair_counts(_aligned(completion_mask), ignore_index=0)


def _answer_logps(teacher: TeacherTargets, mask: Tensor, ld_alpha: float | None) -> Tensor:
    """`[2B]`: the teacher's log-probability of each answer, with TRL's weight of what one answer is longer by."""
    if ld_alpha is not None:
        shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
        beyond = mask.cumsum(1) > shared[:, None]
        weights = torch.ones_like(teacher.label_logps).masked_fill(beyond, ld_alpha)
        teacher = teacher._replace(label_logps=teacher.label_logps * weights)
    return teacher.answer_logps(mask > 0)


def _is_cache(data: Any) -> bool:
    return cached_pairs(data) is not None


def _columns(data: Any) -> Any:
    return getattr(data, "column_names", None) or next(iter(data), ())  # streams may not know them


def _has_reference(data: Any) -> bool:
    pairs = cached_pairs(data)
    return "ref_chosen_logps" in _columns(data) if pairs is None else pairs.has_reference


def _check_dataset(name: str, data: Any, args: TRLDaDPOConfig, ref_model_given: bool) -> None:
    """What can be known of a data set before the first batch."""
    pairs = cached_pairs(data)
    # Where the reference comes from.
    if args.beta and _has_reference(data):
        if ref_model_given:
            raise ValueError(
                f"{name} has reference log-probabilities, and ref_model would compute others: leave ref_model out, or "
                "remove those of the data (text: columns ref_chosen_logps and ref_rejected_logps; a cache: its "
                "directory `reference`)"
            )
        if pairs is None and not args.precompute_ref_log_probs:
            raise ValueError(
                f"{name} has reference log-probabilities, and precompute_ref_log_probs=False asks for a model's: set "
                "it to True to use the data's, or remove the columns ref_chosen_logps and ref_rejected_logps"
            )
    # The order.
    lengths = pairs is None and not args.remove_unused_columns and args.length_column_name in _columns(data)
    if args.train_sampling_strategy in _BY_LENGTH and not lengths:
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} needs lengths, and {name} has none: choose "
            f"'random', or give text a column {args.length_column_name!r} and set remove_unused_columns=False"
        )
    # What a cache cannot be made into.
    if pairs is None:
        return
    captured = pairs.manifest.settings["max_length"]
    if args.max_length is not None and (captured is None or captured > args.max_length):
        raise ValueError(
            f"{name} was captured with max_length={captured} and args have max_length={args.max_length}: a cache is "
            "used as it is. Set max_length=None, or capture again with a smaller one"
        )
    if args.ld_alpha not in (None, 1.0) and args.beta and pairs.has_reference:
        raise ValueError(
            f"ld_alpha={args.ld_alpha} weighs the reference's tokens, and the reference log-probabilities of {name} "
            "are sums over whole answers: leave ld_alpha at None, or use a cache without them and a reference model"
        )

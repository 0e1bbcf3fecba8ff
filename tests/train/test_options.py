"""No option of transformers or TRL is accepted and ignored: each is decided on, and those refused say what to do.

A new version's option fails a test here until somebody finds out what it does in our trainers.
"""

import inspect
from dataclasses import fields

import pytest
import transformers
from trl import DPOConfig

from dadpo_kernels import TRLDaDPOConfig
from dadpo_kernels.train import arguments, config, trainer
from dadpo_kernels.train.trl import trainer as trl
from tests.support.tiny import tiny_llama

# The last line is for scripts: transformers' Trainer does not read it either.
_WORKS = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu parallelism_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed skip_memory_metrics
    do_train do_eval do_predict resume_from_checkpoint local_rank
"""
WORKS = {*_WORKS.split()}
# In both trainers: a value that is refused, by option.
REFUSED = {
    "accelerator_config": {"dispatch_batches": True},
    "average_tokens_across_devices": False,
    "fp16": True,  # on a CPU
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "use_liger_kernel": True,
}
ONLY_OURS = {
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "debug": "tpu_metrics_debug",
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "fp16_full_eval": True,
    "include_for_metrics": ["inputs"],
    "length_column_name": "tokens",
    "prediction_loss_only": True,
    "train_sampling_strategy": "group_by_length",
}
_TRL_WORKS = """
    beta disable_dropout f_divergence_type ld_alpha loss_type loss_weights max_length model_init_kwargs pad_token
    activation_offloading dataset_num_proc pad_to_multiple_of precompute_ref_log_probs router_aux_loss_coef
    truncation_mode trust_remote_code use_weighting
"""
TRL_WORKS = {*_TRL_WORKS.split()}
ONLY_TRL = {
    "discopop_tau": 0.1,
    "f_alpha_divergence_coef": 0.3,
    "label_smoothing": 0.1,
    "length_column_name": "tokens",
    "padding_free": True,
    "precompute_ref_batch_size": 4,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 2,
    "sync_ref_model": True,  # with beta=0
}


def names(config_class):
    return {option.name for option in fields(config_class)}


def test_all_options_of_transformers_are_decided():
    refused = REFUSED.keys() | ONLY_OURS.keys()
    assert WORKS | refused == names(transformers.TrainingArguments)
    assert not WORKS & refused
    assert arguments.REFUSED.keys() == REFUSED.keys()
    assert config.REFUSED_OPTIONS.keys() == refused


def test_all_options_of_trl_are_decided():
    of_trl = names(DPOConfig) - names(transformers.TrainingArguments)
    refused = REFUSED.keys() | ONLY_TRL.keys()
    assert TRL_WORKS | (ONLY_TRL.keys() - ONLY_OURS.keys()) == of_trl
    assert not TRL_WORKS & refused
    assert trl.REFUSED_OPTIONS.keys() == refused


@pytest.mark.parametrize("option", REFUSED | ONLY_OURS)
def test_ours_refuses(option, tmp_path):
    value = (REFUSED | ONLY_OURS)[option]
    with pytest.raises(ValueError, match=rf"^{option}=.* is not supported: \w+"):
        config.DaDPOConfig(str(tmp_path), sft_weight=1.0, use_cpu=True, **{option: value})


@pytest.mark.parametrize("option", REFUSED | ONLY_TRL)
def test_trls_refuses(option, tmp_path):
    options = {option: (REFUSED | ONLY_TRL)[option]}
    if option == "sync_ref_model":
        options |= {"beta": 0.0, "beta_teacher": 0.1}
    with pytest.raises(ValueError, match=rf"^{option}=.* is not supported: \w+"):
        TRLDaDPOConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["discopop"], "discopop_tau": 0.1},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"loss_type": ["sft", "robust"], "label_smoothing": 0.1},
        {"train_sampling_strategy": "group_by_length", "length_column_name": "tokens"},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4},
        {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2},
        {"accelerator_config": {"split_batches": True}},
    ],
    ids=lambda options: "-".join(options),
)
def test_trl_takes_them_where_they_work(options, tmp_path):
    TRLDaDPOConfig(str(tmp_path), use_cpu=True, **options)


def test_all_arguments_of_the_trainer_are_decided(tmp_path):
    works = {"model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "callbacks",
             "optimizers", "optimizer_cls_and_kwargs"}  # fmt: skip
    parameters = inspect.signature(transformers.Trainer.__init__).parameters.keys() - {"self"}
    assert works | trainer.REFUSED_ARGUMENTS.keys() == parameters
    args = config.DaDPOConfig(str(tmp_path), sft_weight=1.0, use_cpu=True)
    for name in trainer.REFUSED_ARGUMENTS:
        trainer.DaDPOTrainer(tiny_llama(), args, **{name: None})
        with pytest.raises(ValueError, match=rf"^{name}=.* is not supported: \w+"):
            trainer.DaDPOTrainer(tiny_llama(), args, **{name: print})


def test_other_configurations_are_refused(tmp_path):
    with pytest.raises(TypeError, match="pass a DaDPOConfig"):
        trainer.DaDPOTrainer(tiny_llama(), transformers.TrainingArguments(str(tmp_path), use_cpu=True))

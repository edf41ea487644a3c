"""What becomes of each key of `[trl]` when verl trains: copied, translated, left unread, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trl import GRPOConfig

from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.train.trl.settings import LEAST_ONE, check_trl, unread_keys

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"

COPIED = {
    "learning_rate": f"{ACTOR}.optim.lr",
    "weight_decay": f"{ACTOR}.optim.weight_decay",  # TRL spares biases and norms, verl decays every parameter
    "num_iterations": f"{ACTOR}.ppo_epochs",
    "num_generations": f"{ROLLOUT}.n",
    "temperature": f"{ROLLOUT}.temperature",
    "top_p": f"{ROLLOUT}.top_p",
    "full_determinism": f"{ROLLOUT}.full_determinism",
    "vllm_tensor_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
    "gradient_checkpointing": f"{MODEL}.enable_gradient_checkpointing",
    "use_liger_kernel": f"{MODEL}.use_liger",
    "max_completion_length": "data.max_response_length",
    "shuffle_dataset": "data.shuffle",
    "dataloader_num_workers": "data.dataloader_num_workers",
}
"""Keys of `[trl]` whose value, or whose default in TRL, goes to verl as it stands."""

COPIED_IF_GIVEN = {
    "vllm_gpu_memory_utilization": f"{ROLLOUT}.gpu_memory_utilization",
    "vllm_enable_sleep_mode": f"{ROLLOUT}.free_cache_engine",
    "project": "trainer.project_name",
}
"""The same for keys without which verl's own default is the better one."""

TRANSLATED = frozenset(
    """
    per_device_train_batch_size gradient_accumulation_steps steps_per_generation generation_batch_size
    max_steps num_train_epochs save_strategy save_steps save_total_limit warmup_steps warmup_ratio lr_scheduler_type
    adam_beta1 adam_beta2 adam_epsilon optim max_grad_norm bf16 fp16
    epsilon epsilon_high delta loss_type scale_rewards beta use_bias_correction_kl top_k
    use_vllm vllm_max_model_length vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_min vllm_importance_sampling_clip_max vllm_importance_sampling_cap
    report_to run_name data_seed
    """.split()  # noqa: SIM905 - a list of names reads better without its quotes
)
"""Keys that `verl_settings` reads and says in verl's words."""

UNREAD = frozenset(
    """
    logging_steps logging_strategy logging_first_step logging_nan_inf_filter logging_dir log_level log_level_replica
    log_on_each_node log_completions log_completions_hub_repo log_multimodal log_unique_prompts num_completions_to_print
    disable_tqdm include_num_input_tokens_seen include_for_metrics skip_memory_metrics prediction_loss_only debug
    do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps
    eval_do_concat_batches eval_use_gather_object batch_eval_metrics per_device_eval_batch_size num_generations_eval
    bf16_full_eval fp16_full_eval metric_for_best_model greater_is_better
    save_on_each_node restore_callback_states_from_checkpoint resume_from_checkpoint ignore_data_skip
    enable_jit_checkpoint push_to_hub hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    trackio_bucket_id trackio_space_id trackio_static_space_id
    fsdp fsdp_config deepspeed ds3_gather_for_generation accelerator_config parallelism_config local_rank ddp_backend
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
    average_tokens_across_devices use_cpu tf32 torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps gradient_checkpointing_kwargs use_cache cache_implementation pad_to_multiple_of
    dataloader_drop_last dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    remove_unused_columns label_names length_column_name max_tool_calling_iterations
    vllm_mode vllm_model_impl vllm_group_port vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout use_transformers_continuous_batching use_transformers_paged
    transformers_continuous_batching_config
    ref_model_mixup_alpha ref_model_sync_steps entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target
    sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
    """.split()  # noqa: SIM905 - as above
)
"""Keys without an effect on what is learnt: how TRL logs, saves to the hub, spreads over devices and so on.

The last two lines belong to switches that are refused, so they have nothing to set.
"""

INSTEAD = {
    "importance_sampling_level": f'set verl.{ACTOR}.policy_loss.loss_mode = "gspo"',
    "entropy_coef": f"set verl.{ACTOR}.entropy_coeff, for a preset that does not reshape",
    "lr_scheduler_kwargs": f"set verl.{ACTOR}.optim.min_lr_ratio or num_cycles",
    "repetition_penalty": "remove it: verl samples with 1.0",
    "generation_kwargs": f"set verl.{ROLLOUT}.engine_kwargs",
    "load_best_model_at_end": "remove it and pick a checkpoint of the run folder",
    "model_init_kwargs": "use [model]",
    "optim_args": f"set verl.{ACTOR}.optim.override_optimizer_config",
}
"""What to do instead about a key that verl does not have."""


def unread_trl(config: RunConfig) -> list[str]:
    """The keys of `[trl]` that a run on verl does not read, none of which changes what is learnt."""
    other = set(unread_keys(config))
    return sorted(name for name in config.trl if name in UNREAD or name in other)


def trl_table(config: RunConfig) -> dict[str, Any]:
    """`[trl]` with TRL's defaults for what it leaves out; ValueError for what TRL or verl would not take."""
    given = {name: value for name, value in config.trl.items() if name not in unread_keys(config)}
    check_trl({name: value for name, value in given.items() if name != "use_vllm"})  # vLLM is where the GPUs are
    for name in LEAST_ONE:
        if isinstance(number := given.get(name, 1), int) and number < 1:
            raise UserError(f"trl.{name} = {number}", "at least 1", "raise it")
    defaults = trl_defaults()
    for name, value in given.items():
        if name not in {*COPIED, *COPIED_IF_GIVEN, *TRANSLATED, *UNREAD} and value != defaults.get(name):
            raise UserError(
                f"trl.{name} = {value!r}, which verl does not have",
                f"{defaults.get(name)!r}",
                f"{INSTEAD.get(name, 'remove it, or train with the engine trl')}",
            )
    return {**defaults, **given}


def trl_defaults() -> dict[str, Any]:
    """The defaults of TRL's GRPOConfig. It is not built: that looks for devices on this machine."""
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(GRPOConfig)
    }


def copied(table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are one key of `[trl]` each."""
    settings = {key: table[name] for name, key in COPIED.items()}
    return settings | {key: given[name] for name, key in COPIED_IF_GIVEN.items() if name in given}

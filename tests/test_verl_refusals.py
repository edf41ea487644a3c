"""What a run file or `[verl]` cannot ask of verl, each by its message. Needs no verl."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_verl_config import ACTOR, MODEL, ROLLOUT, SMALL, settings

REFUSALS = {
    "supervised": (("rest.preset=sft",), "preset 'sft'"),
    "random": (("rest.reward.random=true",), "rest.reward.random"),
    "4 bits": (("model.load_in_4bit=true", "peft.r=8"), "load_in_4bit"),
    "format of the published code": (("rest.preset=authors-code", "rest.format=llama3"), "llama3"),
    "decay": (("rest.entropy_decay=1.5",), "entropy_decay"),
    "unknown key": (("trl.learning_rat=1",), "did you mean learning_rate"),
    "beta": (("trl.beta=0.1",), "trl.beta = 0.1 with preset 'rest'"),
    "corrected KL": (("rest.preset=grpo", "trl.beta=0.1"), "use_bias_correction_kl"),
    "collision": (("rest.weights.rule=collision", "trl.top_p=0.9"), "collision"),
    "loss type": (("trl.loss_type=cispo",), "trl.loss_type = 'cispo'"),
    "scale": (("trl.scale_rewards=batch",), "trl.scale_rewards = 'batch'"),
    "sequence level": (("trl.importance_sampling_level=sequence",), "loss_mode"),
    "masked": (("trl.mask_truncated_completions=true",), "mask_truncated_completions"),
    "min_p": (("trl.min_p=0.1",), "trl.min_p"),
    "entropy": (("trl.entropy_coef=0.1",), "trl.entropy_coef"),
    "delta": (("trl.delta=1.1",), "trl.delta = 1.1"),
    "schedule": (("trl.lr_scheduler_type=linear",), "lr_scheduler_type"),
    "optimizer": (("trl.optim=sgd",), "trl.optim = 'sgd'"),
    "tracker": (("trl.report_to=codecarbon",), "codecarbon"),
    "save strategy": (("trl.save_strategy=epoch",), "save_strategy"),
    "save steps": (("trl.save_steps=5",), "trl.save_steps = 5, expected a multiple of 2"),
    "max steps": (("trl.max_steps=21",), "trl.max_steps = 21"),
    "every": (("eval.every=3", "data.held_out=h.jsonl"), "eval.every = 3"),
    "warm-up": (("trl.lr_scheduler_type=cosine", "trl.warmup_steps=3"), "trl.warmup_steps = 3"),
    "zero": (("trl.num_generations=0",), "at least 1"),
    "one response": (("trl.num_generations=1",), "at least 2"),
    "part of a group": (("trl.num_generations=6",), "multiple of 6"),
    "steps": (("trl.steps_per_generation=3",), "trl.steps_per_generation = 3"),
    "both": (("trl.generation_batch_size=128",), "generation_batch_size"),
    "few prompts": (("verl.trainer.nnodes=8",), "got 100 training prompts"),
    "short context": (("trl.vllm_max_model_length=50",), "vllm_max_model_length"),
    "correction": (
        (
            "trl.use_vllm=true",
            'trl.vllm_importance_sampling_mode="token_truncate"',
            "trl.vllm_importance_sampling_clip_min=0.1",
        ),
        "clip_min",
    ),
    "peft": (("peft.use_rslora=true",), "peft.use_rslora"),
    "peft on Megatron": (("peft.r=8", "verl.model_engine=megatron"), "megatron"),
    "float32 on Megatron": (("trl.bf16=false", "verl.model_engine=megatron"), "trl.bf16"),
    "engine": (("verl.model_engine=veomni",), "model_engine"),
    "mini-batch": (("verl.data.train_batch_size=40",), "a multiple"),
    "copies": (
        ("verl.data.train_batch_size=6", f"verl.{ACTOR}.ppo_mini_batch_size=3", "trl.max_steps=2", "trl.save_steps=2"),
        "multiple of 8",
    ),
    "rollout": (("trl.vllm_tensor_parallel_size=3",), "multiple of 3"),
    "parallel": ((f"verl.{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=3",), "multiple of 3"),
    "tokens": ((f"verl.{ACTOR}.ppo_max_token_len_per_gpu=149",), "at least 150"),
    "log-prob tokens": ((f"verl.{ROLLOUT}.log_prob_max_token_len_per_gpu=149",), "at least 150"),
    "micro-batch": ((f"verl.{ACTOR}.use_dynamic_bsz=false",), "divisor of 8"),  # 16 prompts x 4 / 8 GPUs
    "prompts": (("verl.data.max_prompt_length=49",), "at least 50"),
    "fetched": (("verl.data.gen_batch_size=5",), "divisor of 32"),
    "no checkpoint": (("verl.trainer.save_freq=-1",), "save_strategy = 'no'"),
    "no checkpoint by null": (("verl.trainer.save_freq=null",), "save_freq = None"),
    "no nodes": (("verl.trainer.nnodes=null",), "trainer.nnodes = None"),
    "no length": (("verl.data.max_response_length=null",), "max_response_length = None"),
    "length of the rollout": ((f"verl.{ROLLOUT}.response_length=70",), "verl.data.max_response_length instead"),
    "one checkpoint": (("verl.trainer.max_actor_ckpt_to_keep=1",), "before the new checkpoint is whole"),
    "one checkpoint by its old name": (("verl.trainer.+remove_previous_ckpt_in_save=true",), "max_actor_ckpt_to_keep"),
    "weights alone": ((f'verl.{ACTOR}.checkpoint.save_contents=["model"]',), "model, optimizer, extra"),
    "no weights": ((f'verl.{ACTOR}.checkpoint.save_contents=["hf_model"]',), "model, optimizer, extra"),
    "weights alone on the way back": ((f'verl.{ACTOR}.checkpoint.load_contents=["model"]',), "load_contents"),
    "saved on the side": ((f"verl.{ACTOR}.checkpoint.async_save=true",), "async_save"),
    "fewer rows": (("verl.data.train_max_samples=50",), "end the run early"),
    "filtered rows": (("verl.data.filter_overlong_prompts=true",), "max_prompt_tokens"),
    "no log-probabilities": ((f"verl.{ROLLOUT}.calculate_log_probs=false",), "calculate_log_probs"),
    "parts of a batch": (("verl.trainer.v1.sync.+parameter_sync_step=2",), "parameter_sync_step"),
    "rejection": (("verl.algorithm.rollout_correction.rollout_rs=token_k1",), "rejection"),
    "skipped rollout": (("verl.skip.rollout_tq.enable=true",), "rollout_tq"),
    "sampler": (('verl.trainer.v1.sampler.custom_sampler.path="s.py"',), "custom_sampler"),
    "tokenizer": ((f'verl.{MODEL}.tokenizer_path="x"',), "tokenizer_path"),
    "not whole": (('verl.trainer.nnodes="two"',), "whole number"),
    "epochs too few": (("verl.trainer.total_epochs=1", "verl.trainer.total_training_steps=9"), "end early"),
    "bypass": (("verl.algorithm.rollout_correction.bypass_mode=true",), "entropies"),
    "bypass by plus": (("verl.algorithm.rollout_correction.+bypass_mode=true",), "entropies"),
    "old trainer": (("verl.trainer.use_v1=false",), "trainer.use_v1"),
    "mode": (("verl.trainer.v1.trainer_mode=separate_async",), "asynchronous"),
    "entropy of verl": ((f"verl.{ACTOR}.entropy_coeff=0.1",), "entropy_coeff"),
    "KL of verl": ((f"verl.{ACTOR}.use_kl_loss=true",), "use_kl_loss"),
    "KL in the reward": (("verl.algorithm.use_kl_in_reward=true",), "use_kl_in_reward"),
    "covariance": ((f"verl.{ACTOR}.policy_loss.loss_mode=clip_cov",), "clip_cov"),
    "geometric mean": ((f"verl.{ACTOR}.policy_loss.loss_mode=geo_mean",), "geo_mean"),
    "DRO": ((f"verl.{ACTOR}.policy_loss.loss_mode=dro",), "dro"),
    "bypass as a loss": (("rest.preset=grpo", f"verl.{ACTOR}.policy_loss.loss_mode=bypass_mode"), "bypass_mode"),
    "critic": (("verl.algorithm.adv_estimator=gae",), "'gae'"),
    "critic itself": (("verl.critic.enable=true",), "critic.enable"),
    "another adapter": (("verl.actor_rollout_ref.model.lora_adapter_path=/a",), "lora_adapter_path"),
    "parameters": (('verl.actor_rollout_ref.model.target_parameters=["w"]',), "target_parameters"),
    "distillation": (("verl.distillation.enabled=true",), "distillation"),
    "reward model": (("verl.reward.reward_model.enable=true",), "reward_model"),
    "reward function": (('verl.reward.custom_reward_function.path="r.py"',), "custom_reward_function"),
    "reward manager": (("verl.reward.reward_manager.name=naive",), "reward_manager.name"),
    "dual clip": ((f"verl.{ACTOR}.clip_ratio_c=1.0",), "clip_ratio_c"),
    "spread": (("verl.algorithm.norm_adv_by_std_in_grpo=false",), "rest.advantage"),
    "data": (('verl.data.train_files="x.parquet"',), "data.path"),
    "model": (('verl.actor_rollout_ref.model.path="x"',), "model.path"),
    "several turns": ((f"verl.{ROLLOUT}.multi_turn.enable=true",), "multi_turn"),
    "warm-up of a critic": (("verl.trainer.critic_warmup=3",), "critic_warmup"),
    "our table": (("verl.rest.folder=x",), r"\[verl.rest\]"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    overrides, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message) as caught:
        settings(*overrides)
    assert str(caught.value).startswith("got "), caught.value


@pytest.mark.parametrize(
    "override",
    [
        *("verl.data.train_max_samples=-1", "verl.data.filter_overlong_prompts=false", "verl.data.gen_batch_size=null"),
        *("verl.trainer.v1.sync.+parameter_sync_step=1", "verl.trainer.max_actor_ckpt_to_keep=3"),
        *("verl.trainer.total_training_steps=null", f"verl.{ACTOR}.ppo_micro_batch_size_per_gpu=null"),
        f'verl.{ACTOR}.checkpoint.save_contents=["model", "optimizer", "extra", "hf_model"]',
        "verl.trainer.test_freq=-1",
    ],
)
def test_what_the_refusals_leave_alone(override: str) -> None:
    assert settings(override) == settings()  # what `[verl]` says comes over these later


@pytest.mark.parametrize("override", [f"{ACTOR}.policy_loss.loss_mode=clip_cov", "algorithm.adv_estimator=grpo"])
def test_presets_that_do_not_reshape_may_have_any_loss(override: str) -> None:
    assert settings("rest.preset=grpo", f"verl.{override}") == settings("rest.preset=grpo")


@pytest.mark.parametrize("name", ["a[b]c", "a]", "[", "a*", "what?", "a::b"])
def test_a_run_folder_that_reads_as_a_pattern_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"got the run folder .*pattern"):
        settings(job=replace(SMALL, folder=Path("/runs") / name))


@pytest.mark.parametrize("key", ["val_before_train=true", "test_freq=5"])
def test_measurements_without_held_out_rows_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="without held-out rows"):
        settings(f"verl.trainer.{key}")
    settings(f"verl.trainer.{key}", job=replace(SMALL, held_out_file=Path("/runs/mine/verl/held_out.parquet")))

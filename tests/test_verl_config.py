"""What a run file becomes on verl: every number by hand, every refusal. Needs no verl (tests/verl_cpu composes)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rest_rl.config import RunConfig, read_run_file
from rest_rl.train.verl import trl_keys as keys
from rest_rl.train.verl.config import VerlJob, unread_trl, verl_settings

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = [path for path in sorted(CONFIGS.glob("*.toml")) if not path.name.startswith(("compare-", "sft-"))]
JOB = VerlJob(
    folder=Path("/runs/mine"),
    train_file=Path("/runs/mine/verl/train.parquet"),
    held_out_file=None,
    num_train=3920,
    prompt_tokens=2048,
    model="Qwen/Qwen3-8B",
    tokenizer="/runs/mine/verl/tokenizer",
    resume_from=None,
    agent_loops=Path("/runs/mine/verl/agent_loops.yaml"),
)
ACTOR, ROLLOUT, MODEL = keys.ACTOR, keys.ROLLOUT, keys.MODEL

RUN = """
[run]
seed = 7
[model]
path = "some/model"
[data]
path = "dialogues.jsonl"
[rest]
preset = "rest"
[trl]
lr_scheduler_type = "constant"
per_device_train_batch_size = 4
gradient_accumulation_steps = 2
steps_per_generation = 4
num_generations = 4
max_completion_length = 100
max_steps = 20
save_steps = 10
"""
# On verl's default machine of 8 GPUs: 4 x 8 x 4 = 128 responses a batch = 32 prompts, 4 x 8 x 2 = 64 responses a step
# = 16 prompts, 2 steps a batch; so 20 steps are 10 batches and a checkpoint is every 5.
SMALL = replace(JOB, num_train=100, prompt_tokens=50)


def settings(*overrides: str, job: VerlJob = SMALL, text: str = RUN) -> dict[str, Any]:
    return verl_settings(RunConfig.from_toml(text, overrides), job)


def gpus_of(path: Path) -> list[str]:
    return ["verl.trainer.n_gpus_per_node=1"] if path.stem.endswith("1gpu") else []


def shown(path: Path) -> list[str]:
    return ["rest.format=hermes"] if path.stem == "own-tools" else []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_said(path: Path) -> None:
    told = verl_settings(read_run_file(path, [*gpus_of(path), *shown(path)]), JOB)
    if path.stem == "own-tools":  # 8 GPUs x 2 responses x 32 steps / 8 a prompt: several batches a step are one batch
        assert (told["data.train_batch_size"], told[f"{ACTOR}.ppo_mini_batch_size"]) == (64, 64)
        return
    # 2,048 responses / 4 a prompt; 256 / 4; 3,920 // 512 = 7 batches an epoch, 15 epochs; every 120 / 8 = 15 batches
    assert (told["data.train_batch_size"], told[f"{ACTOR}.ppo_mini_batch_size"]) == (512, 64)
    assert (told["trainer.total_training_steps"], told["trainer.total_epochs"]) == (105, 15)
    assert (told["trainer.save_freq"], told["trainer.max_actor_ckpt_to_keep"]) == (15, 2)
    assert (told[f"{ACTOR}.loss_agg_mode"], told[f"{ACTOR}.clip_ratio_c"]) == ("seq-mean-token-mean", 3.0)
    assert told[f"{ACTOR}.optim.lr"] in (1e-6, 1e-5)
    assert told["algorithm.rollout_correction.rollout_is"] is None
    per_device = read_run_file(path).trl["per_device_train_batch_size"]
    assert told[f"{ACTOR}.ppo_max_token_len_per_gpu"] == per_device * (2048 + 2048)


def test_batches_and_schedule_count_as_verl_does() -> None:
    told = settings()
    assert (told["data.train_batch_size"], told[f"{ACTOR}.ppo_mini_batch_size"]) == (32, 16)
    # 100 prompts // 32 = 3 batches an epoch, so 10 batches take 4 epochs
    assert (told["trainer.total_training_steps"], told["trainer.total_epochs"]) == (10, 4)
    assert (told["trainer.save_freq"], told["trainer.test_freq"], told["trainer.val_before_train"]) == (5, -1, False)
    assert told[f"{ACTOR}.ppo_max_token_len_per_gpu"] == 4 * (50 + 100)
    assert told[f"{ROLLOUT}.max_model_len"] == 150


def test_a_run_always_has_a_checkpoint_at_its_end() -> None:
    # verl saves after the last batch only where save_freq > 0; that checkpoint becomes the run's model
    assert settings("trl.save_strategy=no")["trainer.save_freq"] == 10
    assert settings("trl.save_steps=1000")["trainer.save_freq"] == 500
    assert settings("verl.trainer.save_freq=3")["trainer.save_freq"] == 10  # ours, under that of [verl]


@pytest.mark.parametrize(("limit", "kept"), [("1", 2), ("2", 2), ("5", 5), ("0", None)])
def test_a_whole_checkpoint_stays_while_the_next_is_written(limit: str, kept: int | None) -> None:
    assert settings(f"trl.save_total_limit={limit}")["trainer.max_actor_ckpt_to_keep"] == kept
    assert settings()["trainer.max_actor_ckpt_to_keep"] is None


def test_workers_load_a_saved_tokenizer() -> None:
    # verl's reward workers trust its code whatever the run says, so it comes from a folder without any
    told = settings()
    assert told[f"{MODEL}.tokenizer_path"] == "/runs/mine/verl/tokenizer"
    assert told[f"{MODEL}.path"] == "Qwen/Qwen3-8B"


def test_the_length_of_a_response_may_come_from_verl() -> None:
    told = settings("rest.preset=dr_grpo", "verl.data.max_response_length=70")  # 100 in [trl]
    assert told["data.max_response_length"] == told[f"{ACTOR}.loss_scale_factor"] == 70
    assert told[f"{ROLLOUT}.max_model_len"] == 50 + 70
    assert told[f"{ACTOR}.ppo_max_token_len_per_gpu"] == 4 * (50 + 70)


def test_a_resumed_run_is_not_measured_at_its_begin_whatever_its_file_says() -> None:
    held_out = replace(SMALL, held_out_file=Path("/runs/mine/verl/held_out.parquet"))
    resumed = replace(held_out, resume_from=Path("/runs/mine/checkpoints/global_step_5"))
    for job, begins in ((held_out, True), (resumed, False)):
        assert settings("verl.trainer.val_before_train=true", job=job)["trainer.val_before_train"] is begins
        assert settings("verl.trainer.val_before_train=false", job=job)["trainer.val_before_train"] is False


def test_epochs_without_max_steps() -> None:
    # 2.5 epochs of 100 // 32 = 3 batches: 7.5, so 8, in the third epoch
    told = settings("trl.max_steps=-1", "trl.num_train_epochs=2.5")
    assert (told["trainer.total_training_steps"], told["trainer.total_epochs"]) == (8, 3)


def test_several_reuses_of_a_batch() -> None:
    # two passes: 4 optimizer steps a batch, so 20 steps are 5 batches
    told = settings("trl.num_iterations=2", "trl.save_steps=8")
    assert (told[f"{ACTOR}.ppo_epochs"], told["trainer.total_training_steps"], told["trainer.save_freq"]) == (2, 5, 2)


def test_several_batches_a_step_are_one() -> None:
    # steps_per_generation 1 below 2: nothing is learnt between the two, which are 4 x 8 x 2 / 4 = 16 prompts
    told = settings("trl.steps_per_generation=1")
    assert (told["data.train_batch_size"], told[f"{ACTOR}.ppo_mini_batch_size"]) == (16, 16)
    assert told["trainer.total_training_steps"] == 20


def test_verl_sets_gpus_and_batches() -> None:
    # 2 x 4 GPUs are the same 8; 16 GPUs are twice the prompts; a batch of [verl] is the batch
    assert settings("verl.trainer.nnodes=2", "verl.trainer.n_gpus_per_node=4")["data.train_batch_size"] == 32
    assert settings("verl.trainer.nnodes=2")["data.train_batch_size"] == 64
    told = settings("verl.data.train_batch_size=40", f"verl.{ACTOR}.ppo_mini_batch_size=8")
    # 40 / 8 = 5 steps a batch, so 20 steps are 4 batches, of which an epoch has 100 // 40 = 2
    assert (told["trainer.total_training_steps"], told["trainer.total_epochs"]) == (4, 2)
    assert told["trainer.save_freq"] == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("verl.trainer.total_training_steps=6",), (6, 2)),
        (("verl.trainer.total_epochs=5",), (15, 5)),
        (("verl.trainer.total_epochs=5", "verl.trainer.total_training_steps=14"), (14, 5)),
    ],
)
def test_verl_sets_the_length(overrides: tuple[str, ...], expected: tuple[int, int]) -> None:
    told = settings(*overrides)
    assert (told["trainer.total_training_steps"], told["trainer.total_epochs"]) == expected


def test_evaluation() -> None:
    held_out = replace(SMALL, held_out_file=Path("/runs/mine/verl/held_out.parquet"))
    told = settings("data.held_out=h.jsonl", "eval.every=4", "eval.samples=3", job=held_out)
    assert (told["trainer.test_freq"], told["trainer.val_before_train"]) == (2, True)
    assert (told["data.val_files"], told["data.val_max_samples"]) == ("/runs/mine/verl/held_out.parquet", -1)
    assert (told[f"{ROLLOUT}.val_kwargs.n"], told[f"{ROLLOUT}.val_kwargs.temperature"]) == (3, 1.0)
    assert settings(job=held_out)["trainer.test_freq"] == 10  # before and after
    resumed = replace(held_out, resume_from=Path("/runs/mine/checkpoints/global_step_5"))
    told = settings(job=resumed)
    assert (told["trainer.val_before_train"], told["trainer.resume_mode"]) == (False, "resume_path")
    assert told["trainer.resume_from_path"] == "/runs/mine/checkpoints/global_step_5"


@pytest.mark.parametrize(
    ("preset", "mode", "scale", "by_spread", "high"),
    [
        ("rest", "seq-mean-token-mean", None, True, 0.2),
        ("paper", "seq-mean-token-mean", None, True, 0.2),
        ("authors-code", "seq-mean-token-mean", None, True, 0.2),
        ("grpo", "seq-mean-token-mean", None, True, 0.2),
        ("dr_grpo", "seq-mean-token-sum-norm", 100, False, 0.2),
        ("dapo", "token-mean", None, True, 0.28),
    ],
)
def test_loss_of_each_preset(preset: str, mode: str, scale: int | None, by_spread: bool, high: float) -> None:
    told = settings(f"rest.preset={preset}", "rest.format=hermes")
    assert (told[f"{ACTOR}.loss_agg_mode"], told[f"{ACTOR}.loss_scale_factor"]) == (mode, scale)
    assert told["algorithm.norm_adv_by_std_in_grpo"] is by_spread
    assert (told[f"{ACTOR}.clip_ratio_low"], told[f"{ACTOR}.clip_ratio_high"]) == (0.2, high)
    assert told[f"{ACTOR}.clip_ratio_c"] == 1e9  # verl's dual clip is off
    assert (told[f"{ACTOR}.use_kl_loss"], told[f"{ACTOR}.entropy_coeff"]) == (False, 0.0)


def test_trl_settings_by_their_other_names() -> None:
    told = settings(
        *("trl.epsilon=0.1", "trl.epsilon_high=0.3", "trl.delta=2.5", "trl.adam_beta2=0.95", "trl.max_grad_norm=0"),
        *("trl.top_k=0", "trl.temperature=0.8", "trl.lr_scheduler_type=cosine", "trl.warmup_steps=4"),
        *("trl.adam_epsilon=1e-6", "trl.report_to=tensorboard", "trl.vllm_gpu_memory_utilization=0.6"),
    )
    assert (told[f"{ACTOR}.clip_ratio_low"], told[f"{ACTOR}.clip_ratio_high"]) == (0.1, 0.3)
    assert told[f"{ACTOR}.clip_ratio_c"] == 2.5
    assert (told[f"{ACTOR}.optim.betas"], told[f"{ACTOR}.optim.clip_grad"]) == ([0.9, 0.95], 1e9)
    assert (told[f"{ROLLOUT}.top_k"], told[f"{ROLLOUT}.temperature"]) == (-1, 0.8)
    # 4 optimizer steps of warm-up are 2 batches
    assert (told[f"{ACTOR}.optim.lr_scheduler_type"], told[f"{ACTOR}.optim.lr_warmup_steps"]) == ("cosine", 2)
    assert told[f"{ACTOR}.optim.override_optimizer_config"] == {"eps": 1e-6}
    assert (told["trainer.logger"], told[f"{ROLLOUT}.gpu_memory_utilization"]) == (["tensorboard"], 0.6)


def test_defaults_are_those_of_trl_and_not_of_verl() -> None:
    told = settings()
    assert told[f"{ACTOR}.optim.weight_decay"] == 0.0  # verl 0.01
    assert told[f"{ROLLOUT}.tensor_model_parallel_size"] == 1  # verl 2
    assert told[f"{ACTOR}.optim.clip_grad"] == 1.0
    assert f"{ROLLOUT}.gpu_memory_utilization" not in told  # verl's 0.5 rather than TRL's 0.3
    seeds = ("data.seed", f"{ROLLOUT}.seed", f"{ACTOR}.fsdp_config.seed", f"{ACTOR}.data_loader_seed")
    assert [told[key] for key in seeds] == [7, 7, 7, 7]


@pytest.mark.parametrize(
    ("overrides", "weights", "products", "rollout"),
    [
        ((), "fp32", None, "bfloat16"),
        (("model.dtype=bfloat16",), "bf16", None, "bfloat16"),
        (("trl.bf16=false",), "fp32", "fp32", "float32"),
        (("trl.fp16=true",), "fp32", "fp16", "float16"),
        (("peft.r=8", "model.dtype=bfloat16"), "fp32", None, "bfloat16"),
    ],
)
def test_types(overrides: tuple[str, ...], weights: str, products: str | None, rollout: str) -> None:
    told = settings(*overrides)
    mixed = told.get(f"{ACTOR}.fsdp_config.+mixed_precision")
    assert told[f"{ACTOR}.fsdp_config.model_dtype"] == weights
    assert (mixed and mixed["param_dtype"]) == products
    assert told[f"{ROLLOUT}.dtype"] == rollout


def test_adapters() -> None:
    told = settings("peft.r=8")
    assert (told[f"{MODEL}.lora_rank"], told[f"{MODEL}.lora_alpha"]) == (8, 16)  # twice the rank
    assert told[f"{MODEL}.target_modules"] == "all-linear"
    assert f"{MODEL}.lora_rank" not in settings()


def test_megatron_has_keys_of_its_own() -> None:
    told = settings("verl.model_engine=megatron", "trl.lr_scheduler_type=linear")
    assert told[f"{ACTOR}.optim.lr_decay_style"] == "linear"
    assert told[f"{ACTOR}.megatron.dtype"] == "bfloat16"
    assert told[f"{ACTOR}.megatron.override_transformer_config.recompute_granularity"] == "full"
    assert not any("fsdp" in key for key in told)


@pytest.mark.parametrize(
    ("overrides", "level", "threshold"),
    [
        ((), "sequence", "1e-09_3.0"),
        (('trl.vllm_importance_sampling_mode="token_truncate"',), "token", 3.0),
        (("trl.vllm_importance_sampling_clip_min=0.5",), "sequence", "0.5_3.0"),
    ],
)
def test_correction_for_vllm(overrides: tuple[str, ...], level: str, threshold: Any) -> None:
    told = settings("trl.use_vllm=true", *overrides)  # TRL corrects unless told not to
    assert told["algorithm.rollout_correction.rollout_is"] == level
    assert told["algorithm.rollout_correction.rollout_is_threshold"] == threshold


def test_attention_without_packing() -> None:
    assert settings()[f"{MODEL}.use_remove_padding"]
    told = settings("model.attn_implementation=sdpa")
    assert (told[f"{MODEL}.override_config.+attn_implementation"], told[f"{MODEL}.use_remove_padding"]) == (
        "sdpa",
        False,
    )


def test_a_preset_that_does_not_reshape_may_have_kl() -> None:
    told = settings("rest.preset=grpo", "trl.beta=0.01", "trl.use_bias_correction_kl=false")
    assert (told[f"{ACTOR}.use_kl_loss"], told[f"{ACTOR}.kl_loss_coef"]) == (True, 0.01)
    assert settings("rest.preset=grpo", f"verl.{ACTOR}.entropy_coeff=0.01")


def test_room_for_large_batches() -> None:
    # 131,072 responses: 4 x as many rows at most, 2 stores a machine
    told = settings(
        *("verl.trainer.nnodes=64", "trl.per_device_train_batch_size=64", "trl.max_steps=2", "trl.save_steps=2"),
        job=replace(SMALL, num_train=100_000),
    )
    assert told["data.train_batch_size"] * 4 == 131_072
    assert told["transfer_queue.backend.SimpleStorage.total_storage_size"] == 524_288
    assert told["transfer_queue.backend.SimpleStorage.num_data_storage_units"] == 128


def test_unread_keys_are_named() -> None:
    config = RunConfig.from_toml(RUN, ["trl.logging_steps=1", "trl.vllm_mode=colocate", "trl.max_length=9"])
    assert unread_trl(config) == ["logging_steps", "max_length", "vllm_mode"]  # the last but one is of SFTConfig
    verl_settings(config, SMALL)


def test_every_key_of_trl_has_one_fate() -> None:
    groups = [set(keys.COPIED), set(keys.COPIED_IF_GIVEN), set(keys.TRANSLATED), set(keys.UNREAD)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    refused = set(keys.trl_defaults()) - set().union(*groups)
    assert set(keys.INSTEAD) <= refused
    assert {"top_entropy_quantile", "min_p", "mask_truncated_completions", "off_policy_mask_threshold"} <= refused


def test_on_a_machine_without_vllm_the_cluster_may_have_it() -> None:
    assert settings("trl.use_vllm=true", "trl.vllm_importance_sampling_correction=false")[f"{ROLLOUT}.name"] == "vllm"

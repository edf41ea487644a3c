"""verl's configuration for a run file: every number by hand, every refusal. Needs no verl (tests/verl_cpu composes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rest_rl.config import RunConfig, read_run_file
from rest_rl.errors import UserError
from rest_rl.train.verl import config as verl_config
from rest_rl.train.verl.config import (
    VerlJob,
    check_allowed_values,
    compute_schedule,
    find_unread_keys,
    iter_leaves,
    make_fixed_values,
    make_initial_values,
)
from rest_rl.weights import is_uniform

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = [path for path in sorted(CONFIGS.glob("*.toml")) if not path.name.startswith(("compare-", "sft-"))]
BIG = VerlJob(Path("/runs/mine"), "Qwen/Qwen3-8B", num_train=3920, prompt_tokens=2048)
SMALL = BIG._replace(num_train=100, prompt_tokens=50)
ACTOR, ROLLOUT, MODEL = verl_config.ACTOR, verl_config.ROLLOUT, verl_config.MODEL

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


def values_of(config: RunConfig, job: VerlJob = SMALL) -> dict[str, Any]:
    """verl's values that can be computed without verl: initial values, `[verl]`, batches and steps."""
    start = make_initial_values(config, job)
    given = {path.replace("+", ""): value for path, value in iter_leaves(config.verl)}
    values = {verl_config.NODES: 1, verl_config.GPUS: 8, **start, **given}
    needed = {key: values[key] for key in ("trainer.nnodes", "trainer.n_gpus_per_node", f"{ROLLOUT}.n")}
    needed |= {key: values[key] for key in (verl_config.PASSES, *verl_config.SCHEDULE_KEYS)}
    values |= compute_schedule(needed, config, job.num_train)
    method = config.rest.resolve()
    check_allowed_values(values, make_fixed_values(method, job), reshapes=not is_uniform(method.weights))
    return values


def values(*overrides: str, job: VerlJob = SMALL, text: str = RUN) -> dict[str, Any]:
    return values_of(RunConfig.from_toml(text, overrides), job)


def gpus_of(path: Path) -> list[str]:
    return ["verl.trainer.n_gpus_per_node=1"] if path.stem.endswith("1gpu") else []


def shown(path: Path) -> list[str]:
    return ["rest.format=hermes"] if path.stem == "own-tools" else []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_keeps_the_published_batch(path: Path) -> None:
    composed = values_of(read_run_file(path, [*gpus_of(path), *shown(path)]), BIG)
    if path.stem == "own-tools":  # 8 GPUs x 2 responses x 32 steps / 8 a prompt: several batches a step are one batch
        assert (composed["data.train_batch_size"], composed[f"{ACTOR}.ppo_mini_batch_size"]) == (64, 64)
        return
    # 2,048 responses / 4 a prompt; 256 / 4; 3,920 // 512 = 7 batches an epoch, 15 epochs; every 120 / 8 = 15 batches
    assert (composed["data.train_batch_size"], composed[f"{ACTOR}.ppo_mini_batch_size"]) == (512, 64)
    assert (composed["trainer.total_training_steps"], composed["trainer.total_epochs"]) == (105, 15)
    assert (composed["trainer.save_freq"], composed["trainer.max_actor_ckpt_to_keep"]) == (15, 2)
    assert (composed[f"{ACTOR}.loss_agg_mode"], composed[f"{ACTOR}.clip_ratio_c"]) == ("seq-mean-token-mean", 3.0)
    assert composed[f"{ACTOR}.optim.lr"] in (1e-6, 1e-5)
    if "1gpu" not in path.stem:  # what a forward pass takes on TRL
        per_device = read_run_file(path).trl["per_device_train_batch_size"]
        assert composed[f"{ACTOR}.ppo_max_token_len_per_gpu"] == per_device * (2048 + 2048)


def test_fifteen_keys_are_fixed() -> None:
    fixed = make_fixed_values(RunConfig().rest.resolve(), SMALL)
    assert len(fixed) == 15
    assert fixed[f"{MODEL}.tokenizer_path"] == "/runs/mine/verl/tokenizer"
    assert fixed["data.train_files"] == fixed["data.val_files"] == "/runs/mine/verl/train.parquet"
    held_out = SMALL._replace(has_held_out=True, resume_from=Path("/runs/mine/checkpoints/global_step_5"))
    fixed = make_fixed_values(RunConfig().rest.resolve(), held_out)
    assert fixed["data.val_files"] == "/runs/mine/verl/held_out.parquet"
    assert fixed["trainer.resume_mode"] == "resume_path"
    assert fixed["trainer.resume_from_path"] == "/runs/mine/checkpoints/global_step_5"


def test_the_tables_of_the_documentation_name_every_key() -> None:
    page = (CONFIGS.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    missing = [key for key in make_fixed_values(RunConfig().rest.resolve(), SMALL) if key not in page]
    missing += [name for name in (*verl_config.KEY_TABLES["trl"], *verl_config.DERIVED_TRL_KEYS) if name not in page]
    assert not missing


def test_batches_and_schedule_count_as_verl_does() -> None:
    composed = values()
    assert (composed["data.train_batch_size"], composed[f"{ACTOR}.ppo_mini_batch_size"]) == (32, 16)
    # 100 prompts // 32 = 3 batches an epoch, so 10 batches take 4 epochs
    assert (composed["trainer.total_training_steps"], composed["trainer.total_epochs"]) == (10, 4)
    assert (composed["trainer.save_freq"], composed["trainer.test_freq"]) == (5, 10)
    assert composed["data.max_prompt_length"] == 50


def test_a_run_always_has_a_checkpoint_at_its_end() -> None:
    # verl saves after the last batch only where save_freq > 0; that checkpoint becomes the run's model
    assert values("trl.save_strategy=no")["trainer.save_freq"] == 10
    assert values("verl.trainer.save_freq=-1")["trainer.save_freq"] == 10
    assert values("verl.trainer.save_freq=3")["trainer.save_freq"] == 3


@pytest.mark.parametrize(("limit", "kept"), [("1", 2), ("2", 2), ("5", 5), ("0", None)])
def test_a_complete_checkpoint_is_kept_while_the_next_is_written(limit: str, kept: int | None) -> None:
    assert values(f"trl.save_total_limit={limit}").get("trainer.max_actor_ckpt_to_keep") == kept
    assert "trainer.max_actor_ckpt_to_keep" not in values()


def test_epochs_without_max_steps() -> None:
    # 2.5 epochs of 100 // 32 = 3 batches: 7.5, so 8, in the third epoch
    composed = values("trl.max_steps=-1", "trl.num_train_epochs=2.5")
    assert (composed["trainer.total_training_steps"], composed["trainer.total_epochs"]) == (8, 3)


def test_num_iterations_multiplies_the_optimizer_steps() -> None:
    # two passes: 4 optimizer steps a batch, so 20 steps are 5 batches and 10 steps, rounded up, 3
    composed = values("trl.num_iterations=2")
    assert (
        composed[f"{ACTOR}.ppo_epochs"],
        composed["trainer.total_training_steps"],
        composed["trainer.save_freq"],
    ) == (2, 5, 3)


def test_several_batches_per_step_become_one() -> None:
    # steps_per_generation 1 below 2: there is no update between the two, which are 4 x 8 x 2 / 4 = 16 prompts
    composed = values("trl.steps_per_generation=1")
    assert (composed["data.train_batch_size"], composed[f"{ACTOR}.ppo_mini_batch_size"]) == (16, 16)
    assert composed["trainer.total_training_steps"] == 20


def test_verl_keys_set_gpus_and_batches() -> None:
    # 2 x 4 GPUs are the same 8; 16 GPUs are twice the prompts; a batch of [verl] is the batch
    assert values("verl.trainer.nnodes=2", "verl.trainer.n_gpus_per_node=4")["data.train_batch_size"] == 32
    assert values("verl.trainer.nnodes=2")["data.train_batch_size"] == 64
    composed = values("verl.data.train_batch_size=40", f"verl.{ACTOR}.ppo_mini_batch_size=8")
    # 40 / 8 = 5 steps a batch, so 20 steps are 4 batches, of which an epoch has 100 // 40 = 2
    assert (composed["trainer.total_training_steps"], composed["trainer.total_epochs"]) == (4, 2)
    assert composed["trainer.save_freq"] == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("verl.trainer.total_training_steps=6",), (6, 2)),
        (("verl.trainer.total_epochs=5",), (15, 5)),
        (("verl.trainer.total_epochs=5", "verl.trainer.total_training_steps=14"), (14, 5)),
    ],
)
def test_verl_keys_set_the_length(overrides: tuple[str, ...], expected: tuple[int, int]) -> None:
    composed = values(*overrides)
    assert (composed["trainer.total_training_steps"], composed["trainer.total_epochs"]) == expected


def test_evaluation() -> None:
    composed = values("data.held_out=h.jsonl", "eval.every=3", "eval.samples_per_prompt=3")
    assert composed["trainer.test_freq"] == 2  # 3 optimizer steps, rounded up
    assert (composed[f"{ROLLOUT}.val_kwargs.n"], composed[f"{ROLLOUT}.val_kwargs.temperature"]) == (3, 1.0)


@pytest.mark.parametrize(
    ("preset", "mode", "scale", "by_spread", "high"),
    [
        ("rest", "seq-mean-token-mean", None, True, 0.2),
        ("rest_live", "seq-mean-token-mean", None, True, 0.2),
        ("authors-code", "token-mean", None, True, 0.2),
        ("grpo", "seq-mean-token-mean", None, True, 0.2),
        ("dr_grpo", "seq-mean-token-sum-norm", "${data.max_response_length}", False, 0.2),
        ("dapo", "token-mean", None, True, 0.28),
    ],
)
def test_loss_of_each_preset(preset: str, mode: str, scale: str | None, by_spread: bool, high: float) -> None:
    composed = values(f"rest.preset={preset}", "rest.format=toolrl")
    assert (composed[f"{ACTOR}.loss_agg_mode"], composed[f"{ACTOR}.loss_scale_factor"]) == (mode, scale)
    assert composed["algorithm.norm_adv_by_std_in_grpo"] is by_spread
    assert (composed[f"{ACTOR}.clip_ratio_low"], composed[f"{ACTOR}.clip_ratio_high"]) == (0.2, high)
    # verl always has a dual clip, which only the published code uses
    assert composed[f"{ACTOR}.clip_ratio_c"] == (3.0 if preset == "authors-code" else 1e9)
    assert f"{ACTOR}.use_kl_loss" not in composed  # verl's default is false


def test_a_kl_term_becomes_that_of_verl() -> None:
    composed = values("trl.beta=0.003")
    names = ("use_kl_loss", "kl_loss_coef", "kl_loss_type")
    assert [composed[f"{ACTOR}.{name}"] for name in names] == [True, 0.003, "low_var_kl"]


def test_keys_that_both_engines_have() -> None:
    composed = values(
        *("trl.epsilon=0.1", "trl.epsilon_high=0.3", "trl.delta=2.5", "trl.top_k=0", "trl.temperature=0.8"),
        *("trl.weight_decay=0.1", "trl.gradient_checkpointing=false", "trl.vllm_max_model_length=300"),
    )
    assert (composed[f"{ACTOR}.clip_ratio_low"], composed[f"{ACTOR}.clip_ratio_high"]) == (0.1, 0.3)
    assert composed[f"{ACTOR}.clip_ratio_c"] == 2.5
    assert (composed[f"{ROLLOUT}.top_k"], composed[f"{ROLLOUT}.temperature"]) == (-1, 0.8)
    assert (composed[f"{ACTOR}.optim.weight_decay"], composed[f"{MODEL}.enable_gradient_checkpointing"]) == (0.1, False)
    assert (composed["data.max_response_length"], composed[f"{ROLLOUT}.max_model_len"]) == (100, 300)


def test_defaults_of_shared_keys_are_those_of_trl() -> None:
    composed = values()
    assert composed[f"{ACTOR}.optim.weight_decay"] == 0.0  # verl 0.01
    assert composed[f"{ROLLOUT}.tensor_model_parallel_size"] == 1  # verl 2
    seeds = ("data.seed", f"{ROLLOUT}.seed", f"{ACTOR}.fsdp_config.seed", f"{ACTOR}.data_loader_seed")
    assert [composed[key] for key in seeds] == [7, 7, 7, 7]


def test_adapters() -> None:
    composed = values("peft.r=8")
    assert (composed[f"{MODEL}.lora_rank"], composed[f"{MODEL}.lora_alpha"]) == (8, 16)  # twice the rank
    assert composed[f"{MODEL}.target_modules"] == "all-linear"
    assert f"{MODEL}.lora_rank" not in values()


def test_megatron_has_different_keys() -> None:
    config = RunConfig.from_toml(RUN)
    composed = make_initial_values(config, SMALL, megatron=True)
    assert composed[f"{ACTOR}.megatron.seed"] == 7
    assert not any("fsdp" in key for key in composed)
    with pytest.raises(UserError, match=r"\[peft\]"):
        make_initial_values(RunConfig.from_toml(RUN, ["peft.r=8"]), SMALL, megatron=True)


def test_ignored_keys_are_listed() -> None:
    config = RunConfig.from_toml(RUN, ["trl.logging_steps=1", "trl.max_grad_norm=2.0", "trl.use_vllm=true", "peft.r=8"])
    assert find_unread_keys(config) == ["trl.logging_steps", "trl.max_grad_norm", "trl.use_vllm"]
    make_initial_values(config, SMALL)
    more = RunConfig.from_toml(RUN, ["peft.use_rslora=true", "model.dtype=bfloat16", "model.attn_implementation=sdpa"])
    assert find_unread_keys(more) == ["peft.use_rslora", "model.attn_implementation", "model.dtype"]
    assert find_unread_keys(RunConfig.from_toml(RUN, ["model.dtype=float32"])) == []


REFUSALS = {
    "supervised": (("rest.preset=sft",), "supervised"),
    "random": (("rest.reward.random=true",), "random"),
    "format of the published code": (("rest.preset=authors-code", "rest.format=llama3"), "llama3"),
    "decay": (("rest.entropy_decay=1.5",), "entropy_decay"),
    "unknown key": (("trl.learning_rat=1",), "did you mean learning_rate"),
    "format": (("rest.preset=authors-code", "rest.format=hermes"), "hermes"),
    "resampling": (("rest.resample_rounds=1",), "resample_rounds is 1"),
    "collision": (("rest.weights.rule=collision", "trl.top_p=0.9"), "collision"),
    "part of a group": (("trl.num_generations=6",), "whole numbers"),
    "few prompts": (("verl.trainer.nnodes=8",), "100 training prompts"),
    "bypass": (("verl.algorithm.rollout_correction.bypass_mode=true",), "bypass_mode"),
    "bypass by plus": (("verl.algorithm.rollout_correction.+bypass_mode=true",), "bypass_mode"),
    "bypass as a loss": (
        ("rest.preset=grpo", f"verl.{ACTOR}.policy_loss.loss_mode=bypass_mode"),
        "loss_mode is 'bypass_mode'",
    ),
    "rejection": (("verl.algorithm.rollout_correction.rollout_rs=token_k1",), "rollout_rs"),
    "old trainer": (("verl.trainer.use_v1=false",), "trainer.use_v1"),
    "asynchronous": (("verl.trainer.v1.trainer_mode=separate_async",), "trainer_mode"),
    "entropy of verl": ((f"verl.{ACTOR}.entropy_coeff=0.1",), "entropy_coeff"),
    "KL in the reward": (("verl.algorithm.use_kl_in_reward=true",), "use_kl_in_reward"),
    "covariance": ((f"verl.{ACTOR}.policy_loss.loss_mode=clip_cov",), "clip_cov"),
    "geometric mean": ((f"verl.{ACTOR}.policy_loss.loss_mode=geo_mean",), "geo_mean"),
    "DRO": ((f"verl.{ACTOR}.policy_loss.loss_mode=dro",), "dro"),
    "critic": (("verl.algorithm.adv_estimator=gae",), "'gae'"),
    "distillation": (("verl.distillation.enabled=true",), "distillation"),
    "prefix_grouper": (("verl.actor_rollout_ref.actor.use_prefix_grouper=true",), "use_prefix_grouper"),
    "reward model": (("verl.reward.reward_model.enable=true",), "reward_model"),
    "reward function": (('verl.reward.custom_reward_function.path="r.py"',), "custom_reward_function"),
    "reward manager": (("verl.reward.reward_manager.name=naive",), "reward_manager.name"),
    "spread": (("verl.algorithm.norm_adv_by_std_in_grpo=false",), "norm_adv_by_std"),
    "data": (('verl.data.train_files="x.parquet"',), "train_files"),
    "model": ((f'verl.{MODEL}.path="x"',), "model.path"),
    "tokenizer": ((f'verl.{MODEL}.tokenizer_path="x"',), "tokenizer_path"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    overrides, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message) as caught:
        values(*overrides)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "override",
    [f"{ACTOR}.policy_loss.loss_mode=clip_cov", f"{ACTOR}.use_kl_loss=true", "algorithm.adv_estimator=grpo"],
)
def test_presets_with_uniform_weights_allow_other_losses(override: str) -> None:
    key, _, value = override.partition("=")
    assert str(values("rest.preset=grpo", f"verl.{override}")[key]).lower() == value


@pytest.mark.parametrize("name", ["a[b]c", "a]", "[", "a*", "what?", "a::b"])
def test_a_run_folder_with_glob_characters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        values(f'run.out="/runs/{name}"')

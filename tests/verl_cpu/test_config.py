"""The composed configuration: verl's own check takes it, every key of ours is one of verl's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rest_rl.config import RunConfig, read_run_file
from rest_rl.train.verl.config import compose_config, leaves, verl_settings
from rest_rl.train.verl.overrides import verl_change
from tests.test_verl_config import ACTOR, MODEL, RECIPES, ROLLOUT, RUN, SMALL, gpus_of, shown

pytestmark = pytest.mark.verl
OmegaConf = pytest.importorskip("omegaconf").OmegaConf

BIG = replace(SMALL, num_train=3920, prompt_tokens=2048)


def composed(*overrides: str, text: str = RUN) -> Any:
    return compose_config(RunConfig.from_toml(text, overrides), SMALL)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_verl_takes_every_recipe(path: Path) -> None:
    config = read_run_file(path, [*gpus_of(path), *shown(path)])
    verl = compose_config(config, BIG)
    given = {".".join(parts).replace("+", "") for parts, _ in leaves(config.verl)}
    for key, value in verl_settings(config, BIG).items():
        path_in_verl = key.replace("+", "")
        if path_in_verl not in given:
            assert OmegaConf.select(verl, path_in_verl, throw_on_missing=True) == value, key
    assert RunConfig.from_toml(verl.rest.run).to_toml() == config.to_toml()
    assert verl.rest.folder == "/runs/mine"


@pytest.mark.parametrize("preset", ["rest", "paper", "authors-code", "grpo", "dr_grpo", "dapo"])
def test_every_preset(preset: str) -> None:
    assert composed(f"rest.preset={preset}", "rest.format=hermes").algorithm.adv_estimator == "rest_group"


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (("peft.r=8",), f"{MODEL}.lora_alpha", 16),
        (
            ("trl.bf16=false", "model.attn_implementation=eager"),
            f"{ACTOR}.fsdp_config.mixed_precision.param_dtype",
            "fp32",
        ),
        (("trl.use_vllm=true",), "algorithm.rollout_correction.rollout_is", "sequence"),
        (("rest.preset=grpo", "trl.beta=0.01", "trl.use_bias_correction_kl=false"), f"{ACTOR}.kl_loss_coef", 0.01),
        (("trl.adam_epsilon=1e-6", "trl.optim=adamw_bnb_8bit"), f"{ACTOR}.optim.override_optimizer_config.eps", 1e-6),
        ((f"verl.{ROLLOUT}.name=sglang",), f"{ROLLOUT}.name", "sglang"),
    ],
)
def test_what_else_a_run_can_ask_for(overrides: tuple[str, ...], key: str, value: Any) -> None:
    assert OmegaConf.select(composed(*overrides), key) == value


def test_megatron_is_chosen_among_verl_s_files() -> None:
    verl = composed("verl.model_engine=megatron", f"verl.{ACTOR}.megatron.tensor_model_parallel_size=2")
    assert verl.actor_rollout_ref.actor.strategy == "megatron"
    assert verl.actor_rollout_ref.actor.optim.lr_decay_style == "constant"
    assert verl.actor_rollout_ref.actor.megatron.tensor_model_parallel_size == 2
    assert verl.actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers == 1


def test_verl_s_table_comes_last() -> None:
    verl = composed(
        *("verl.trainer.nnodes=2", "verl.trainer.project_name=mine", "verl.trainer.rollout_data_dir=null"),
        *("verl.ray_kwargs.ray_init.+num_gpus=1", f"verl.{ROLLOUT}.engine_kwargs.vllm.+max_num_seqs=64"),
        f"verl.{ACTOR}.fsdp_config.mixed_precision.+param_dtype=fp32",
    )
    assert (verl.trainer.nnodes, verl.trainer.project_name, verl.trainer.rollout_data_dir) == (2, "mine", None)
    assert verl.ray_kwargs.ray_init.num_gpus == 1
    assert verl.actor_rollout_ref.rollout.engine_kwargs.vllm.max_num_seqs == 64
    assert verl.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "fp32"
    assert verl.data.train_batch_size == 64  # 16 GPUs


def test_workers_import_our_module_and_those_of_the_run() -> None:
    ours = "rest_rl.train.verl.beside_trl"
    assert composed().actor_rollout_ref.model.external_lib == [ours]
    both = composed(f"verl.{MODEL}.external_lib=another.module").actor_rollout_ref.model.external_lib
    assert both == [ours, "another.module"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verl.trainer.nnode=2", "unknown key verl.trainer.nnode, .*did you mean nnodes"),
        ("verl.trainr.nnodes=2", "unknown key verl.trainr, .*did you mean trainer"),
        (f"verl.{ROLLOUT}.engine_kwargs.vllm.max_num_seqs=64", "unknown key"),
        ("verl.trainer.nnodes.x=2", r"a table \[verl.trainer.nnodes\]"),
        ("verl.trainer.v1=2", "expected a table"),
        ("verl.colour=blue", r"got \[verl\] colour=blue"),
        (f"verl.{ACTOR}.loss_agg_mode=mean", "Invalid loss_agg_mode"),
        (f"verl.{ROLLOUT}.mode=sync", "sync"),
        (f"verl.{ROLLOUT}.+colour=blue", "colour"),
        ("verl.algorithm.+colour=blue", "colour"),
        (f"verl.{MODEL}.path=x", "model.path"),
        (f"verl.{ACTOR}.fsdp_config.param_offload=False", "param_offload = 'False', expected true or false"),
        (f"verl.{ROLLOUT}.+free_cache_engine=False", "free_cache_engine = 'False', expected true or false"),
        (f'verl.{ACTOR}.optim.lr="1e-6"', "lr = '1e-6', expected a number"),
        (f"verl.{ROLLOUT}.max_num_seqs=[1]", "expected a number"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        composed(override)
    assert str(caught.value).startswith("got "), caught.value


def test_settings_after_two_dashes_mean_what_they_mean_to_hydra() -> None:
    texts = (
        *(f"{ACTOR}.fsdp_config.param_offload=True", f"{ROLLOUT}.free_cache_engine=False", "trainer.logger=[console]"),
        *("trainer.rollout_data_dir=None", f"{ACTOR}.optim.lr=2e-6", "trainer.experiment_name=a b"),
        *(f"+{ROLLOUT}.engine_kwargs.vllm.limits={{a:null}}", f"{MODEL}.exclude_modules=lm_head"),
    )
    verl = composed(*map(verl_change, texts))
    again = composed(text=RunConfig.from_toml(RUN, map(verl_change, texts)).to_toml())  # a resumed run
    for it in (verl, again):
        assert it.actor_rollout_ref.actor.fsdp_config.param_offload is True
        assert it.actor_rollout_ref.rollout.free_cache_engine is False
        assert it.actor_rollout_ref.actor.optim.lr == 2e-6
        assert (it.trainer.logger, it.trainer.rollout_data_dir) == (["console"], None)
        assert it.trainer.experiment_name == "a b"
        assert it.actor_rollout_ref.rollout.engine_kwargs.vllm.limits == {"a": None}
        assert it.actor_rollout_ref.model.exclude_modules == "lm_head"


def test_a_text_may_stand_for_two_bounds() -> None:
    verl = composed("trl.use_vllm=true", 'verl.algorithm.rollout_correction.rollout_is_threshold="0.5_2.0"')
    assert verl.algorithm.rollout_correction.rollout_is_threshold == "0.5_2.0"


def test_a_resumed_run_is_not_measured_again() -> None:
    job = replace(SMALL, held_out_file=SMALL.train_file, resume_from=SMALL.folder / "checkpoints" / "global_step_5")
    verl = compose_config(RunConfig.from_toml(RUN, ["verl.trainer.val_before_train=true"]), job)
    assert verl.trainer.val_before_train is False


def test_a_group_chosen_for_verl_does_not_get_round_the_checks() -> None:
    with pytest.raises(ValueError, match="adv_estimator"):
        composed("rest.preset=grpo", "verl.algorithm.+adv_estimator=gae")


def test_text_that_looks_like_an_interpolation_stays_text() -> None:
    verl = composed('model.chat_template_kwargs.home="${HOME}"', 'verl.trainer.project_name="${oc.env:HOME}"')
    resolved = OmegaConf.to_container(verl, resolve=True)
    again = RunConfig.from_toml(resolved["rest"]["run"])
    assert again.model.chat_template_kwargs["home"] == "${HOME}"
    assert again.verl["trainer"]["project_name"] == "${oc.env:HOME}"
    assert resolved["trainer"]["project_name"] not in ("", "${oc.env:HOME}")

"""The composed configuration: verl's own validation accepts it, and each of our keys is one of verl's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.config import RunConfig, read_run_file
from rest_rl.errors import UserError
from rest_rl.train.verl.config import SCHEDULE_KEYS, compose_config, iter_leaves, make_initial_values
from tests.test_verl_config import ACTOR, BIG, MODEL, RECIPES, ROLLOUT, RUN, SMALL, gpus_of, shown

pytestmark = pytest.mark.verl
OmegaConf = pytest.importorskip("omegaconf").OmegaConf

CORRECTION = "algorithm.rollout_correction.rollout_is_threshold"


def composed(*overrides: str, text: str = RUN) -> Any:
    return compose_config(RunConfig.from_toml(text, overrides), SMALL)


def typed(*texts: str) -> str:
    return f"verl.overrides={json.dumps(texts)}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_verl_accepts_every_recipe(path: Path) -> None:
    config = read_run_file(path, [*gpus_of(path), *shown(path)])
    verl = compose_config(config, BIG)
    given = dict(iter_leaves(config.verl))
    for key, value in make_initial_values(config, BIG).items():
        found = OmegaConf.select(verl, key, throw_on_missing=True)
        if key in SCHEDULE_KEYS:
            assert found is not None
        elif key not in given and key != f"{ACTOR}.loss_scale_factor":
            assert found == value, key
    assert all(OmegaConf.select(verl, key) == value for key, value in given.items())
    assert RunConfig.from_toml(verl.rest.run).to_toml() == config.to_toml()
    assert verl.rest.folder == "/runs/mine"
    if path.stem != "own-tools":
        batches = (verl.data.train_batch_size, verl.actor_rollout_ref.actor.ppo_mini_batch_size)
        assert (*batches, verl.trainer.total_training_steps, verl.trainer.save_freq) == (512, 64, 105, 15)


@pytest.mark.parametrize("preset", ["rest", "rest_live", "authors-code", "grpo", "dr_grpo", "dapo"])
def test_every_preset(preset: str) -> None:
    verl = composed(f"rest.preset={preset}", "rest.format=toolrl")
    assert verl.algorithm.adv_estimator == "rest_group"
    assert verl.actor_rollout_ref.actor.loss_scale_factor == (100 if preset == "dr_grpo" else None)
    actor = verl.actor_rollout_ref.actor  # verl's own YAML: the objective has no other terms
    assert (actor.use_kl_loss, actor.entropy_coeff, verl.algorithm.use_kl_in_reward) == (False, 0, False)
    with_kl = composed(f"rest.preset={preset}", "rest.format=toolrl", "trl.beta=0.003").actor_rollout_ref.actor
    assert (with_kl.use_kl_loss, with_kl.kl_loss_coef, with_kl.kl_loss_type) == (True, 0.003, "low_var_kl")


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (("peft.r=8",), f"{MODEL}.lora_alpha", 16),
        (
            (f"verl.{ACTOR}.fsdp_config.mixed_precision.+param_dtype=fp32",),
            f"{ACTOR}.fsdp_config.mixed_precision",
            {"param_dtype": "fp32"},
        ),
        (("rest.preset=grpo", f"verl.{ACTOR}.use_kl_loss=true"), f"{ACTOR}.use_kl_loss", True),
        (("rest.preset=dr_grpo", "verl.data.max_response_length=70"), f"{ACTOR}.loss_scale_factor", 70),
        ((f"verl.{ROLLOUT}.name=sglang",), f"{ROLLOUT}.name", "sglang"),
        ((f'verl.{CORRECTION}="0.5_2.0"',), CORRECTION, "0.5_2.0"),
        (("verl.trainer.save_freq=-1",), "trainer.save_freq", 10),
        # without held-out rows
        (("verl.trainer.val_before_train=true", "verl.trainer.test_freq=2"), "trainer.test_freq", -1),
    ],
)
def test_further_overrides(overrides: tuple[str, ...], key: str, value: Any) -> None:
    assert OmegaConf.select(composed(*overrides), key) == value


@pytest.mark.parametrize("override", ["verl.model_engine=megatron", typed("model_engine=megatron")])
def test_megatron_is_selected_from_the_config_groups_of_verl(override: str) -> None:
    verl = composed(override, f"verl.{ACTOR}.megatron.tensor_model_parallel_size=2")
    assert verl.actor_rollout_ref.actor.strategy == "megatron"
    assert verl.actor_rollout_ref.actor.megatron.seed == 7
    assert verl.actor_rollout_ref.actor.megatron.tensor_model_parallel_size == 2
    with pytest.raises(UserError, match=r"\[peft\]"):
        composed(override, "peft.r=8")


def test_the_verl_table_is_applied_last() -> None:
    verl = composed(
        *("verl.trainer.nnodes=2", "verl.trainer.project_name=mine", "verl.trainer.rollout_data_dir=null"),
        *("verl.ray_kwargs.ray_init.+num_gpus=1", f"verl.{ROLLOUT}.engine_kwargs.vllm.+max_num_seqs=64"),
    )
    assert (verl.trainer.nnodes, verl.trainer.project_name, verl.trainer.rollout_data_dir) == (2, "mine", None)
    assert verl.ray_kwargs.ray_init.num_gpus == 1
    assert verl.actor_rollout_ref.rollout.engine_kwargs.vllm.max_num_seqs == 64
    assert verl.data.train_batch_size == 64  # 16 GPUs


def test_workers_import_the_shim_and_the_modules_of_the_run() -> None:
    ours = "rest_rl.train.verl.trl_shim"
    assert composed().actor_rollout_ref.model.external_lib == [ours]
    both = composed(f"verl.{MODEL}.external_lib=another.module").actor_rollout_ref.model.external_lib
    assert both == [ours, "another.module"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verl.trainer.nnode=2", "nnode"),
        ("verl.trainr.nnodes=2", "trainr"),
        (f"verl.{ROLLOUT}.engine_kwargs.vllm.max_num_seqs=64", "max_num_seqs"),
        ("verl.trainer.nnodes.x=2", "trainer.nnodes.x"),
        ("verl.trainer.v1=2", "trainer_mode"),
        ('verl.trainer.nnodes="two"', "rejects"),
        ("verl.trainer.nnodes=null", "rejects"),
        ("verl.color=blue", "color"),
        ("verl.rest.folder=x", "rest"),
        (f"verl.{ACTOR}.loss_agg_mode=mean", "Invalid loss_agg_mode"),
        (f"verl.{ROLLOUT}.mode=sync", "sync"),
        (f"verl.{ROLLOUT}.+color=blue", "color"),
        ("verl.algorithm.+color=blue", "color"),
        ("verl.algorithm.+adv_estimator=gae", "adv_estimator"),
        (typed("algorithm.adv_estimator=gae"), "adv_estimator"),
        (typed(f"{MODEL}.path=x"), "model.path"),
        (typed("trainer.nnodes"), "trainer.nnodes"),
        (typed("trainer.nnodes=[a"), r"\[a"),
        (typed("trainer.nnodes=1,2"), "Sweep"),
        (typed("~trainer.nnodes"), "rejects"),
        (typed("trainer.nnode=2"), "nnode"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed(override)


def test_settings_after_a_double_dash_follow_the_grammar_of_hydra() -> None:
    texts = (
        *(f"{ACTOR}.fsdp_config.param_offload=True", f"{ROLLOUT}.free_cache_engine=False", "trainer.logger=[console]"),
        *("trainer.rollout_data_dir=null", f"{ACTOR}.optim.lr=2e-6", "trainer.experiment_name=a b"),
        *(f"+{ROLLOUT}.engine_kwargs.vllm.limits={{a:null}}", f"{MODEL}.exclude_modules=lm_head"),
    )
    table = "verl.trainer.experiment_name=other"  # what stands after -- comes last
    verl = composed(table, typed(*texts))
    again = composed(text=RunConfig.from_toml(RUN, [table, typed(*texts)]).to_toml())  # a resumed run
    for it in (verl, again):
        assert it.actor_rollout_ref.actor.fsdp_config.param_offload is True
        assert it.actor_rollout_ref.rollout.free_cache_engine is False
        assert it.actor_rollout_ref.actor.optim.lr == 2e-6
        assert (it.trainer.logger, it.trainer.rollout_data_dir) == (["console"], None)
        assert it.trainer.experiment_name == "a b"
        assert it.actor_rollout_ref.rollout.engine_kwargs.vllm.limits == {"a": None}
        assert it.actor_rollout_ref.model.exclude_modules == "lm_head"


def test_text_that_looks_like_an_interpolation_stays_text() -> None:
    verl = composed('model.chat_template_kwargs.home="${HOME}"', 'verl.trainer.project_name="${oc.env:HOME}"')
    resolved = OmegaConf.to_container(verl, resolve=True)
    again = RunConfig.from_toml(resolved["rest"]["run"])
    assert again.model.chat_template_kwargs["home"] == "${HOME}"
    assert again.verl["trainer"]["project_name"] == "${oc.env:HOME}"
    assert resolved["trainer"]["project_name"] not in ("", "${oc.env:HOME}")

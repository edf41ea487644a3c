"""verl's private code that the plugin relies on; a failure here names what has moved upstream."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl: make test-verl"),
]

METHODS = {
    "_compute_advantage": ["self", "batch", "metrics"],
    "_compute_metrics": ["self", "batch", "metrics"],
    "_val_metrics_update": ["self", "data_sources", "sample_uids", "reward_extra_infos_dict"],
    "_save_checkpoint": ["self"],
    "_load_checkpoint": ["self"],
}
"""Methods of verl's trainer that ours overrides, with the parameters that it names."""


def trainer():
    from verl.trainer.ppo.v1 import PPOTrainerSync

    return PPOTrainerSync


@pytest.mark.parametrize("name", METHODS)
def test_the_overridden_methods(name):
    method = getattr(trainer(), name, None)
    assert callable(method), f"verl's trainer has no method {name}"
    parameters = list(inspect.signature(method).parameters)
    assert parameters[: len(METHODS[name])] == METHODS[name], f"{name} takes {parameters}"


def test_the_advantages_are_computed_after_the_entropies_and_before_the_update():
    source = inspect.getsource(trainer()._step_once)
    places = [source.find(name) for name in ("_compute_old_log_prob", "_compute_advantage", "_update_actor")]
    assert -1 not in places, "the step has other parts"
    assert places == sorted(places), "the step has another order"


def test_entropies_and_log_probabilities_stay_in_the_queue():
    source = inspect.getsource(trainer()._compute_old_log_prob)
    assert 'select("old_log_probs", "entropy")' in source, "the fields entropy and old_log_probs are not kept"
    assert "calculate_entropy" in source


def test_the_queue_has_these_fields():
    from rest_rl.train.verl.plugin import PER_RESPONSE
    from rest_rl.train.verl.responses import PER_TOKEN

    modules = ("trainer.ppo.v1.trainer_base", "experimental.agent_loop.agent_loop", "utils.dataset.rl_dataset")
    source = "".join(inspect.getsource(importlib.import_module(f"verl.{name}")) for name in modules)
    for name in {*PER_TOKEN, *PER_RESPONSE} - {"extra_info", "reward_model"}:  # columns of the dataset
        assert f'"{name}"' in source, f"the field {name} has another name"
    queue = inspect.getsource(importlib.import_module("verl.trainer.ppo.v1.agent_loop_tq"))
    assert "field.update(kwargs)" in queue, "the columns of the dataset do not come along"
    assert '"advantages"' in inspect.getsource(trainer()._compute_advantage)


def test_the_steps_and_their_total():
    from verl.trainer.ppo.v1 import PPOTrainer

    for method, name in (("_init_dataloader", "total_training_steps"), ("fit", "global_steps")):
        assert f"self.{name}" in inspect.getsource(getattr(PPOTrainer, method)), f"{method} does not set {name}"
    assert "optim.total_training_steps" in inspect.getsource(PPOTrainer._init_dataloader), "rewards have no total"
    assert '"global_steps"' in inspect.getsource(PPOTrainer._next_train_batch), "rewards have no step"
    setup = inspect.getsource(PPOTrainer._setup)
    assert setup.index("_init_dataloader") < setup.index("RewardLoopManager"), "rewards are made before the total"


def test_the_registries_and_the_driver_of_a_run():
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.trainer.ppo.v1 import get_trainer_cls

    from rest_rl.train.verl import plugin as verl_plugin

    assert get_trainer_cls("rest") is verl_plugin.ReSTPPOTrainer
    assert get_adv_estimator_fn("rest_group") is verl_plugin.group_advantage
    assert callable(TaskRunnerV1.__ray_metadata__.modified_class.run), "Ray keeps the class elsewhere"
    assert list(inspect.signature(run_ppo).parameters) == ["config", "task_runner_class"]


def test_the_agent_loop_gets_its_prompt_from_the_overridden_method():
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    assert inspect.iscoroutinefunction(SingleTurnAgentLoop.ct_build_initial_tokens)
    assert "self.ct_build_initial_tokens(" in inspect.getsource(SingleTurnAgentLoop.run)


def test_the_reward_manager_gets_one_response_at_a_time():
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

    assert inspect.iscoroutinefunction(RewardManagerBase.run_single)
    assert list(inspect.signature(RewardManagerBase.__init__).parameters)[1:] == [
        "config",
        "tokenizer",
        "compute_score",
    ]


@pytest.mark.parametrize("clip_c", [3.0, 1e9])
def test_weighting_the_advantage_weights_the_surrogate_in_verl_s_loss(clip_c):
    """Compares gradients with respect to the log-probabilities, also where verl's dual clip is active."""
    from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla

    generator = torch.Generator().manual_seed(0)
    old_BT = -torch.rand(6, 9, generator=generator)
    new_BT = (old_BT + torch.randn(6, 9, generator=generator)).requires_grad_()
    advantages_BT = torch.randn(6, 1, generator=generator).expand(6, 9)
    mask_BT = (torch.arange(9) < torch.tensor([[9], [5], [1], [9], [3], [0]])).float()
    weights_BT = torch.rand(6, 9, generator=generator) * 2 * mask_BT
    config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=clip_c)
    config.get, config.global_batch_info = lambda name, default=None: getattr(config, name, default), {}
    settings = {"loss_agg_mode": "seq-mean-token-mean", "config": config}
    loss, _ = compute_policy_loss_vanilla(old_BT, new_BT, advantages_BT * weights_BT, mask_BT, **settings)
    (gradient_BT,) = torch.autograd.grad(loss, new_BT)
    ratio_BT = (new_BT - old_BT).exp()
    surrogate_BT = torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(0.8, 1.2) * advantages_BT)
    capped_BT = torch.maximum(surrogate_BT, clip_c * advantages_BT)
    surrogate_BT = torch.where(advantages_BT < 0, capped_BT, surrogate_BT)
    expected = agg_loss(-weights_BT * surrogate_BT, mask_BT, "seq-mean-token-mean")
    (expected_BT,) = torch.autograd.grad(expected, new_BT)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-6, atol=1e-7)
    assert gradient_BT.abs().max() > 0

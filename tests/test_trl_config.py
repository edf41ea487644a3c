from __future__ import annotations

import json

import pytest
from trl import GRPOConfig

from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.presets import PRESETS, Preset
from rest_rl.rewards import RewardConfig
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from rest_rl.weights import WeightConfig, is_uniform
from tests.tiny_policy import tiny_model, tiny_samples, tiny_settings, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("rest", ("grpo", "group", 0.2, None)),
        ("dr_grpo", ("dr_grpo", "none", 0.2, None)),
        ("dapo", ("dapo", "group", 0.2, 0.28)),
    ],
)
def test_the_preset_decides_trl_settings(tmp_path, preset, expected):
    args = ResTConfig(**tiny_settings(tmp_path, preset=preset))
    assert (args.loss_type, args.scale_rewards, args.epsilon, args.epsilon_high) == expected
    assert args.beta == 0.0


def test_an_explicit_setting_is_kept_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="loss_type='dapo', but 'bnpo' was passed") as record:
        args = ResTConfig(**tiny_settings(tmp_path, preset="dapo", loss_type="bnpo", epsilon_high=0.3))
    assert any("epsilon_high=0.28, but 0.3 was passed" in str(warning.message) for warning in record)
    assert record[0].filename == __file__
    assert (args.loss_type, args.epsilon_high) == ("bnpo", 0.3)


def test_the_configuration_survives_json(tmp_path):
    changes = {"weights": {"strength": 0.25, "constants": {"name": 2.0}}, "reward": {"format_scale": 0.5}}
    args = ResTConfig(**tiny_settings(tmp_path, preset="rest", advantage="dr_grpo", **changes))
    written = json.loads(args.to_json_string())
    names = ("preset", "tool_format", "weights", "reward", "advantage", "entropy_decay", "loss_type", "scale_rewards")
    again = ResTConfig(**tiny_settings(tmp_path, **{name: written[name] for name in names}))
    assert again.method() == args.method()
    assert again.loss_type == "dr_grpo"
    assert args.method().weights.constants["name"] == 2.0
    assert args.method().weights.constants["format"] == 1.0


def test_a_preset_object_is_recorded_as_its_name_and_changes(tmp_path):
    preset = Preset("rest", WeightConfig(rule="inverse"), RewardConfig(), advantage="dapo", epsilon_high=0.3)
    args = ResTConfig(**tiny_settings(tmp_path, preset=preset))
    assert args.preset == "rest"
    assert args.method().weights == preset.weights
    assert (args.loss_type, args.epsilon_high) == ("dapo", 0.3)
    json.loads(args.to_json_string())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "best"}, ["'best'", "expected", "rest"]),
        ({"tool_format": "xml"}, ["'xml'", "expected", "toolrl"]),
        ({"advantage": "ppo"}, ["'ppo'", "dr_grpo"]),
        ({"entropy_decay": 1.0}, ["1.0", "[0, 1)"]),
        ({"weights": {"strenght": 1.0}}, ["strenght", "strength"]),
        ({"weights": {"strength": 2.0}}, ["2.0", "[0, 1]"]),
        ({"preset": "authors-code", "weights": {"strength": 0.5}}, ["strength", "rule"]),
        ({"entropy_coef": 0.01}, ["entropy_coef=0.01", "'grpo'"]),
        ({"use_adaptive_entropy": True}, ["use_adaptive_entropy", "'grpo'"]),
        ({"top_entropy_quantile": 0.2}, ["top_entropy_quantile=0.2", "'grpo'"]),
        ({"weights": {"rule": "collision"}, "top_p": 0.9}, ["collision", "top_p", "one_minus_exp"]),
        ({"preset": "grpo", "weights": {"dropped": ["reasoning"]}, "entropy_coef": 0.1}, ["entropy_coef=0.1"]),
        ({"preset": "grpo", "weights": {"gain_reasoning": 0.3}, "entropy_coef": 0.1}, ["entropy_coef=0.1"]),
        ({"preset": "authors-code", "tool_format": "hermes"}, ["hermes", "toolrl"]),
        ({"reward": {"rule": "authors-code"}, "tool_format": "hermes"}, ["hermes", "toolrl"]),
    ],
)
def test_refused_settings(tmp_path, changes, words):
    with pytest.raises(ValueError, match=r"expected|cannot be combined|cannot estimate|full marks") as error:
        ResTConfig(**tiny_settings(tmp_path, **changes))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "dapo"])
def test_uniform_weights_allow_every_setting_of_trl(tmp_path, preset):
    assert is_uniform(PRESETS[preset].weights)
    args = ResTConfig(**tiny_settings(tmp_path, preset=preset, beta=0.04, top_entropy_quantile=0.2))
    assert args.beta == 0.04


def test_refused_arguments(tokenizer, tmp_path):
    dataset = build_training_dataset(tiny_samples(), tokenizer)
    with pytest.raises(ValueError, match="GRPOConfig, expected a ResTConfig"):
        ResTTrainer(tiny_model(tokenizer), args=GRPOConfig(**tiny_settings(tmp_path)), train_dataset=dataset)
    with pytest.raises(ValueError, match="expected prompt and gold"):
        ResTTrainer(
            tiny_model(tokenizer),
            args=ResTConfig(**tiny_settings(tmp_path)),
            train_dataset=dataset.remove_columns("gold"),
            processing_class=tokenizer,
        )


def test_authors_code_supports_two_formats(tmp_path):
    with pytest.raises(ValueError, match="toolrl or hermes"):
        ResTConfig(**tiny_settings(tmp_path, preset="authors-code", tool_format="llama3"))
    assert ResTConfig(**tiny_settings(tmp_path, preset="rest", tool_format="qwen3_coder+think"))


def later(batch, statistics, progress):
    return 1.0 + batch.mask_BT.cumsum(-1)


@pytest.mark.parametrize(
    ("changes", "rule", "word"),
    [
        ({"entropy_coef": 0.04}, later, "entropy_coef=0.04"),
        ({"top_entropy_quantile": 0.2}, later, "top_entropy_quantile=0.2"),
        ({"top_p": 0.9}, WeightConfig(rule="collision"), "collision"),
        ({"tool_format": "llama3"}, PRESETS["authors-code"].weights, "llama3"),
    ],
)
def test_a_rule_passed_to_the_trainer_is_checked_like_that_of_a_preset(tokenizer, tmp_path, changes, rule, word):
    args = ResTConfig(**tiny_settings(tmp_path, preset="grpo", **changes))
    with pytest.raises(UserError, match=word):
        ResTTrainer(
            tiny_model(tokenizer),
            args=args,
            train_dataset=build_training_dataset(tiny_samples(), tokenizer),
            processing_class=tokenizer,
            weight_rule=rule,
        )


def test_the_default_length_of_a_response_is_the_trainers() -> None:
    assert RunConfig().max_response_tokens == GRPOConfig.max_completion_length

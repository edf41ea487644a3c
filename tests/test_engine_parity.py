"""Both engines train with the same defaults, and neither defines one. Needs no verl."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rest_rl.config import ENTROPY_DECAY, RunConfig
from rest_rl.presets import PRESETS
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.trl.settings import make_trainer_config, with_machine_defaults
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from rest_rl.train.verl.config import ACTOR, ROLLOUT, make_initial_values
from rest_rl.train.verl.responses import parse_run
from rest_rl.train.weighing import EntropyTracker
from tests.test_verl_config import BIG
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

PLUGIN = Path(inspect.getfile(parse_run)).with_name("plugin.py")


def run(out: Path, *overrides: str) -> RunConfig:
    """A run that sets only its folder; the command resolves the format before an engine gets it."""
    config = with_machine_defaults(RunConfig.from_toml("", [f'run.out="{out}"', *overrides]))
    return replace(config, rest=replace(config.rest, format="toolrl"))


def on_trl(config: RunConfig) -> dict[str, Any]:
    """The settings of a built TRL trainer."""
    args, tokenizer = make_trainer_config(config), tiny_tokenizer()
    assert isinstance(args, ResTConfig)
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        args=args,
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
    )
    held: Any = trainer.args
    return {
        "entropy_decay": trainer.tracker.decay,
        "method": held.method(),
        "format": held.tool_format,
        "clip": (held.epsilon, held.epsilon if held.epsilon_high is None else held.epsilon_high),
        "by spread": held.scale_rewards == "group",
        "kl": held.beta,
        "temperature": held.temperature,
        "seed": held.seed,
    }


def on_verl(config: RunConfig) -> dict[str, Any]:
    """The settings that the plugin reads from verl's configuration, and those passed to verl."""
    table, method, tool_format, tracker = parse_run(config.to_toml())
    composed = make_initial_values(config, BIG)
    return {
        "entropy_decay": tracker.decay,
        "method": method,
        "format": tool_format.name,
        "clip": (composed[f"{ACTOR}.clip_ratio_low"], composed[f"{ACTOR}.clip_ratio_high"]),
        "by spread": composed["algorithm.norm_adv_by_std_in_grpo"],
        "kl": float(composed.get(f"{ACTOR}.use_kl_loss", False)),  # verl's own YAML has it off
        "temperature": composed[f"{ROLLOUT}.temperature"],
        "seed": table.seed,
    }


def test_the_engines_agree_on_every_default(tmp_path: Path) -> None:
    config = run(tmp_path)
    trl = on_trl(config)
    assert trl == on_verl(config)
    assert trl["entropy_decay"] == ENTROPY_DECAY == 0.7
    assert trl["method"] == PRESETS["rest"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "rest"])
def test_the_engines_agree_on_every_preset(tmp_path: Path, preset: str) -> None:
    config = run(tmp_path, f"rest.preset={preset}")
    assert on_trl(config) == on_verl(config)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_decay_reaches_both_engines(tmp_path: Path, decay: float) -> None:
    config = run(tmp_path, f"rest.entropy_decay={decay}")
    assert on_trl(config)["entropy_decay"] == on_verl(config)["entropy_decay"] == decay


def test_no_engine_defines_a_decay_default() -> None:
    assert inspect.signature(EntropyTracker).parameters["decay"].default is inspect.Parameter.empty
    assert inspect.signature(ResTConfig).parameters["entropy_decay"].default == ENTROPY_DECAY
    assert "EntropyTracker" not in PLUGIN.read_text(encoding="utf-8")  # it takes the tracker of parse_run


def test_a_recorded_run_contains_the_decay_and_old_runs_get_the_same() -> None:
    recorded = RunConfig.from_toml("").to_toml()
    line = f"entropy_decay = {ENTROPY_DECAY}\n"
    assert line in recorded
    assert RunConfig.from_toml(recorded.replace(line, "")).to_toml() == recorded


def test_a_supervised_preset_refuses_only_a_decay_that_was_changed() -> None:
    config = RunConfig.from_toml("", ["rest.preset=sft", f"rest.entropy_decay={ENTROPY_DECAY}"])
    assert "entropy_decay" not in config.to_toml()
    for decay in (0.0, 0.5):
        with pytest.raises(ValueError, match=rf"rest\.entropy_decay is {decay}, but preset 'sft' is supervised"):
            RunConfig.from_toml("", ["rest.preset=sft", f"rest.entropy_decay={decay}"])

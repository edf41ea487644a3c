"""Run files: what is read, what is refused and how, and that what is written reads back the same."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import rest_rl
from rest_rl.cli.app import main
from rest_rl.cli.train import lora_overrides
from rest_rl.config import (
    RENAMED_KEYS,
    EvalTable,
    RunConfig,
    parse_recorded_run,
    parse_toml,
    read_asset,
    read_run_file,
)
from rest_rl.errors import RenamedWarning, UserError
from rest_rl.presets import PRESETS


def test_the_embedded_run_survives_a_round_trip() -> None:
    config = read_run_file(None)
    again = RunConfig.from_toml(config.to_toml())
    assert again.to_toml() == config.to_toml()
    assert again.rest.resolve() == config.rest.resolve()
    assert again.trl == config.trl


def test_smollm2_in_the_office_starts_from_the_adapter_of_this_package() -> None:
    model, office = 'model.path="smollm2"', 'data.path="office"'
    for overrides in ([model, office], [office]):
        assert read_run_file(None, overrides).model.adapter == "smollm2-office"
    assert read_run_file(None, [model, office, 'model.adapter=""']).model.adapter == ""
    for overrides in ([model], ['model.path="other"', office], [model, office, 'rest.preset="sft"']):
        config = read_run_file(None, overrides)
        assert config.model.adapter == ""
        assert config.run.out != "runs/office"


def test_lora_multiplies_the_learning_rate_unless_the_run_has_an_adapter() -> None:
    own, data = 'model.path="a"', 'data.path="a.jsonl"'
    for changes, rate in (
        ([own, data], "1e-05"),
        ([own, data, 'rest.preset="sft"'], "0.0001"),
        (['model.path="smollm2"', data], "0.0002"),
    ):
        assert lora_overrides(4, changes, is_own=True) == ["peft.r=4", f"trl.learning_rate={rate}"]
        assert lora_overrides(4, changes, is_own=False) == ["peft.r=4"]
        assert lora_overrides(None, changes, is_own=True) == []
    assert lora_overrides(4, ['data.path="office"'], is_own=True) == ["peft.r=4"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_run_of_every_preset_survives_a_round_trip(preset: str) -> None:
    config = RunConfig.from_toml("", [f"rest.preset={preset}"])
    again = RunConfig.from_toml(config.to_toml())
    assert again.rest.resolve() == config.rest.resolve() == PRESETS[preset]


def test_set_takes_toml_values_and_bare_words() -> None:
    overrides = ["run.seed=7", "rest.preset=grpo", 'run.out="a b"', "trl.learning_rate=3e-4", "trl.bf16=false"]
    config = RunConfig.from_toml(read_asset(), [*overrides, "rest.weights.strength=0.25"])
    assert (config.run.seed, config.rest.preset, config.run.out) == (7, "grpo", "a b")
    assert (config.trl["learning_rate"], config.trl["bf16"]) == (3e-4, False)
    assert config.rest.resolve().weights.strength == 0.25


def test_changing_one_constant_keeps_the_others() -> None:
    weights = (
        RunConfig.from_toml("", ["rest.weights.rule=constant", "rest.weights.constants.name=2"]).rest.resolve().weights
    )
    assert weights.constants["name"] == 2.0
    assert set(weights.constants) == set(PRESETS["rest"].weights.constants)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nsed = 1", r"unknown key run\.sed, expected one of engine, .*seed.*; did you mean seed\?"),
        (
            "[runs]\nseed = 1",
            r"unknown key runs, expected one of data, env, eval, model, peft, rest, run, trl, verl; did you mean run\?",
        ),
        ("[rest.weights]\nstrenght = 1", r"unknown key rest\.weights\.strenght.*did you mean strength\?"),
        ("[rest.weights]\nrule = 'best'", r"rest\.weights\.rule is 'best', expected one of one_minus_exp"),
        ("[run]\nseed = 'a'", r"run\.seed is 'a', expected a whole number"),
        ("[run]\nseed = true", r"run\.seed is True, expected a whole number"),
        ("[rest.weights]\nscope = 'name'", r"rest\.weights\.scope is 'name', expected a list"),
        ("[rest.weights]\nconstants = 1", r"rest\.weights\.constants is 1, expected a table"),
        ("[rest.weights.constants]\nname = 'a'", r"rest\.weights\.constants\.name is 'a', expected a number"),
        ("[data]\nallow = 'a'", r"data\.allow is 'a', expected a list"),
        ("[data]\nallow = ['a', 1]", r"data\.allow\.1 is 1, expected text"),
        ("[data]\nkeep_prompts = 'yes'", r"data\.keep_prompts is 'yes', expected true or false"),
        ("[data]\nmask_names = 2", r"data\.mask_names is 2, expected at most 1"),
        ("[model]\ndtype = 'int8'", r"model\.dtype is 'int8', expected one of 'auto'"),
        ("run = 3", r"run is 3, expected a table; write \[run\]"),
        ("[rest]\npreset = 'best'", r"preset 'best', expected one of rest, rest_live"),
        (
            "[rest]\npreset = 'authors-code'\n[rest.weights]\nstrength = 1.0",
            r"unknown key rest\.weights\.strength",
        ),
        (
            "[rest]\nadvantage = 'ppo'",
            r"rest\.advantage is 'ppo', expected one of 'grpo', .* or 'weighted_token_mean'",
        ),
        ("[run", r"is not valid TOML .*; correct the syntax"),
    ],
)
def test_a_mistake_in_a_file_states_the_problem_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_toml(text).rest.resolve()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "--set run.seed is not an assignment, expected --set table.key=value"),
        ("=3", "expected --set table.key=value"),
        ("run.seed=", "is not a TOML value"),
        ("run.seed=1\nmore=2", "sets several keys; use one --set per key"),
        ("run.seed.deeper=1", "seed is not a table; set seed itself"),
        ("run.out=a b", "quote strings"),
    ],
)
def test_a_mistake_in_an_override_states_the_problem(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig.from_toml("[run]\nseed = 0", [override])


@pytest.mark.parametrize(
    ("override", "least"),
    [
        ("run.seed=-1", 0),
        ("run.show_every=-1", 0),
        ("run.recorded_responses=-1", 0),
        ("data.num_samples=0", 1),
        ("eval.prompts=-1", 0),
        ("eval.samples_per_prompt=0", 1),
        ("eval.batch_size=0", 1),
        ("eval.max_new_tokens=-1", 0),
    ],
)
def test_numbers_have_a_lower_bound(override: str, least: int) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"{key} is {value}, expected at least {least}"):
        RunConfig.from_toml("", [override])
    RunConfig.from_toml("", [f"{key}={least}"])


def test_seed_has_32_bits() -> None:
    with pytest.raises(ValueError, match=r"run\.seed is 4294967296, expected less than 4294967296"):
        RunConfig.from_toml("", [f"run.seed={2**32}"])


def test_a_held_out_file_for_the_tool_world_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.held_out is 'a\.jsonl', but data\.path 'embedded' has its own"):
        RunConfig.from_toml("", ["data.held_out=a.jsonl"])
    RunConfig.from_toml("", ["data.held_out=a.jsonl", "data.path=b.jsonl"])


@pytest.mark.parametrize("world", ["office", "shop"])
def test_the_other_worlds_have_their_own_held_out_sets_and_no_decision(world: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.path '{world}' has its own"):
        RunConfig.from_toml("", ["data.held_out=a.jsonl", f"data.path={world}"])
    with pytest.raises(ValueError, match=r"data\.decision is 'call'"):
        RunConfig.from_toml("", ["data.decision=call", f"data.path={world}"])
    assert RunConfig.from_toml("", ["eval.every=5", f"data.path={world}"]).eval.every == 5


def test_a_table_built_in_python_is_validated() -> None:
    with pytest.raises(UserError, match=r"eval\.samples_per_prompt is 0, expected at least 1"):
        EvalTable(samples_per_prompt=0)
    with pytest.raises(UserError, match=r"run\.seed is 'a', expected a whole number"):
        replace(RunConfig().run, seed="a")


def test_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml \(No such file or directory\)"):
        read_run_file("nowhere.toml")


# Renamed keys


RENAMED = {
    "run.responses_per_step": "3",
    "data.keep": "['duplicate']",
    "data.samples": "70",
    "eval.samples": "4",
    "eval.slice": "9",
}


def toml_of(keys: Mapping[str, str]) -> str:
    return "".join(f"{key} = {value}\n" for key, value in keys.items())


@pytest.mark.parametrize("way", ["file", "tables", "override", "table override"])
@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_works_and_the_warning_names_the_new_one(old: str, way: str) -> None:
    (table, key), new, value = old.split("."), RENAMED_KEYS[old], RENAMED[old]
    expected = RunConfig.from_toml(f"{new} = {value}")
    ways = {
        "file": lambda: RunConfig.from_toml(f"{old} = {value}"),
        "tables": lambda: RunConfig.from_tables(parse_toml(f"{old} = {value}", "")),
        "override": lambda: RunConfig.from_toml("", [f"{old}={value}"]),
        "table override": lambda: RunConfig.from_toml("", [f"{table}={{{key} = {value}}}"]),
    }
    with pytest.warns(RenamedWarning, match=f"{re.escape(old)} has been renamed to {re.escape(new)};"):
        config = ways[way]()
    assert config == expected != RunConfig()


def test_an_override_with_either_name_changes_a_file_with_either_name() -> None:
    for old, new in RENAMED_KEYS.items():
        for first, second in ((old, new), (new, old)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RenamedWarning)
                config = RunConfig.from_toml(f"{first} = {RENAMED[old]}", [f"{second}={RENAMED[old]}"])
            assert config == RunConfig.from_toml(f"{new} = {RENAMED[old]}")


def test_a_file_with_the_old_and_the_new_name_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"eval\.samples and eval\.samples_per_prompt are both set, .*; remove eval\.samples$"
    ):
        RunConfig.from_toml("[eval]\nsamples = 2\nsamples_per_prompt = 2")


def test_the_old_keys_of_a_run_folder_are_read_without_a_warning(tmp_path: Path) -> None:
    recorded = tmp_path / "config.toml"
    recorded.write_text(toml_of(RENAMED))
    (tmp_path / "environment.json").write_text("{}")
    expected = RunConfig.from_toml(toml_of({RENAMED_KEYS[old]: value for old, value in RENAMED.items()}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_run_file(recorded) == expected
        assert RunConfig.from_tables(parse_recorded_run(recorded.read_text(), "")) == expected
    (tmp_path / "environment.json").unlink()  # a run file that happens to be called config.toml
    with pytest.warns(RenamedWarning):
        read_run_file(recorded)


def test_the_command_prints_an_old_key_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[eval]\nslice = 9\n")
    warnings.simplefilter("default", RenamedWarning)
    main(["train", str(run_file), "--dry-run", "--set", "data.samples=50"])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: eval.slice has been renamed to eval.interim_prompts; the old name still works",
        "warning: data.samples has been renamed to data.num_samples; the old name still works",
    ]


@pytest.mark.parametrize(
    ("old", "new"), [("token_weights", "compute_token_weights"), ("training_dataset", "build_training_dataset")]
)
def test_an_old_name_of_the_package_works_and_warns(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"^rest_rl.{old} has been renamed to rest_rl.{new};") as caught:
        assert getattr(rest_rl, old) is getattr(rest_rl, new)
    assert caught[0].filename == __file__
    assert old not in dir(rest_rl)
    assert new in dir(rest_rl)

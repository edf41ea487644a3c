"""The commands of docs/reproduce.md: each is accepted, and each run file with its settings is a valid run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from rest_rl.cli.app import app, main, split_overrides
from rest_rl.config import RunConfig, read_run_file
from rest_rl.train.trl.settings import make_trainer_config
from tests.test_readme import ROOT, without_calls

PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`((?:rest-rl|on8|zero8) (?:train|eval|probe|report) [^`]*)`", PAGE)) - {
    "rest-rl train FILE --engine verl", "on8 train FILE",
})  # fmt: skip
TRAINING = [command for command in COMMANDS if command.split()[1] == "train"]
HERE = ("trl.use_vllm=false", "trl.use_cpu=true")
"""Overrides for a machine without GPU and vLLM."""


def read_run(command: str) -> RunConfig:
    _, _, path, *options = shlex.split(command)
    pairs = list(zip(options[::2], options[1::2], strict=True))
    assert {option for option, _ in pairs} <= {"--set", "--out"}
    overrides = [value for option, value in pairs if option == "--set"]
    outs = [f"run.out={value}" for option, value in pairs if option == "--out"]
    return read_run_file(ROOT / path, [*overrides, *outs, *HERE])


def settings(command: str) -> dict[str, Any]:
    preset = read_run(command).rest.resolve()
    return {"advantage": preset.advantage, "reward": preset.reward, "weights": preset.weights}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command: str) -> None:
    given, rest = split_overrides(shlex.split(command)[1:])
    parser = without_calls(typer.main.get_command(app))
    with parser.make_context("rest-rl", given, obj=rest) as context:
        parser.invoke(context)


@pytest.mark.parametrize("command", TRAINING)
def test_every_run_is_valid(command: str) -> None:
    config = read_run(command)
    make_trainer_config(config)
    if not config.rest.is_supervised:
        config.rest.resolve()
    shortcut, name = command.split(maxsplit=1)[0], Path(shlex.split(command)[2]).stem
    assert (shortcut == "rest-rl") is name.endswith("1gpu")
    assert (shortcut == "zero8") is name.startswith("sft-llama")


def test_every_grid_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^ {4}(rest-rl compare .*)$", PAGE, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        command = [str(tmp_path) if word.startswith("runs/") else word for word in shlex.split(line)[1:]]
        assert main([*command, "--set", "trl.use_vllm=false", "--dry-run"]) == 0


def test_every_run_has_its_own_folder() -> None:
    folders: dict[str, str] = {}
    for command in TRAINING:
        assert folders.setdefault(read_run(command).run.out, command) == command
    # what is trained and used afterwards is written by a command of the page
    used = set(re.findall(r"(?:model.path=|--model |report |table )((?:runs/[\w.-]+ ?)+)", PAGE))
    used = {word.removesuffix("/model") for words in used for word in words.split()}
    assert {folder for folder in used if not folder.startswith("runs/eval-")} <= set(folders)


def test_rows_differ_only_in_what_they_name() -> None:
    find = {read_run(command).run.out.removeprefix("runs/qwen3-8b-"): command for command in TRAINING}
    rest, grpo = settings(find["full"]), settings(find["grpo"])
    assert rest["reward"] == grpo["reward"]
    for name in ("grpo-static", "dr-grpo", "dapo", "sft-grpo"):
        reward = settings(find[name])["reward"]
        assert (reward.accuracy_share_start, reward.accuracy_share_end) == (0.857, 0.857)
    assert settings(find["grpo-static"])["weights"] == grpo["weights"]
    assert settings(find["no-dynamic-reward"])["weights"] == rest["weights"]
    reward = settings(find["no-dynamic-reward"])["reward"]
    mean = (rest["reward"].accuracy_share_start + rest["reward"].accuracy_share_end) / 2
    assert reward.accuracy_share_start == reward.accuracy_share_end == mean
    assert settings(find["no-curriculum"])["reward"] == rest["reward"]
    weights = settings(find["no-curriculum"])["weights"]
    assert weights.decay_format == weights.gain_arguments == weights.gain_reasoning == 0
    assert [read_run(find[name]).trl["beta"] for name in ("full", "kl-0.003")] == [0.0, 0.003]

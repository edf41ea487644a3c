"""User objects as the docs show them: a weight rule, rewards, a format; and errors for wrong ones."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import rest_rl
from rest_rl.cli.app import main
from rest_rl.config import parse_toml, read_asset, read_run_file
from rest_rl.formats import FORMATS, HermesFormat, OpenedThinkFormat, get_format
from rest_rl.presets import PRESETS
from rest_rl.response import Region, ToolCall
from rest_rl.runlog import read_run
from tests.test_cli import error_of
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

PAGE = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("### Custom weight rules and rewards") :]
RULE, REWARD, REWARD_FUNCS = re.findall("```python\n(.*?)```", SECTION, re.DOTALL)[:3]
TRAINING = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
(FORMAT,) = re.findall("### Custom formats.*?```python\n(.*?)```", TRAINING, re.DOTALL)
SHORT = [
    *("--set", "eval.prompts=0", "--set", "trl.max_steps=1", "--set", "trl.per_device_train_batch_size=8"),
    *("--set", "data.num_samples=16", "--set", "trl.steps_per_generation=1"),
]
CALL = ToolCall("f", {"a": 1})


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    code, table = (re.search(f"```{kind}\n(.*?)```", SECTION, re.DOTALL)[1] for kind in ("python", "toml"))
    (tmp_path / "my_rules.py").write_text(code)
    run = parse_toml(read_asset(), "the embedded run")
    run["run"] = {**run.get("run", {}), "out": str(tmp_path / "out"), "show_every": 0}
    run["eval"] = {**run.get("eval", {}), "prompts": 0}
    run["rest"] = {"preset": "grpo", **parse_toml(table, "docs")["rest"]}
    run["trl"] = {
        **run["trl"],
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations": 8,
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(run))
    return path


def test_a_rule_next_to_the_run_file_trains(run_file: Path) -> None:
    result = rest_rl.train(run_file)
    row = read_run(result.folder).metrics[0]
    assert result.steps == 1
    # 3 on names and arguments, 1 elsewhere, in every response by the same mean: nothing in between but their means
    assert row["rest/weight/arguments"] > 2 * row["rest/weight/format"]
    assert row["rest/weight/name"] > 2 * row["rest/weight/format"]
    again = read_run_file(result.folder / "config.toml").rest.weights
    assert (again["rule"], again["factor"]) == ("my_rules:CallsFirst", 3.0)


def test_a_reward_in_the_current_directory_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(REWARD)
    (rule,) = re.findall(r"--set (rest\.reward\.rule=\S+)", SECTION)
    assert main(["train", *SHORT, "--set", rule, "--out", "run"]) == 0
    row = read_run(tmp_path / "run").metrics[0]
    # S_format + 2 S_acc + what is left for brevity, at most 0.2
    assert 0 < row["reward"] - row["rest/format"] - 2 * row["rest/accuracy"] < 0.2


def test_reward_functions_of_trl_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    names: dict[str, Any] = {"rest_rl": rest_rl, "tokenizer": tokenizer, "model": tiny_model(tokenizer)}
    names["samples"] = tiny_samples(8)
    code = REWARD_FUNCS.replace('"out",', '"out", max_completion_length=8, report_to=[], disable_tqdm=True,')
    exec(compile(code, "method.md", "exec"), names)
    assert [reward.__name__ for reward in names["rewards"]] == ["tool_reward", "one_sentence"]


def test_a_format_in_the_current_directory_reads_writes_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_format.py").write_text(FORMAT)
    mine = get_format("my_format:MINE")
    text = mine.render(None, [CALL, CALL], "Wait.")
    parsed = mine.parse(text)
    assert (parsed.calls, parsed.answer, parsed.well_formed) == ((CALL, CALL), "Wait.", True)
    assert [text[a:b] for a, b, region in parsed.spans if region is Region.NAME] == ["f", "f"]
    assert mine.parse("CALL f " + "[" * 100_000).unreadable_calls == 1
    assert main(["train", *SHORT, "--format", "my_format:MINE", "--out", "run"]) == 0
    assert read_run_file(tmp_path / "run" / "config.toml").rest.format == "my_format:MINE"


WRONG = {
    "format without spans": ("--format", FORMAT.replace(", *, spans=True", "").replace(" if spans else ()", "")),
    "format that does not read what it writes": ("--format", FORMAT.replace('f"CALL {', 'f"CALLED {')),
    "format with a wrong span": ("--format", FORMAT.replace("bounds = (", "bounds = (9 + ")),
    "format that answers None": (
        "--format",
        FORMAT.replace("        return ParsedResponse(", "        ParsedResponse("),
    ),
    "reward of one argument": ("reward", "def MINE(judgement): return 1.0"),
    "reward that fails on an answer": (
        "reward",
        "def MINE(judgement, progress, step): return 1 / len(judgement.gold.calls)",
    ),
    "reward that is not finite": ("reward", "def MINE(judgement, progress, step): return float('nan')"),
    "weights of one argument": ("weights", "def MINE(batch): return batch.mask_BT"),
    "shape of no argument": (
        "source",
        "class S:\n name='s'\n matches=lambda self: 1\n read=lambda self, row, context: ()\nMINE=S()",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_object_is_a_one_line_error_before_the_run_folder_exists(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    part, code = WRONG[what]
    module = "wrong_" + re.sub(r"\W", "_", what)
    Path(f"{module}.py").write_text(code)
    (tmp_path / "d.jsonl").write_text("")
    option = {
        "--format": ["--format", f"{module}:MINE"],
        "source": ["--data", "d.jsonl", "--set", f"data.source={module}:MINE", "--set", "trl.max_completion_length=64"],
    }.get(part, ["--set", f"rest.{part}.rule={module}:MINE"])
    capsys.readouterr()
    assert f"{module}:MINE" in error_of(capsys, "train", *SHORT, *option, "--out", "run")
    assert not (tmp_path / "run").exists()


MINE = HermesFormat(name="mine")


def test_a_trainer_records_a_format_object_by_its_address(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": []}
    here = f"{__name__}:MINE"
    for given, recorded in ((MINE, here), (OpenedThinkFormat(MINE), f"{here}+think"), (FORMATS["llama3"], "llama3")):
        args = rest_rl.ResTConfig(str(tmp_path), tool_format=given, **settings)  # type: ignore[arg-type]
        assert args.tool_format == args.to_dict()["tool_format"] == recorded
        assert get_format(args.tool_format) == given
    with pytest.raises(rest_rl.UserError, match="not an attribute of a module"):
        rest_rl.ResTConfig(str(tmp_path), tool_format=HermesFormat(name="lost"), **settings)  # type: ignore[arg-type]


def test_a_trainer_records_a_preset_object_by_its_changes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": []}
    mine = replace(PRESETS["grpo"], reward=own_reward)
    args = rest_rl.ResTConfig(str(tmp_path), preset=mine, **settings)  # type: ignore[arg-type]
    assert (args.preset, args.reward) == ("grpo", {"rule": f"{__name__}:own_reward"})
    for wrong in (replace(mine, name="mine"), replace(mine, reward=lambda *_: 0.0)):
        with pytest.raises(rest_rl.UserError, match=r"checkpoint can(not)? record"):
            rest_rl.ResTConfig(str(tmp_path), preset=wrong, **settings)  # type: ignore[arg-type]


def own_reward(judgement: Any, progress: float, step: float | None = None) -> float:
    return judgement.accuracy

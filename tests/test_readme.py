"""The Python example of README.md runs, and the command lines of README.md, docs/ and examples/ are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from rest_rl.cli.app import app, main, split_overrides
from rest_rl.runlog import read_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = python_blocks(README)
    monkeypatch.chdir(tmp_path)
    for seed, part in enumerate(("train", "test")):
        assert main(["data", "world", "--out", f"dialogues.{part}.jsonl", "-n", "16", "--seed", str(seed)]) == 0
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    (parts,) = (block for block in python_blocks(TRAINING) if "ResTTrainer" in block)
    exec(compile(parts, "docs/training.md", "exec"), names)
    assert names["checked"].kept == 16
    assert names["result"].steps == len(read_run(tmp_path / "runs" / "mine").metrics) == 2
    assert {name: score.n for name, score in names["evaluation"].scores().items()} == {
        "unseen_tools": 2,
        "unseen_values": 2,
        "overall": 4,
    }
    assert names["judgement"].format == 1
    assert names["weights_BT"].mean() == pytest.approx(1)
    assert torch.equal(names["advantages_BT"], 0.5 * names["weights_BT"])


def command_lines() -> list[str]:
    """Return the lines of code blocks that call rest-rl, without comments and continuations."""
    paths = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    pages = [README, *(path.read_text(encoding="utf-8") for path in paths)]
    whole = [page.replace("\\\n", " ") for page in pages]  # join continued lines
    found = [line for page in whole for line in re.findall(r"^ {4}(rest-rl .*)$", page, re.MULTILINE)]
    return sorted({re.split(r"\s#\s", line)[0].strip() for line in found})


def without_calls(command: Any) -> Any:
    """Replace the function of every command by one that does nothing."""
    for verb in getattr(command, "commands", {}).values():
        without_calls(verb)
    if not getattr(command, "commands", {}):
        command.callback = lambda **options: 0
    return command


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_are_accepted(line: str) -> None:
    given, settings = split_overrides(shlex.split(line)[1:])
    command = without_calls(typer.main.get_command(app))
    with command.make_context("rest-rl", given, obj=settings) as context:
        command.invoke(context)

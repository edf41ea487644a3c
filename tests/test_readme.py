"""What README.md prints: its Python runs as it stands, its command lines are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from rest_rl.cli.app import app, main, split_overrides
from rest_rl.runlog import read_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        assert main(["data", "world", "--out", f"dialogues.{part}.jsonl", "-n", "16"]) == 0
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["checked"].kept == 16
    assert names["result"].steps == len(read_run(tmp_path / "runs" / "mine").metrics) == 2
    assert names["evaluation"].summary["done"] == 2


def command_lines() -> list[str]:
    """The lines of code blocks that call the command, without comments and line ends."""
    pages = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
    whole = [page.replace("\\\n", " ") for page in pages]  # a line that ends in a backslash goes on
    found = [line for page in whole for line in re.findall(r"^ {4}(rest-rl .*)$", page, re.MULTILINE)]
    return sorted({re.split(r"\s#\s", line)[0].strip() for line in found})


def without_calls(command: Any) -> Any:
    """The command with every verb's function replaced by one that does nothing."""
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

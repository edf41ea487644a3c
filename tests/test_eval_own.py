"""A user's own benchmark, as docs/evaluation.md shows it: from the command line, from Python, compared, tabulated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import rest_rl.evaluate
from rest_rl.cli.app import main
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Model, Reply, Request
from rest_rl.evaluate.run import EvalResult

EXAMPLE = Path(__file__).parents[1] / "docs" / "evaluation.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the benchmark from the documentation."""
    (code,) = re.findall(r"```python\n(# my_bench\.py.*?)```", EXAMPLE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "my_bench.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


class Lazy(Model):
    """Only answers the easy sums."""

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        return [self.reply(request) for request in requests]

    def reply(self, request: Request) -> Reply:
        (call,) = request.sample.gold.calls
        is_easy = sum(call.arguments.values()) < 10
        return Reply(json.dumps(call.arguments), calls=(call,)) if is_easy else Reply("no idea")


def test_the_command_runs_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", "my_bench:BENCH", "--oracle", "--out", "gold", "--format", "hermes"]) == 0
    summary = json.loads((here / "gold" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["benchmark"], summary["group_field"]) == ("sums", "size")
    assert {name: group["correct"] / group["n"] for name, group in summary["groups"].items()} == {
        "small": 1.0, "large": 1.0, "overall": 1.0
    }  # fmt: skip
    assert main(["eval", "run", "my_bench:BENCH", "--oracle", "--out", "part", "--categories", "small"]) == 0
    assert {json.loads(line)["size"] for line in (here / "part" / "samples.jsonl").open()} == {"small"}
    assert main(["eval", "table", "gold", "part", "--out", "t"]) == 0
    assert "| gold | " not in capsys.readouterr().out


def test_python_runs_it_and_its_groups_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from my_bench import BENCH  # pyright: ignore[reportMissingImports]

    result = rest_rl.evaluate(BENCH, Lazy(), out="lazy")
    assert isinstance(result, EvalResult)
    assert result.failed == []
    scores = result.scores()
    assert scores["small"].accuracy == 1.0
    assert scores["large"].accuracy == 0.0
    assert scores["overall"].n == len(result.rows) == len(BENCH.groups)
    with pytest.raises(UserError, match="already contains an evaluation"):
        rest_rl.evaluate(BENCH, Lazy(), out="lazy")
    again = rest_rl.evaluate(BENCH, Lazy(), out="lazy", resume=True)
    assert again.rows == result.rows
    rest_rl.evaluate("my_bench:BENCH", oracle=True, out="gold")
    assert main(["eval", "diff", "lazy", "gold", "--json"]) == 0
    changes = {change["group"]: change for change in json.loads(capsys.readouterr().out)["metrics"]["correct"]}
    assert list(changes) == ["small", "large", "all"]
    assert changes["small"]["gained"] == 0
    assert changes["large"]["gained"] == scores["large"].n


@pytest.mark.parametrize("name", ["bfcll", "my_bench", "my_bench:NONE", "nowhere:BENCH", "my_bench:ADD"])
def test_objects_that_are_not_benchmarks_are_refused(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", name, "--oracle"]) == 2
    assert "benchmark" in capsys.readouterr().err

"""`rest-rl eval` as a user types it: a model, the oracle, recorded responses, tables, comparisons, kills."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.data.shapes import RowContext, api_bank
from rest_rl.evaluate.benchmarks.tool_world import ToolWorldTasks
from rest_rl.evaluate.harness import summarize
from rest_rl.formats import get_format
from tests.test_api_bank import GOLD, ROW

SMALL = ("--prompts", "4", "--batch-size", "3")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return main(["eval", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    folder = tmp_path / "bank"
    folder.mkdir()
    for level in (1, 2, 3):
        (folder / f"level-{level}-api_processed.json").write_text(json.dumps([ROW, ROW]), encoding="utf-8")
    return folder


def test_the_embedded_model_on_the_tool_world(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tool-world", *SMALL) == 0
    folder = here / "runs" / "eval-tool-world-embedded"
    assert sorted(path.name for path in folder.iterdir()) == [
        "environment.json", "samples.jsonl", "settings.json", "summary.json", "tables.csv", "tables.md", "tables.tex"
    ]  # fmt: skip
    rows, summary = rows_of(folder), summary_of(folder)
    assert [row["id"] for row in rows] == [
        f"{split}/{i}" for split in ("unseen_tools", "unseen_values") for i in range(4)
    ]
    assert all(set(row) >= {"category", "kind", "response", "calls", "correct", "reason", "tokens"} for row in rows)
    group = summary["groups"]["overall"]
    assert (group["n"], group["correct"]) == (8, sum(row["correct"] for row in rows))
    assert group["low"] <= group["accuracy"] <= group["high"]
    assert (summary["prompt"], summary["format"], summary["model"]) == ("training", "toolrl", "embedded")
    assert summary["pin"] in (folder / "tables.md").read_text(encoding="utf-8")
    assert "overall" in capsys.readouterr().out
    assert "already contains an evaluation" in refused(capsys, "tool-world", *SMALL)
    before = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(before[: len(before) // 2])
    assert run("tool-world", *SMALL, "--resume") == 0
    assert (folder / "samples.jsonl").read_bytes() == before
    assert "a different limit" in refused(capsys, "tool-world", *SMALL, "--resume", "--limit", "2")
    split = ("tool-world", *SMALL, "--out", "o", "--categories")
    assert run(*split, "unseen_values,unseen_tools") == run(*split, "unseen_tools,unseen_values", "--resume") == 0


def test_api_bank_by_the_oracle(here: Path, bank: Path) -> None:
    assert run("api-bank", "--data", str(bank), "--oracle", "--out", "o", "--name", "gold") == 0
    summary = summary_of(here / "o")
    counts = {
        name: (group["n"], group["correct"], group["strict"]["correct"]) for name, group in summary["groups"].items()
    }
    assert counts == {"Level1": (2, 2, 2), "Level2": (2, 2, 2), "Level3": (2, 2, 2), "overall": (6, 6, 6)}
    assert (summary["metrics"], summary["model"]) == (["soft", "strict"], "gold")
    assert summary["ceilings"]["Level1"] == {"accuracy": 1.0, "ids": {}}
    with (here / "o" / "tables.csv").open(encoding="utf-8") as file:
        assert {row["accuracy"] for row in csv.DictReader(file)} == {"1.0"}


def test_recorded_responses_of_some_samples(here: Path, bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sample,) = api_bank.read(ROW, RowContext("x"))
    right = get_format("hermes").render("t", sample.gold.calls, None)
    rows = [{"id": "Level1_0", "response": right}, {"id": "Level3_1", "response": json.dumps(GOLD)}]
    (here / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ("api-bank", "--data", str(bank), "--responses", "r.jsonl")
    assert run(*options, "--format", "hermes", "--out", "a") == 0
    assert [(row["id"], row["soft"], row["strict"]) for row in rows_of(here / "a")] == [
        ("Level1_0", True, True), ("Level3_1", False, False)
    ]  # fmt: skip
    assert summary_of(here / "a")["groups"]["overall"]["n"] == 2
    assert run(*options, "--format", "toolrl", "--out", "b", "--categories", "3") == 0
    assert [(row["id"], row["soft"], row["strict"]) for row in rows_of(here / "b")] == [("Level3_1", True, False)]
    assert "ignored responses to other samples: 1" in capsys.readouterr().out
    assert run("diff", "a", "b", "--json") == 0
    change = json.loads(capsys.readouterr().out)["metrics"]["soft"][-1]
    assert (change["n"], change["gained"], change["lost"]) == (1, 1, 0)


def test_an_earlier_evaluation_determines_the_format(here: Path) -> None:
    assert run("tool-world", "--prompts", "3", "--oracle", "--format", "hermes", "--out", "a") == 0
    assert run("tool-world", "--prompts", "3", "--responses", "a/samples.jsonl", "--out", "b") == 0
    assert [row["correct"] for row in rows_of(here / "b")] == [True] * 6
    assert (summary_of(here / "b")["format"], summary_of(here / "b")["prompt"]) == ("hermes", "as recorded")


def test_diff_and_table(here: Path, bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tool-world", *SMALL, "--out", "base", "--name", "before") == 0
    assert run("tool-world", *SMALL[:2], "--oracle", "--out", "gold") == 0
    assert run("diff", "base", "gold", "--out", "c") == 0
    wrong = [row["id"] for row in rows_of(here / "base") if not row["correct"]]
    flips = [json.loads(line) for line in (here / "c" / "flips.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [flip["id"] for flip in flips] == wrong
    assert sorted(path.name for path in (here / "c").iterdir()) == ["comparison.json", "comparison.md", "flips.jsonl"]
    assert run("table", "base", "gold", "--out", "t") == 0
    assert (here / "t" / "radar.png").read_bytes().startswith(b"\x89PNG")
    assert "before" in (here / "t" / "tables.tex").read_text(encoding="utf-8")
    assert run("api-bank", "--data", str(bank), "--oracle", "--out", "o") == 0
    capsys.readouterr()
    assert "expected" in refused(capsys, "diff", "base", "o")
    assert "expected" in refused(capsys, "table", "nothing")


def test_tables_without_a_figure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, category in (("a", "unseen_tools"), ("b", "unseen_values")):
        assert run("tool-world", *SMALL[:2], "--oracle", "--out", folder, "--categories", category) == 0
    capsys.readouterr()
    assert run("table", "a", "b", "--out", "t") == 0
    lines = capsys.readouterr().out.splitlines()
    (why,) = [line for line in lines if "no radar figure: the evaluations share no group with a scored" in line]
    shown = [index for index, line in enumerate(lines) if "overall" in line]
    assert len(shown) == 2
    assert max(shown) < lines.index(next(line for line in lines if "tables.md" in line)) < lines.index(why)
    assert sorted(path.name for path in (here / "t").iterdir()) == ["tables.csv", "tables.md", "tables.tex"]
    failed = [{**row, "correct": None, "error": "503"} for row in rows_of(here / "a")]
    (here / "a" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in failed), encoding="utf-8")
    summary = {**summary_of(here / "a"), **summarize(ToolWorldTasks(seed=0, prompts=4), failed)}
    (here / "a" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert run("table", "a") == 0
    out = capsys.readouterr().out
    assert "no radar figure: no sample was scored" in out
    assert "4 not scored" in out
    (here / "b" / "radar.png").mkdir()
    assert "radar.png (Is a directory); pass another path" in refused(capsys, "table", "b")


def test_a_dry_run_shows_the_prompt_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tool-world", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "<|im_start|>assistant" in out
    assert "63 tokens" in out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("tool-world", "--categories", "unseen_tool"), "such as unseen_tools"),
        (("tool-world", "--ids", "unseen_tools/999"), "contains unknown names"),
        (("tool-world", "--ids", "unseen_tools/0", "--categories", "unseen_values"), "no sample matches"),
        (("tool-world", "--limit", "0"), "--limit is 0, expected a number above 0"),
        (("tool-world", "--retries", "-1"), "--retries is -1, expected 0 or more"),
        (("tool-world", "--categories", ","), "--categories is empty"),
        (("tool-world", "--oracle", "--model", "x"), "--oracle and --model"),
        (("tool-world", "--oracle", "--responses", "x"), "--oracle and --responses"),
        (("tool-world", "--model", "no/such/folder"), "no/such/folder"),
        (("tool-world", "--set", "run.seed=1"), "expected only keys of [model]"),
        (("tool-world", "--set", "model.speed=1"), "model.speed"),
        (("tool-world", "--format", "nonsense"), "nonsense"),
        (("tool-world", "--oracle", "--format", "nonsense"), "nonsense"),
        (("tool-world", "--responses", "nothing.jsonl"), "nothing.jsonl"),
        (("tool-world", "--resume"), "contains no evaluation"),
        (("bfcl",), "pass --model"),
        (("bfcl", "--endpoint", "http://localhost:1"), "--model NAME"),
        (
            ("bfcl", "--endpoint", "http://localhost:1", "--model", "m"),
            "the format of the model's tool calls is unknown",
        ),
        (("api-bank", "--data", "nowhere", "--oracle"), "level-1-api_processed.json"),
    ],
)
def test_user_errors_take_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    message = refused(capsys, *arguments)
    assert told in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_run_folder_provides_model_and_format(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rest_rl.config import RunConfig
    from rest_rl.train.named_models import embedded_model_dir

    run_folder = here / "mine"
    run_folder.mkdir()
    (run_folder / "config.toml").write_text(
        RunConfig.from_toml('[rest]\nformat = "hermes"').to_toml(), encoding="utf-8"
    )
    (run_folder / "model").symlink_to(embedded_model_dir())
    assert run("tool-world", "--model", "mine", *SMALL, "--limit", "1") == 0
    assert "format hermes (as in mine)" in capsys.readouterr().out
    assert run("tool-world", "--model", "mine/model", *SMALL, "--dry-run", "--prompt", "native") == 0
    assert "format toolrl" in capsys.readouterr().out
    (run_folder / "model").unlink()
    (run_folder / "checkpoints").mkdir()
    assert "the run mine is not finished" in refused(capsys, "tool-world", "--model", "mine")


@pytest.mark.slow
def test_repeatedly_killed_evaluations_end_the_same(here: Path) -> None:
    command = [sys.executable, "-m", "rest_rl", "eval", "tool-world", "--prompts", "60", "--batch-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    assert start("--out", "whole").wait() == 0
    killed = 0
    resume: tuple[str, ...] = ()
    for enough in (1, 50):
        process = start("--out", "torn", *resume)
        samples = here / "torn" / "samples.jsonl"
        while process.poll() is None and (not samples.exists() or len(samples.read_bytes().splitlines()) < enough):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        resume = ("--resume",)
    assert killed == 2
    assert start("--out", "torn", "--resume").wait() == 0
    for name in ("samples.jsonl", "summary.json", "tables.md"):
        assert (here / "torn" / name).read_bytes() == (here / "whole" / name).read_bytes()

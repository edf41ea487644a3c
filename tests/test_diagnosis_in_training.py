"""Diagnosis of real runs: faulty ones have findings, in the terminal and in the report; a healthy one has none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rest_rl.cli.app import main
from rest_rl.report.tables import diagnose_run
from rest_rl.runlog import read_run
from tests.sample_files import save_samples
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

RUN = """
[run]
show_every = 0
recorded_responses = 0
[model]
path = "{folder}"
[data]
path = "{folder}/samples.jsonl"
[eval]
prompts = 0
[trl]
max_steps = 12
per_device_train_batch_size = 16
num_generations = 4
max_completion_length = 20
learning_rate = 1e-4
save_steps = 6
bf16 = false
use_cpu = true
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_samples(tiny_samples(32), folder / "samples.jsonl")
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    return folder / "run.toml"


def found(run_file: Path, out: Path, *settings: str) -> dict[str, str]:
    """Train a run and return the kinds of its findings with their causes."""
    assert (
        main(["train", str(run_file), "--out", str(out), *(word for each in settings for word in ("--set", each))]) == 0
    )
    return {finding.kind: finding.cause for finding in diagnose_run(read_run(out))}


def test_a_healthy_run_has_no_finding(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(run_file, tmp_path / "run") == {}
    assert "likely cause" not in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Why is it not learning?" not in (tmp_path / "run" / "report.md").read_text()


def test_a_limit_that_is_too_short(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = found(run_file, tmp_path / "run", "trl.max_completion_length=4")
    assert set(kinds) == {"truncated", "no_spread"}
    assert "shorter than the responses need to be" in kinds["truncated"]
    said = capsys.readouterr().out
    assert said.count("of the responses hit the length limit of 4 tokens (steps") == 1
    assert "remedy: raise trl.max_completion_length (now 4)" in said
    main(["report", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report.md").read_text()
    assert "## Why is it not learning?" in page
    assert "- from step 10 on: **" in page


def test_a_resumed_run_does_not_repeat_its_findings(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("trl.max_completion_length=4", "trl.save_steps=11")
    kinds = found(run_file, tmp_path / "run", *settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-12")
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "resuming after step 11" in said
    assert "hit the length limit" not in said
    assert set(kinds) == {finding.kind for finding in diagnose_run(read_run(tmp_path / "run"))}


def test_a_learning_rate_that_is_too_high(run_file: Path, tmp_path: Path) -> None:
    shares = ("rest.reward.accuracy_share_start=0.3", "rest.reward.accuracy_share_end=0.8")
    settings = ("trl.learning_rate=0.3", "rest.preset=rest_live", *shares)
    kinds = found(run_file, tmp_path / "run", *settings)
    assert set(kinds) == {"no_spread", "truncated"}
    assert "the policy has become verbose or forgets to end" in kinds["truncated"]
    assert "hit the length limit of 20 tokens" in kinds["no_spread"]
    assert "the responses fitted before" in kinds["truncated"]


def test_responses_from_another_distribution(run_file: Path, tmp_path: Path) -> None:
    settings = ("rest.preset=grpo", "trl.top_p=0.6", "trl.learning_rate=1e-6", "trl.max_steps=10")
    kinds = found(run_file, tmp_path / "run", *settings)
    assert set(kinds) == {"sampler_disagrees"}
    assert kinds["sampler_disagrees"].startswith("trl.top_p = 0.6: ")


def test_a_clip_that_is_too_narrow(run_file: Path, tmp_path: Path) -> None:
    narrow = ("rest.preset=rest_live", "rest.weights.w_min=0.99", "rest.weights.w_max=1.01")
    kinds = found(run_file, tmp_path / "run", *narrow)
    assert set(kinds) == {"weight_at_its_clip"}


@pytest.mark.slow
def test_random_rewards(run_file: Path, tmp_path: Path) -> None:
    kinds = found(run_file, tmp_path / "run", "rest.reward.random=true", "trl.max_steps=50", "rest.preset=grpo")
    assert "no_progress" in kinds

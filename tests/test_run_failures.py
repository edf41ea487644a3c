"""Failures that stop a run or are found before it starts: divergence, full disk, bad rewards and rules; longer runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_rl.config import parse_toml
from rest_rl.errors import UserError
from rest_rl.runlog import Observer, read_run
from rest_rl.train.run import train
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from tests.tiny_policy import tiny_model, tiny_run, tiny_settings, tiny_tokenizer


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = tiny_run(tmp_path_factory.mktemp("policy"))
    found["trl"] |= {"learning_rate": 2e-3, "lr_scheduler_type": "constant"}
    return {**found, "run": {"show_every": 0}}


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_run(folder).metrics]


# A run that has diverged


@pytest.mark.parametrize("every", [0, 1])
def test_a_diverged_run_stops_at_the_step_with_a_remedy(tables: dict[str, Any], tmp_path: Path, every: int) -> None:
    wild = ["trl.learning_rate=1e30", "trl.max_grad_norm=0.0", "trl.save_steps=1"]
    if every:  # nothing is sampled from the broken model
        wild += [f"data.held_out={json.dumps(tables['data']['path'])}", "eval.every=1", "eval.max_new_tokens=8"]
    with pytest.raises(UserError, match="after step 1") as caught:
        train(tables, out=tmp_path / "run", overrides=wild)
    assert "trl.learning_rate (now 1e+30)" in caught.value.remedy
    assert "checkpoint-" not in caught.value.remedy
    assert steps_of(tmp_path / "run") == [1]
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    assert read_run(tmp_path / "run").evaluations == ()


def test_a_supervised_run_that_diverges_names_its_last_checkpoint(tables: dict[str, Any], tmp_path: Path) -> None:
    steps = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0, "max_steps": 4, "save_steps": 1}
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "learning_rate": 1e38, "max_grad_norm": 0.0}
    schedule |= {"warmup_steps": 1, "lr_scheduler_kwargs": {"num_decay_steps": 1}}  # the first step's rate is 0
    run = {**tables, "rest": {"preset": "sft"}, "trl": {**tables["trl"], **steps, **schedule}}
    with pytest.raises(UserError, match="after step 2") as caught:
        train(run, out=tmp_path / "run")
    assert caught.value.remedy.endswith("checkpoint-1")


def test_a_model_with_nan_weights_is_reported_before_training(tables: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"broken has infinite or NaN weights"):
        train({**tables, "model": {"path": str(tmp_path / "broken")}}, out=tmp_path / "run")


# A full disk

LIMITED = """
import resource, sys
from rest_rl.cli.app import main
size = int(sys.argv[1])
from rest_rl.train import run  # what is compiled and cached on the way is no checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX")
def test_a_full_disk_at_a_checkpoint_is_reported_and_the_run_can_resume(tables: dict[str, Any], tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(tables, out=whole)
    model, optimizer = (
        (whole / "checkpoints" / "checkpoint-2" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")
    )
    size = (model + optimizer) // 2  # room for the one, not for the other
    assert model < size < optimizer
    command = [sys.executable, "-c", LIMITED, str(size), "train", str(whole / "config.toml"), "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "(File too large)" in done.stderr
    assert "continue with --resume" in done.stderr
    assert train(out=folder, resume=True).steps == 4
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# A longer run


def test_a_lengthened_run_equals_one_of_that_length(tables: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Observer):
        def say(self, text: str) -> None:
            said.append(text)

    folder = tmp_path / "run"
    train(tables, out=folder)
    first = (folder / "metrics.jsonl").read_bytes()
    assert train(out=folder, resume=True, overrides=["trl.max_steps=8"], observer=Heard()).steps == 8
    assert steps_of(folder) == [*range(1, 9)]
    assert (folder / "metrics.jsonl").read_bytes().startswith(first)
    assert any("trl.max_steps was 4, now 8" in text for text in said)
    run = read_run(folder)
    table = parse_toml(run.config, "the run")
    assert (table["trl"]["max_steps"], table["rest"]["progress_steps"]) == (8, 4)
    assert run.environment["changes"] == [
        {"after_step": 4, "rest.progress_steps": [0, 4], "trl.max_steps": [4, 8]},
    ]
    # progress has reached 1 with the last step of the run as it was, and stays there
    progress = {row["step"]: row["progress"] for row in run.responses}
    assert progress == {1: 0, 2: pytest.approx(1 / 3), 3: pytest.approx(2 / 3), **dict.fromkeys(range(4, 9), 1.0)}
    train(folder / "config.toml", out=tmp_path / "again")
    for name in ("metrics.jsonl", "responses.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    # the run file may be lengthened in place of an option, and a second time
    longer = {**tables, "trl": {**tables["trl"], "max_steps": 10}}
    assert train(longer, out=folder, resume=True).steps == 10
    assert steps_of(folder) == [*range(1, 11)]
    with pytest.raises(UserError, match=r"more than the run.s 10 steps"):
        train(tables, out=folder, resume=True)
    assert train(out=folder, resume=True).steps == 10


def test_a_run_of_epochs_is_lengthened_by_epochs(tables: dict[str, Any], tmp_path: Path) -> None:
    trl = {key: value for key, value in tables["trl"].items() if key != "max_steps"}
    folder = tmp_path / "run"
    assert train({**tables, "trl": {**trl, "num_train_epochs": 1}}, out=folder).steps == 4
    assert train(out=folder, resume=True, overrides=["trl.num_train_epochs=1.5"]).steps == 6
    assert steps_of(folder) == [*range(1, 7)]
    assert parse_toml(read_run(folder).config, "the run")["rest"]["progress_steps"] == 4
    with pytest.raises(UserError, match=r"more than the run.s 6 steps"):
        train(out=folder, resume=True, overrides=["trl.num_train_epochs=1.5", "trl.max_steps=6"])


@pytest.mark.parametrize(
    ("begun", "longer", "words"),
    [
        (["trl.lr_scheduler_type=linear"], [], "'linear'"),
        (["trl.lr_scheduler_type=constant_with_warmup", "trl.warmup_steps=0.5"], [], "trl.warmup_steps is a share"),
        (["trl.num_iterations=2", "trl.max_steps=3"], [], "after step 3, in the middle of a generation batch"),
        ([], ["run.seed=1"], "cannot change run.seed"),
        ([], ["trl.max_steps=3"], "more than the run's 4 steps"),
        ([], ["trl.max_steps=many"], "expected a number"),
    ],
)
def test_a_refused_lengthening_changes_nothing(
    tables: dict[str, Any], tmp_path: Path, begun: list[str], longer: list[str], words: str
) -> None:
    folder = tmp_path / "run"
    train(tables, out=folder, overrides=["trl.max_steps=2", *begun] if begun else [])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match=words):
        train(out=folder, resume=True, overrides=["trl.max_steps=8", *longer])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path in before} == before


# Your own rewards and rules

REWARD = """
import math

def broken(judgement, progress, step):
    return math.inf if any(call.name == "g" for call in judgement.parsed.calls) else 0.5
"""
RULES = """
import torch

def wrong_signature(batch):
    return torch.ones_like(batch.mask_BT)

def wrong_shape(batch, statistics, progress):
    return torch.ones(3)

def negative(batch, statistics, progress):
    return -torch.ones_like(batch.mask_BT)

def fails_once_measured(batch, statistics, progress):
    return torch.ones_like(batch.mask_BT) if statistics is None else statistics.entropies_R.of("name")

class Measures:
    def __call__(self, batch, statistics, progress):
        return torch.ones(batch.mask_BT.shape)

    def region_weights(self, statistics, progress):
        return torch.ones(2)
"""


@pytest.mark.parametrize("rule", ["wrong_signature", "wrong_shape", "negative", "fails_once_measured", "Measures"])
def test_a_failing_rule_is_found_before_the_folder_is_created(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    (tmp_path / "rules_that_fail.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    rest = {"preset": "grpo", "weights": {"rule": f"rules_that_fail:{rule}"}}
    with pytest.raises(UserError, match=f"rules_that_fail:{rule}"):
        train({**tables, "rest": rest}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_error_for_an_infinite_reward_names_its_sample(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_that_overflows.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    rest = {"preset": "grpo", "reward": {"rule": "reward_that_overflows:broken"}}
    with pytest.raises(UserError, match=r"the reward .*broken returned inf \(sample 's\d'\)"):
        train({**tables, "rest": rest}, out=tmp_path / "run", overrides=["trl.max_steps=20"])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), None])
def test_non_finite_rewards_of_a_trainer_are_refused(tmp_path: Path, value: float | None) -> None:
    from datasets import Dataset

    def spoilt(completions: list[str], **_: Any) -> list[float | None]:
        return [float(len(text)) for text in completions[:-1]] + [value]

    dataset = Dataset.from_list([{"prompt": f"do {i} assistant:", "id": f"s{i}"} for i in range(4)])
    tokenizer = tiny_tokenizer()
    args = ResTConfig(**tiny_settings(tmp_path, preset="grpo", max_steps=1))
    trainer = ResTTrainer(tiny_model(tokenizer), spoilt, args, dataset, processing_class=tokenizer)
    if value is None:  # TRL's value for no reward
        trainer.train()
        assert "rewards/spoilt/mean" in trainer.state.log_history[0]
    else:
        with pytest.raises(UserError, match=rf"spoilt returned {value} \(sample 's\d'\)"):
            trainer.train()


def test_the_diagnosis_finds_non_finite_rewards() -> None:
    from rest_rl.report.diagnosis import diagnose

    rows = [{"step": step, "reward": None if step == 3 else 0.5, "loss": 0.0} for step in range(1, 5)]
    assert [(found.kind, found.step) for found in diagnose(rows)] == [("reward_not_finite", 3)]

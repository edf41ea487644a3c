"""The engine's side of a run on verl, without verl: files, checkpoints, output, refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch

from rest_rl.cli.app import main, split_overrides
from rest_rl.cli.train import verl_overrides
from rest_rl.config import RunConfig, apply_overrides
from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError
from rest_rl.runlog import Observer, RunLog, read_run
from rest_rl.statistics import Outcome, summarize
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.policy import load_tokenizer
from rest_rl.train.prompts import TrainingData, prepare_or_raise
from rest_rl.train.verl.engine import (
    LOG_FILE,
    VerlEngine,
    call_repeatedly,
    find_checkpoint,
    make_follower,
    needs_evaluation,
    write_verl_files,
)
from rest_rl.train.verl.responses import STATISTICS_FILE, make_metrics_row, make_timing_row, write_outcomes
from tests.tiny_policy import tiny_samples, tiny_tokenizer

# Files


def written(tmp_path: Path, tokenizer: Any) -> tuple[PromptLayout, list[ToolSample], Path]:
    layout, samples = PromptLayout(tokenizer, "toolrl"), tiny_samples(3)
    data = TrainingData([prepare_or_raise(sample, layout) for sample in samples], [])
    write_verl_files(data, tokenizer, tmp_path / "run" / "verl")
    return layout, samples, tmp_path / "run" / "verl"


def test_prompts_equal_those_of_trl(tmp_path):
    layout, samples, folder = written(tmp_path, tiny_tokenizer())
    rows = parquet.read_table(folder / "train.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": layout.render(s)}] for s in samples]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    assert [row["extra_info"]["id"] for row in rows] == [sample.id for sample in samples]
    assert {row["data_source"] for row in rows} == {"train"}
    golds = [json.loads(row["reward_model"]["ground_truth"]) for row in rows]
    assert [gold["calls"][0]["name"] for gold in golds] == [sample.gold.calls[0].name for sample in samples]
    loops = json.loads((folder / "agent_loops.yaml").read_text())
    assert loops[0]["_target_"] == "rest_rl.train.verl.plugin.RenderedPromptLoop"


def test_the_saved_tokenizer_references_no_remote_code(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    folder = written(tmp_path, tokenizer)[2] / "tokenizer"
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert not list(folder.glob("*.py"))
    again = load_tokenizer(folder)
    assert again.chat_template == tokenizer.chat_template
    assert again("<think> a")["input_ids"] == tokenizer("<think> a")["input_ids"]


# Checkpoints


def checkpoint(log: RunLog, step: int, *, whole: bool = True) -> Path:
    folder = log.checkpoints / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    (folder / STATISTICS_FILE).write_text("[[1.0], [2.0], [0.5]]")
    torch.save({}, folder / "actor" / "model_world_size_1_rank_0.pt")
    if whole:
        torch.save({}, folder / "data.pt")  # what verl writes last
    return folder


def test_a_run_resumes_from_its_newest_complete_checkpoint(tmp_path):
    log = RunLog.create(tmp_path / "run", "", [])
    assert find_checkpoint(log) == ((0, None, False), [])
    second = checkpoint(log, 2)
    checkpoint(log, 10, whole=False)
    (log.checkpoints / "latest_checkpointed_iteration.txt").write_text("")  # killed while it was written
    assert find_checkpoint(log) == ((2, second, False), ["global_step_10"])
    tenth = log.checkpoints / "global_step_10"
    torch.save({}, tenth / "data.pt")
    assert find_checkpoint(log)[0].folder == tenth
    (tenth / STATISTICS_FILE).write_text("[[1.0")
    assert find_checkpoint(log)[0].folder == second
    for path in (second / "actor").iterdir():  # verl removes the weights of old checkpoints, not their folders
        path.unlink()
    assert find_checkpoint(log)[0].step == 0


@pytest.mark.parametrize(
    ("step", "summary", "evaluations", "expected"),
    [
        (0, {}, [], True),
        (0, {"before": {}}, [], False),  # killed before its first checkpoint
        (4, {"before": {}}, [2], True),  # killed between saving and measuring
        (4, {"before": {}}, [2, 4], False),
        (5, {"before": {}}, [2, 4], False),  # not due
        (8, {"before": {}}, [2, 4, 6], True),
        (8, {"before": {}, "after": {}}, [2, 4, 6], False),
    ],
)
def test_an_evaluation_that_a_kill_prevented_is_made_on_resume(tmp_path, step, summary, evaluations, expected):
    log = RunLog.create(tmp_path / "run", "", [])
    log.update_summary(**summary)
    for at in evaluations:
        log.add_evaluation({"step": at})
    trainer = SimpleNamespace(test_freq=2, val_before_train=True)
    assert needs_evaluation(log, trainer, Checkpoint(step, is_last=step == 8)) is expected
    nothing = SimpleNamespace(test_freq=-1, val_before_train=False)
    assert not needs_evaluation(log, nothing, Checkpoint(step, is_last=step == 8))


# The run folder, and what is shown of it


def test_metrics_get_the_names_of_trl(tmp_path):
    log = RunLog.create(tmp_path / "run", "", [])
    figures = {
        "actor/pg_loss": torch.tensor(0.5),
        "actor/grad_norm": 2.0,
        "actor/lr": 1e-6,
        "rest/weight/name": float("nan"),
        "critic/score/mean": 1.0,
        "timing_s/step": 3.0,
        "perf/throughput": 9.0,
        "val-aux/x/reward/mean@1": 1.0,
        "a table": [1, 2],
        "a flag": True,
    }
    log.add_metrics(make_metrics_row(4, figures))
    log.add_timing(make_timing_row(4, figures))
    run = read_run(tmp_path / "run")
    row = {"step": 4, "loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-6, "rest/weight/name": None}
    assert run.metrics == (row,)
    assert run.timing == ({"step": 4, "timing_s/step": 3.0, "perf/throughput": 9.0},)


def test_evaluations_before_during_and_after_training(tmp_path):
    log = RunLog.create(tmp_path / "run", "", [])
    for step, exact in ((0, 0.0), (5, 0.5), (10, 1.0)):
        outcomes = [Outcome("single", "held out", prompt, exact, exact, 1.0, "calls") for prompt in range(2)]
        write_outcomes(log, step, 10, summarize(outcomes))
    run = read_run(tmp_path / "run")
    assert run.summary["before"]["exact_match"] == 0.0
    assert run.summary["after"]["exact_match"] == 1.0
    assert [(row["step"], row["exact_match"]) for row in run.evaluations] == [(5, 0.5)]


class Listener:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.steps, self.responses, self.findings, self.said = [], [], [], []

    def on_step(self, step, total, metrics):
        self.steps.append((step, total, metrics["reward"]))

    def on_responses(self, step, rows):
        self.responses.append((step, [row["id"] for row in rows]))

    def on_finding(self, finding):
        self.findings.append(finding.kind)

    def say(self, text):
        self.said.append(text)


def test_a_follower_reports_each_row_once_and_waits_for_complete_lines(tmp_path):
    log = RunLog.create(tmp_path / "run", "", [])
    log.add_metrics({"step": 1, "reward": 0.1})
    listener = Listener()
    look = make_follower(log, listener, {}, total=3)  # existing rows have been reported before
    log.add_metrics({"step": 2, "reward": 0.2, "completions/failed": 4.0})
    log.add_responses([{"step": 2, "id": "a"}, {"step": 2, "id": "b"}, {"step": 3, "id": "c"}])
    metrics = log.folder / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 3, "rew')
    look()
    assert listener.steps == [(2, 3, 0.2)]
    assert listener.responses == [(2, ["a", "b"]), (3, ["c"])]
    assert listener.said == ["step 2: 4 responses failed and were left out"]
    with metrics.open("a") as file:
        file.write('ard": 0.3}\n')
    with call_repeatedly(look):
        pass
    assert listener.steps == [(2, 3, 0.2), (3, 3, 0.3)]


def test_a_follower_reports_findings(tmp_path):
    log = RunLog.create(tmp_path / "run", "", [])
    listener = Listener()
    look = make_follower(log, listener, {}, total=100)
    for step in range(1, 40):
        log.add_metrics({"step": step, "reward": 0.1, "frac_reward_zero_std": 1.0})
    look()
    assert "spread" in " ".join(listener.findings)


# The command


def test_verl_settings_after_a_double_dash():
    assert split_overrides(["train", "a.toml", "--", "a.b=1", "+c.d=x"]) == (["train", "a.toml"], ["a.b=1", "+c.d=x"])
    assert split_overrides(["presets"]) == (["presets"], [])
    texts = ["data.seed=3", "+ray_kwargs.ray_init.num_gpus=1", "a.b=[x,'y z']"]
    changes = verl_overrides(2, 8, texts)
    tables = apply_overrides({}, changes)
    assert tables["verl"] == {"trainer": {"nnodes": 2, "n_gpus_per_node": 8}, "overrides": texts}
    again = RunConfig.from_toml(RunConfig.from_toml("", changes).to_toml())  # a resumed run
    assert again.verl == tables["verl"]


@pytest.mark.parametrize("extra", [["--nodes", "2"], ["--print-config"], ["--", "data.seed=1"]])
def test_verl_settings_with_another_engine_are_refused(tmp_path, capsys, extra):
    assert main(["train", "--out", str(tmp_path / "run"), *extra]) == 2
    assert "--engine verl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_train_accepts_a_double_dash(capsys):
    assert main(["presets", "--", "a.b=1"]) == 2
    assert "unrecognized" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="without Ray nothing starts")
def test_the_log_has_the_traceback_of_a_failed_run(tmp_path):
    engine = object.__new__(VerlEngine)
    engine.config, engine.observer, engine.log = RunConfig(), Observer(), RunLog(tmp_path)
    engine.total, engine.checkpoint, engine.verl = 1, Checkpoint(0), None
    with pytest.raises(UserError, match=LOG_FILE):
        engine.run(lambda step: None)
    assert "Traceback" in (tmp_path / LOG_FILE).read_text()

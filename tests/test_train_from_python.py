"""`rest_rl.train(run)`: a run from Python, in any thread, with a rule next to the run file."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import rest_rl
from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.evaluate.held_out import derive_response_limit
from rest_rl.runlog import Observer, read_run
from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.request import resolve_run
from rest_rl.train.run import RunResult, estimate_run, find_missing_format, make_plan, warn_about_memory
from tests.model_families import save_family
from tests.tiny_policy import tiny_run

RULE = """
import torch

def arguments_twice(batch, statistics, progress):
    return torch.ones_like(batch.mask_BT, dtype=torch.float32) + (batch.regions_BT == 2)
"""


@pytest.mark.parametrize("name", ["train", "evaluate", "probe", "compare"])
def test_a_package_is_callable_as_its_workflow(name: str) -> None:
    workflow = importlib.import_module(f"rest_rl.{name}.run")
    package = getattr(rest_rl, name)
    assert package is sys.modules[f"rest_rl.{name}"]  # still the package, whatever has been imported of it
    assert inspect.signature(package) == inspect.signature(getattr(workflow, name))


class Heard(Observer):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def on_step(self, step: int, total: int, metrics: Any) -> None:
        assert total == 4
        self.steps.append(step)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = tiny_run(tmp_path_factory.mktemp("policy"))
    found["data"]["held_out"] = found["data"]["path"]
    return {**found, "eval": {"max_new_tokens": 20}}


def test_a_model_that_never_writes_a_call_is_recommended_sft_first(tables: dict[str, Any], tmp_path: Path) -> None:
    heard, model = Heard(), save_family("qwen3", tmp_path / "untrained")
    own = {**tables, "model": {"path": str(model)}, "rest": {"format": "hermes"}}
    result = rest_rl.train(own, out=tmp_path / "run", observer=heard)  # pyright: ignore[reportCallIssue]
    assert result.before is not None
    number = result.before["calls"]["n"]
    (warning,) = (text for text in heard.said if "rest-rl sft" in text)
    assert f"on any of {number} held-out call turns" in warning


@pytest.mark.parametrize(
    ("n", "sampled", "greedy", "warns"),
    [(8, 0.0, 0.0, True), (8, 0.1, 0.0, False), (8, 0.0, 0.1, False), (7, 0.0, 0.0, False)],
)
def test_one_readable_call_or_few_call_turns_give_no_warning(
    n: int, sampled: float, greedy: float, warns: bool
) -> None:
    scores: dict[str, Any] = {"calls": {"n": n, "s_format": sampled}, "greedy": {"calls": {"n": n, "s_format": greedy}}}
    assert (find_missing_format(scores) is not None) == warns


def test_the_warning_names_calls_in_another_form() -> None:
    calls = {"n": 8, "s_format": 0.0, "unread_calls": 0.25}
    assert "(25% of the responses are calls as JSON in another form)" in str(
        find_missing_format({"calls": calls, "greedy": {"calls": {**calls, "unread_calls": 0.0}}})
    )


def test_train_runs_in_a_thread_and_returns_the_result(
    tables: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results: list[RunResult] = []
    heard = Heard()
    capfd.readouterr()
    thread = threading.Thread(
        target=lambda: results.append(rest_rl.train(tables, out=tmp_path / "run", observer=heard))  # pyright: ignore[reportCallIssue]
    )
    thread.start()
    thread.join()
    assert capfd.readouterr() == ("", "")  # no bars and warnings of the libraries
    (result,) = results
    run = read_run(tmp_path / "run")
    assert (result.folder, result.steps, result.is_interrupted) == (tmp_path / "run", 4, False)
    assert (result.before, result.after) == (run.summary["before"], run.summary["after"])
    assert result.model == tmp_path / "run" / "model"
    assert heard.steps == [1, 2, 3, 4]
    assert not any("rest-rl sft" in text for text in heard.said)
    again = rest_rl.train(RunConfig.from_toml(run.config), out=tmp_path / "again")  # pyright: ignore[reportCallIssue]
    assert (again.before, again.after) == (result.before, result.after)
    with pytest.raises(UserError, match="already contains a run"):
        rest_rl.train(tables, out=tmp_path / "run")  # pyright: ignore[reportCallIssue]


def test_an_estimate_writes_nothing(tables: dict[str, Any], tmp_path: Path) -> None:
    estimate = estimate_run(tables, out=tmp_path / "run")
    assert (estimate.work.steps, estimate.work.samples) == (4, 8)
    assert not (tmp_path / "run").exists()


def test_the_estimate_of_a_supervised_run_knows_how_long_its_evaluations_generate(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    trl = {"max_steps": 4, "max_length": 500, "use_cpu": True, "bf16": False}
    own = {**tables, "rest": {"preset": "sft"}, "trl": trl, "eval": {"max_new_tokens": 0}}
    plan = make_plan(own, out=tmp_path / "run")
    limit = derive_response_limit(plan.render_golds(), plan.layout, 500)  # the held-out prompts are those of training
    estimate = estimate_run(own, out=tmp_path / "run")
    (cache,) = (part.how for part in estimate.parts if part.name == "KV cache")
    assert limit < 400
    assert f"held-out responses at once, {limit} tokens each" in cache


def test_an_estimate_for_another_machine_needs_no_vllm(tables: dict[str, Any], tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is here")
    tables = {**tables, "trl": {**tables["trl"], "use_vllm": True}}
    assert estimate_run(tables, out=tmp_path / "run").work.steps == 4
    with pytest.raises(UserError, match="vllm"):
        rest_rl.train(tables, out=tmp_path / "run")  # pyright: ignore[reportCallIssue]


def test_training_warns_when_the_estimate_exceeds_the_memory(tables: dict[str, Any]) -> None:
    for together, warnings in ((8, 0), (10**12, 1)):
        plan, heard = make_plan({**tables, "eval": {"batch_size": together, "prompts": together}}, is_dry=True), Heard()
        warn_about_memory(plan, heard)
        assert len(heard.said) == warnings


def test_a_resumed_run_finds_the_rule_next_to_its_run_file(tables: dict[str, Any], tmp_path: Path) -> None:
    own, elsewhere, folder = tmp_path / "own", tmp_path / "elsewhere", tmp_path / "run"
    own.mkdir()
    elsewhere.mkdir()
    (own / "rule_of_a_run.py").write_text(RULE)
    toml = "".join(
        f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for table, values in {**tables, "rest.weights": {"rule": "rule_of_a_run:arguments_twice"}}.items()
    )
    (own / "run.toml").write_text(toml)
    rest_rl.train(own / "run.toml", out=folder)  # pyright: ignore[reportCallIssue]
    assert "rule_of_a_run:arguments_twice" in read_run(folder).config
    metrics = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    command = [sys.executable, "-m", "rest_rl", "train", "--resume", "--out", str(folder)]
    subprocess.run(command, cwd=elsewhere, check=True)
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_overrides_of_a_resumed_run_apply_to_the_recorded_run(tmp_path: Path) -> None:
    recorded = RunConfig.from_toml("[rest]\npreset = 'tsft'\n[data]\npath = 'rows.jsonl'\n[model]\npath = 'model'")
    (tmp_path / "config.toml").write_text(recorded.to_toml())
    same = ["rest.region_weights.name=2.0"]  # what the preset has; the embedded run's own preset knows no such key
    assert resolve_run(None, out=tmp_path, resume=True, overrides=same).rest.preset == "tsft"
    with pytest.raises(UserError, match="region_weights"):
        resolve_run(None, out=tmp_path, resume=True, overrides=["rest.region_weights.name=3.0"])
    with pytest.raises(UserError, match="contains no run"):
        resolve_run(None, out=tmp_path / "other", resume=True, overrides=same)


def test_a_model_in_the_home_folder_matches_the_recorded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(embedded_model_dir())
    asked = {"model": {"path": "~/model"}, "data": {"path": "rows.jsonl"}}
    recorded = resolve_run(asked, out=tmp_path / "run", resume=False, overrides=[])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(recorded.to_toml())
    assert resolve_run(asked, out=tmp_path / "run", resume=True, overrides=[]).to_toml() == recorded.to_toml()

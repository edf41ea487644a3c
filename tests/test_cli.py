"""The command line end to end with a tiny policy; every mistake is one line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import pytest

from rest_rl.cli.app import main
from rest_rl.cli.options import RENAMED, with_new_names
from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.jsonl import as_json
from rest_rl.runlog import RunLog, read_run
from rest_rl.train.checkpoints import find_checkpoint, read_complete_state
from rest_rl.train.request import find_free_dir
from rest_rl.train.trl.settings import check_trl_table
from tests.sample_files import save_samples
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

GOLD = {"calls": [{"name": "f", "arguments": {"x": 1}}], "answer": None}
RIGHT = '<think> a </think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
STEPS = 6
"""One epoch is four steps, so a run resumed from the checkpoint before the last one begins with the second."""
RUN = """
[run]
recorded_responses = 2
[model]
path = "{model}"
[data]
path = "{data}"
held_out = "{data}"
[eval]
max_new_tokens = 20
[trl]
max_steps = {steps}
per_device_train_batch_size = 8
num_generations = 4
max_completion_length = 20
learning_rate = 2e-3
logging_steps = 1
save_steps = 2
bf16 = false
use_cpu = true
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_file(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = save_samples(tiny_samples(8), folder / "samples.jsonl")
    (folder / "run.toml").write_text(RUN.format(model=policy, data=data, steps=STEPS))
    return folder / "run.toml"


@pytest.fixture(scope="module")
def finished(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(run_file), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# train


def test_train_leaves_a_whole_run_folder(finished: Path) -> None:
    run = read_run(finished)
    assert [row["step"] for row in run.metrics] == [*range(1, STEPS + 1)]
    assert {row["step"] for row in run.responses} == {*range(1, STEPS + 1)}
    scored = {"step", "progress", "id", "prompt", "response", "ids", "lengths", "gold", "reward", "truncated"}
    assert run.responses[0].keys() == scored | {"advantage", "regions", "weights", "entropies", "logps"}
    assert "rest/entropy/name" in run.metrics[0]
    assert run.metrics[0]["rest/weight/name"] > 0
    assert not any("time" in key or "per_second" in key for row in run.metrics for key in row)
    for when in ("before", "after"):
        scores = run.summary[when]
        assert {"exact_match", "s_acc", "s_format", "n", "greedy", "kinds", "splits"} <= scores.keys()
        assert scores["n"] == 8
    assert RunConfig.from_toml(run.config).trl["max_steps"] == STEPS
    assert {path.name for path in (finished / "plots").iterdir()} >= {"learning.png", "entropy.png", "weights.png"}
    assert (finished / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors").is_file()


def test_the_recorded_run_is_reproduced_by_its_config(finished: Path, tmp_path: Path) -> None:
    assert main(["train", str(finished / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    for name in ("metrics.jsonl", "summary.json", "responses.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_evaluation_leaves_training_untouched(finished: Path, run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(["train", str(run_file), "--out", str(folder), "--set", 'data.held_out=""']) == 0
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert "before" not in read_run(folder).summary


@pytest.mark.parametrize("last", [2, 4, 6])
def test_resume_from_each_checkpoint_ends_the_same(last: int, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert len([*folder.glob("checkpoints/checkpoint-*")]) == STEPS / 2
    for later in range(last + 2, STEPS + 1, 2):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{later}")
    # only what the run computes anew can match again
    rows = [{**row, "reward": -1.0} if row["step"] > last else row for row in read_run(folder).metrics]
    (folder / "metrics.jsonl").write_text("".join(as_json(row) + "\n" for row in rows))
    summary = json.loads((folder / "summary.json").read_text())
    stale = {**summary["after"], "exact_match": -1.0}
    kept = (
        {key: summary[key] for key in ("data", "before")} if last == STEPS else {**summary, "after": stale, "steps": -1}
    )
    (folder / "summary.json").write_text(json.dumps(kept))
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    for name in ("metrics.jsonl", "summary.json", "responses.jsonl"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("torn", [False, True])
def test_checkpoint_without_one_of_its_parts_is_left_aside(
    missing: str, torn: bool, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    part = folder / "checkpoints" / f"checkpoint-{STEPS}" / missing
    part.write_bytes(part.read_bytes()[:-9]) if torn else part.unlink()
    checkpoint, broken = find_checkpoint(RunLog(folder), 2)
    assert (checkpoint.step, checkpoint.is_last, broken) == (STEPS - 2, False, [f"checkpoint-{STEPS}"])


@pytest.mark.parametrize(
    ("replaced", "by", "whole"),
    [
        (["model.safetensors"], ["adapter_model.safetensors"], True),
        (["model.safetensors", "optimizer.pt", "scheduler.pt"], ["global_step6/rank_0.pt"], True),
        (["model.safetensors", "optimizer.pt", "scheduler.pt"], ["global_step6"], False),
        (["model.safetensors", "optimizer.pt"], ["pytorch_model_fsdp_0/a.distcp", "optimizer_0/a.distcp"], True),
        (["rng_state.pth"], ["rng_state_0.pth"], True),
    ],
)
def test_checkpoints_in_other_layouts(
    replaced: list[str], by: list[str], whole: bool, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(finished / "checkpoints" / "checkpoint-6", folder)
    for old, new in zip_longest(replaced, by):
        if new:
            (folder / new).parent.mkdir(exist_ok=True)
            shutil.copy(folder / old, folder / new) if "." in new else (folder / new).mkdir()
        (folder / old).unlink()
    assert bool(read_complete_state(folder)) is whole


@pytest.mark.parametrize("shards", [{"a": "model.safetensors"}, {"a": "model-00002-of-00002.safetensors"}])
def test_checkpoint_needs_every_shard(shards: dict[str, str], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(finished / "checkpoints" / "checkpoint-6", folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert bool(read_complete_state(folder)) is ("model.safetensors" in shards.values())


def test_resume_after_the_last_step_only_evaluates(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    summary = json.loads((folder / "summary.json").read_text())
    after = summary.pop("after")
    (folder / "summary.json").write_text(json.dumps(summary))
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert read_run(folder).summary == {**summary, "after": after}


def test_resume_without_a_whole_checkpoint_loses_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "has no complete checkpoint after 6 steps (the folder has none)" in error_of(
        capsys, "train", "--resume", "--out", str(folder)
    )
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    assert "incomplete: checkpoint-4" in error_of(capsys, "train", "--resume", "--out", str(folder))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_another_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(finished / "config.toml"), "--resume", "--out", str(finished)]
    assert "--resume cannot change run.seed (recorded " in error_of(capsys, *arguments, "--set", "run.seed=5")


def test_run_without_metrics_resumes_and_is_reported(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    overrides = ["--set", "trl.logging_strategy=no", "--set", "trl.max_steps=3"]
    assert main(["train", str(run_file), "--out", str(folder), *overrides]) == 0
    assert read_run(folder).metrics == ()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    assert "| sampled, T = 1 |" in text
    assert "| run | rest | 3 |" in text
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match=r"no complete checkpoint after 3 steps"):
        find_checkpoint(RunLog(folder), 2)
    (folder / "timing.jsonl").unlink()
    (folder / "responses.jsonl").unlink()
    assert find_checkpoint(RunLog(folder), 2)[0].step == 0


def test_existing_run_is_refused(finished: Path, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "already contains a run" in error_of(capsys, "train", str(run_file), "--out", str(finished))


def test_runs_whose_folder_nobody_chose_are_numbered(tmp_path: Path) -> None:
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").touch()
    assert find_free_dir(f"{tmp_path}/run") == f"{tmp_path}/run-3"
    assert find_free_dir(f"{tmp_path}/other") == f"{tmp_path}/other"


def test_processes_of_one_launch_need_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were launched without --out" in error_of(capsys, "train")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.sed=1", "did you mean seed?"),
        ("trl.lerning_rate=1.0", "did you mean learning_rate?"),
        ("trl.seed=1", "unknown key trl.seed"),
        ("trl.save_steps=3", "expected a multiple of 2"),
        ("trl.entropy_coef=0.1", "entropy_coef=0.1"),
        ("rest.format=xml", "format 'xml', expected one of toolrl, hermes"),
        ("trl.learning_rate=fast", "trl.learning_rate is 'fast', expected a number"),
        ("trl.max_steps=1.5", "trl.max_steps is 1.5, expected a whole number"),
        ("trl.max_steps=0", "trl.max_steps is 0, expected at least 1, or -1"),
        ("trl.max_steps=-2", "trl.max_steps is -2, expected at least 1, or -1"),
        ("trl.learning_rate=-1", "trl.learning_rate is -1, expected at least 0"),
        ("trl.learning_rate=nan", "trl.learning_rate is nan, expected"),
        ("trl.learning_rate=inf", "trl.learning_rate is inf, expected a finite number"),
        ("trl.num_train_epochs=0.0", "trl.num_train_epochs is 0.0, expected more than 0"),
        ("trl.max_grad_norm=-1.0", "trl.max_grad_norm is -1.0, expected at least 0"),
        ("trl.adam_beta2=1.0", "trl.adam_beta2 is 1.0, expected less than 1"),
        ("trl.temperature=0.0", "trl.temperature is 0.0, expected more than 0"),
        ("trl.num_iterations=0", "trl.num_iterations is 0, expected at least 1"),
        ("trl.bf16=1", "trl.bf16 is 1, expected true or false"),
        ("trl.save_only_model=true", "expected false, because such checkpoints cannot be resumed"),
        ("trl.deepspeed=x.json", "pip install deepspeed"),
        ("eval.batch_size=0", "eval.batch_size is 0, expected at least 1"),
        ("model.path=nowhere/at/all", "model.path is 'nowhere/at/all'"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_in_a_run_are_found_before_its_folder_is_made(
    override: str, message: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(run_file), "--out", str(tmp_path / "run"), "--set", override]
    arguments += ["--set", "trl.num_iterations=2"] if "save_steps" in override else []
    assert message in error_of(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_the_trainer_would_take_but_means_nothing(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "train", str(run_file), "--dry-run", "--set", "trl.learning_rate=-1")
    assert "trl.learning_rate" in error


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is here")
def test_missing_vllm_is_found_before_the_folder_is_made(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "train", str(run_file), "--out", str(tmp_path / "run"), "--set", "trl.use_vllm=true")
    assert "pip install 'trl[vllm]'" in error
    assert not (tmp_path / "run").exists()


def test_values_of_the_trainer_that_fit_are_kept() -> None:
    check_trl_table(
        {"learning_rate": 1, "scale_rewards": False, "lr_scheduler_kwargs": {"a": 1}, "report_to": ["none"]}
    )
    check_trl_table({"max_steps": 5, "bf16": True, "save_total_limit": 2, "optim": "sgd", "delta": 2.0})


def test_rows_that_are_left_out_are_accounted_for(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        json.loads(line) for line in save_samples(tiny_samples(9), tmp_path / "rows.jsonl").read_text().split("\n")[:9]
    ]
    del rows[1]["gold"]
    rows[3]["gold"]["calls"][0]["name"] = "elsewhere"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn")
    options = [f'data.path="{tmp_path}/rows.jsonl"', 'data.held_out=""', "trl.max_steps=2"]
    options = [part for option in options for part in ("--set", option)]
    assert main(["train", str(run_file), *options, "--out", str(tmp_path / "run")]) == 0
    rejected = lines((tmp_path / "run" / "rejected.jsonl").read_text())
    assert [row["row"] for row in rejected] == [2, 4, 10]
    assert "unknown_tool" in rejected[1]["reasons"][0]
    counts = read_run(tmp_path / "run").summary["data"]
    assert {name: counts[name] for name in ("rows", "kept", "rejected", "samples")} == {
        "rows": 10,
        "kept": 7,
        "rejected": 3,
        "samples": 7,
    }
    assert "10 rows: 7 kept, 0 repaired, 3 rejected" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "rows.jsonl").write_text("{torn")
    assert "none of the 1 rows of " in error_of(capsys, "train", str(run_file), *options, "--out", "never")


def test_model_without_a_chat_template_is_named(
    policy: Path, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(policy, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    error = error_of(capsys, "train", str(run_file), "--set", f'model.path="{tmp_path}/bare"', "--out", "never")
    assert "no chat template" in error


def test_corrupt_model_is_named(
    policy: Path, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(policy, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    error = error_of(capsys, "train", str(run_file), "--set", f'model.path="{tmp_path}/torn"', "--out", "never")
    assert "model" in error


def test_unwritable_folder_is_named(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot write to run folder" in error_of(capsys, "train", str(run_file), "--out", f"{tmp_path}/file/run")


# killed runs, in processes of their own


def start(run_file: Path, folder: Path, steps: int = 12) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rest_rl", "train", str(run_file), "--out", str(folder)]
    return subprocess.Popen([*command, "--set", f"trl.max_steps={steps}"], stdout=subprocess.DEVNULL)


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_bytes().splitlines()) >= steps:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no {steps} steps in {folder}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_resumes_to_the_same_end(number: signal.Signals, run_file: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(run_file, whole).wait(300) == 0
    process = start(run_file, broken)
    wait_for_steps(broken, 5)
    process.send_signal(number)
    assert process.wait(120) == (130 if number is signal.SIGINT else -signal.SIGKILL)
    assert len(read_run(broken).metrics) < 12
    assert main(["train", "--resume", "--out", str(broken)]) == 0
    for name in ("metrics.jsonl", "summary.json", "responses.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


# report and the command itself


def test_report_prints_where_it_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished), "--out", str(tmp_path / "report")]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page.read_text().startswith("# Report")


RUN_MAIN = """
import sys
from rest_rl.cli.app import main
main(sys.argv[1:])
print([name for name in ("torch", "transformers", "trl", "numpy", "rich", "pydantic") if name in sys.modules])
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", RUN_MAIN, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert "rest-rl train" in done.stdout


def test_score_imports_no_torch(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"response": RIGHT, "gold": GOLD}))
    done = subprocess.run([sys.executable, "-c", RUN_MAIN, "score", rows], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "broken.toml"],
        ["train", "missing.toml"],
        ["train", "--set", "run.sed=1"],
        ["train", "--set", "trl.learnin_rate=1"],
        ["train", "--set", "trl.learning_rate=-1", "--dry-run"],
        ["train", "--set", "trl.max_steps=0"],
        ["train", "--set", "peft.lora_alhpa=3"],
        ["train", "--preset", "nonsense"],
        ["train", "--format", "xml"],
        ["train", "--resume", "--out", "nosuch"],
        ["train", "--out", "taken"],
        ["sft", "--model", "m", "--data", "d", "--set", "trl=1"],
        ["inspect", "rows.jsonl", "--tokenizer", "m", "--progress", "2"],
        ["probe", "--progress", "2"],
        ["probe", "--format", "xml"],
        ["probe", "--set", "run.sed=1"],
        ["eval", "tool-world", "--format", "xml"],
        ["compare", "--set", "run.sed=1", "--out", "grid"],
        ["compare", "nosuch"],
    ],
    ids=" ".join,
)
def test_a_mistake_in_the_settings_is_found_before_torch_is_loaded(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("x = = 1")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.toml").touch()
    command = [sys.executable, "-c", RUN_MAIN, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("error: ")
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in ("torch", "transformers", "trl") if f"'{name}'" in loaded]


def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "score", "nonsense", "--nonsense"):
        error = error_of(capsys, verb, "--nonsense")
        assert error.endswith("--help\n")


def test_help_of_sft_says_that_it_fine_tunes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--model", "--data", "--preset", "--lora"):
        assert option in shown


def test_sft_needs_something_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--set", "decision=call"]) == 2
    assert "research.warm_start" in capsys.readouterr().err


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rest-rl ")
    assert main([]) == 2


@pytest.mark.slow
def test_wheel_in_an_empty_environment_trains(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}

    def run(*command: object) -> str:
        return subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, root)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-c", root / "constraints.txt", wheel)
    options = ["trl.max_steps=2", "eval.prompts=8", "trl.per_device_train_batch_size=16"]
    run(tmp_path / "venv/bin/rest-rl", "train", "--out", "run", *(part for o in options for part in ("--set", o)))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"]["n"] == 16


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["data", "check", "rows.jsonl", "--keep", "leak"], "--keep has been renamed to --allow"),
        (["data", "check", "rows.jsonl", "--keep=leak"], "--keep has been renamed to --allow"),
        (
            ["data", "convert", "rows.jsonl", "--out", "x.jsonl", "--mask", "1"],
            "--mask has been renamed to --mask-names",
        ),
        (["data", "check", "rows.jsonl", "--max-prompt", "9"], "--max-prompt has been renamed to --max-prompt-tokens"),
        (
            ["data", "check", "rows.jsonl", "--max-response", "9"],
            "--max-response has been renamed to --max-completion-length",
        ),
        (["--debug", "probe", "--group", "1"], "--group has been renamed to --group-size"),
        (["probe", "--step", "0"], "--step has been renamed to --prompts-per-step"),
        (["compare", "missing.toml", "--reference", "grpo"], "--reference has been renamed to --baseline"),
        (["compare", "missing", "--only-report"], "--only-report has been renamed to --report-only"),
        (["eval", "bfcl", "--oracle", "--context", "9"], "--context has been renamed to --context-length"),
        (["eval", "compare", "missing", "missing"], "eval compare has been renamed to eval diff"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_old_names_of_options_and_commands_still_work(
    arguments: list[str],
    warning: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with suppress(UserError):  # --debug lets it through
        main(arguments)
    first, *others = capfd.readouterr().err.splitlines()
    assert first == f"warning: {warning}; the old name still works"
    assert not any("No such" in line for line in others)


def test_old_names_elsewhere_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_new_names(["eval", "tool-world", "--out", "compare"]) == ["eval", "tool-world", "--out", "compare"]
    assert with_new_names(["train", "--keep", "x"]) == ["train", "--keep", "x"]
    assert with_new_names([]) == []
    assert capsys.readouterr().err == ""
    pages = {"compare": ["compare"], "data": ["data", "check"], "eval": ["eval", "bfcl"], "probe": ["probe"]}
    for name, renamed in RENAMED.items():
        main([*pages[name], "--help"])
        main([name, "--help"])
        shown = set(re.findall(r"^  (\S+)\s", capsys.readouterr().out, re.MULTILINE))
        assert shown.isdisjoint(renamed)
        assert shown >= set(renamed.values())

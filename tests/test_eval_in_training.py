"""Evaluation during training leaves the run bit-identical, and its curve survives a kill."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rest_rl.cli.app import main
from rest_rl.config import EvalTable, RunConfig, read_asset
from rest_rl.data.layout import PromptLayout
from rest_rl.data.tool_world import SPLITS, tool_world
from rest_rl.evaluate import held_out, shared_attention
from rest_rl.evaluate.generate import EntropyMeter, decoding_steps, generate
from rest_rl.evaluate.held_out import HeldOutPrompt, evaluate_held_out, response_limit, select_interim_prompts
from rest_rl.formats import get_format
from rest_rl.report.page import write_report
from rest_rl.report.plots import draw_evaluations
from rest_rl.report.tables import RunGroup, evaluation_curve, group_runs
from rest_rl.runlog import EVALUATIONS, Observer, RunLog, read_run
from rest_rl.train.checkpoints import find_checkpoint
from tests.sample_files import save_samples
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

STEPS = 6
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
interim_prompts = 5
[trl]
max_steps = {steps}
per_device_train_batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 2e-3
logging_steps = 1
save_steps = 2
bf16 = false
use_cpu = true
num_generations = 4
max_completion_length = 20
max_length = 200
"""
DROPOUT = ["--lora", "4", "--set", "peft.lora_dropout=0.3", "--set", "trl.gradient_checkpointing=true"]
KINDS = {
    "rl": [],
    "rl of an adapter": [*DROPOUT, "--set", "trl.num_iterations=2"],
    "sft": ["--preset", "tsft"],
    "sft of an adapter": ["--preset", "sft", *DROPOUT],
}
"""Dropout draws from the random state in every step, and is off unless the model is in training mode."""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    samples = [replace(sample, thought=" a b a") for sample in tiny_samples(8)]
    data = save_samples(samples, folder / "samples.jsonl")
    (folder / "run.toml").write_text(RUN.format(model=folder / "policy", data=data, steps=STEPS))
    return folder / "run.toml"


def train(run_file: Path, out: Path, *arguments: str, every: int) -> Path:
    assert main(["train", str(run_file), *arguments, "--set", f"eval.every={every}", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def watched(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(run_file, tmp_path_factory.mktemp("watched") / "run", every=1)


# A run with evaluations is the same run


def weights_of(folder: Path) -> dict[str, bytes]:
    (path,) = (folder / "model").glob("*model.safetensors")
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without_evaluation(kind: str, run_file: Path, tmp_path: Path) -> None:
    with_it = train(run_file, tmp_path / "with", *KINDS[kind], every=1)
    without = train(run_file, tmp_path / "without", *KINDS[kind], every=0)
    assert [row["step"] for row in read_run(with_it).evaluations] == [*range(1, STEPS + 1)]
    assert not (without / EVALUATIONS).exists()
    rows = read_run(without).metrics
    assert len({row["grad_norm"] for row in rows}) > 1
    for name in ("metrics.jsonl", "summary.json"):
        assert (with_it / name).read_bytes() == (without / name).read_bytes()
    if "rl" in kind:
        assert (with_it / "responses.jsonl").read_bytes() == (without / "responses.jsonl").read_bytes()
    assert weights_of(with_it) == weights_of(without)


def test_a_run_can_be_evaluated_only_after_training(run_file: Path, watched: Path, tmp_path: Path) -> None:
    without = train(run_file, tmp_path / "run", "--set", "eval.before=false", every=0)
    summaries = [read_run(folder).summary for folder in (without, watched)]
    assert "before" not in summaries[0]
    assert summaries[0]["after"] == summaries[1]["after"]
    assert write_report([without], tmp_path / "report").is_file()


def test_trainer_times_and_counts_exclude_evaluation(watched: Path) -> None:
    rows = read_run(watched).timing
    evaluated = [row for row in rows if "evaluation_time" in row]
    assert [row["step"] for row in evaluated] == [*range(1, STEPS + 1)]
    steps = [row for row in rows if "step_time" in row]
    assert [row["step"] for row in steps] == [*range(1, STEPS + 1)]
    assert not any("evaluation_time" in row for row in steps)


# What is evaluated, when, and where the scores are stored


def test_every_nth_step_has_a_row_and_a_line(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_run(train(run_file, tmp_path / "run", every=4))
    (row,) = run.evaluations  # six steps: only after the fourth
    assert row["step"] == 4
    assert row.keys() >= {"exact_match", "exact_match_error", "s_acc", "s_format", "n", "kinds", "splits", "greedy"}
    assert (row["n"], row["greedy"]["n"], row["splits"]["held out"]["n"]) == (5, 5, 5)
    assert (row["low_temperature"]["n"], row["low_temperature"]["temperature"]) == (5, 0.2)
    assert row["policy_entropy"] > 0
    shown = " ".join(capsys.readouterr().out.split())
    number = r"\d+\.\d ± \d+\.\d %"
    assert re.search(rf"step 4: exact match {number} greedy, {number} sampled at T = 1 \(5 held-out prompts\)", shown)
    assert "step 5: exact match" not in shown


def test_the_last_step_has_the_scores_of_the_trained_model(run_file: Path, tmp_path: Path) -> None:
    run = read_run(train(run_file, tmp_path / "run", "--set", "eval.interim_prompts=64", every=STEPS))
    # all prompts are selected: the same prompts, seed and weights as the evaluation after training
    assert run.evaluations == ({"step": STEPS, **run.summary["after"]},)


def test_interim_prompts_cover_splits_and_kinds_deterministically() -> None:
    unseen = [(split, sample) for split in SPLITS if split != "train" for sample in tool_world(7, 60, split)]
    prompts = [HeldOutPrompt(f"{i}", sample, split, 1) for i, (split, sample) in enumerate(unseen)]
    groups = Counter((prompt.split, prompt.sample.kind) for prompt in prompts)
    assert len(groups) > 3
    number = 2 * len(groups) + 1
    chosen = select_interim_prompts(prompts, number)
    assert chosen == select_interim_prompts(prompts, number)
    counts = Counter((prompt.split, prompt.sample.kind) for prompt in chosen)
    assert sorted(counts.values()) == [2] * (len(groups) - 1) + [3]
    assert [int(prompt.text) for prompt in chosen] == sorted({int(prompt.text) for prompt in chosen})
    assert select_interim_prompts(prompts, len(prompts)) == select_interim_prompts(prompts, 10**6) == prompts
    assert select_interim_prompts([], 3) == []


def test_interim_prompts_are_evenly_spaced_and_refill_from_large_groups() -> None:
    one, other = tiny_samples(1)[0], tiny_samples(2)[1]
    prompts = [HeldOutPrompt(f"a{i}", one, "a", 1) for i in range(10)] + [HeldOutPrompt("b0", other, "b", 1)]
    # b has one prompt, so a gives four of its ten: 0, 10/4, 20/4, 30/4 rounded down
    assert [prompt.text for prompt in select_interim_prompts(prompts, 5)] == ["a0", "a2", "a5", "a7", "b0"]


# Resume


@pytest.mark.parametrize("last", [2, 4, STEPS])
def test_resume_gives_the_same_curve(last: int, watched: Path, run_file: Path, tmp_path: Path) -> None:
    folder = train(run_file, tmp_path / "run", every=1)
    for later in range(last + 2, STEPS + 1, 2):
        for path in (folder / "checkpoints" / f"checkpoint-{later}").iterdir():
            path.unlink()
    # only recomputed rows can match again
    rows = [{**row, "exact_match": -1.0} if row["step"] > last else row for row in read_run(folder).evaluations]
    torn = '{"step": 7, "exa' if last < STEPS else ""
    (folder / EVALUATIONS).write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert read_run(folder).evaluations == read_run(watched).evaluations
    assert (folder / "metrics.jsonl").read_bytes() == (watched / "metrics.jsonl").read_bytes()
    assert (folder / EVALUATIONS).read_text().count("\n") == STEPS


@pytest.mark.parametrize("change", ["eval.every=2", "eval.interim_prompts=3"])
def test_resume_refuses_a_different_curve(change: str, watched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--set", change, "--out", str(watched)]) == 2
    assert f"--resume cannot change {change.partition('=')[0]}" in capsys.readouterr().err


def start(run_file: Path, folder: Path, *launcher: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, *launcher, "-m", "rest_rl", "train", str(run_file), "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["--set", "eval.every=1", "--set", "trl.max_steps=12"]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_curve(run_file: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(run_file, whole).wait(300) == 0
    process, deadline = start(run_file, broken), time.monotonic() + 120
    while not (broken / EVALUATIONS).exists() or len((broken / EVALUATIONS).read_bytes().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert find_checkpoint(RunLog(broken), 2)[0].step < 12
    assert main(["train", "--resume", "--out", str(broken)]) == 0
    for name in (EVALUATIONS, "metrics.jsonl", "summary.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_processes_write_one_row_a_step(run_file: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert start(run_file, tmp_path / "run", *launcher).wait(300) == 0
    run = read_run(tmp_path / "run")
    assert [row["step"] for row in run.evaluations] == [*range(1, 13)]
    assert len({row["n"] for row in run.evaluations}) == 1


# Mistakes, and a folder that cannot be written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("every = -1", r"eval\.every is -1, expected at least 0"),
        ("every = 2.5", r"eval\.every is 2\.5, expected a whole number"),
        ("interim_prompts = 0", r"eval\.interim_prompts is 0, expected at least 1"),
        ("evry = 1", r"did you mean every\?"),
        ("every = 5\nprompts = 0", r"eval\.every is 5, but eval\.prompts is 0; raise eval\.prompts"),
        ("every = 5\n[data]\npath = 'a.jsonl'", r"eval\.every is 5, but there is no held-out set; set data\.held_out"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_toml(f"[eval]\n{text}")


def test_an_interval_longer_than_the_run_is_reported(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_run(train(run_file, tmp_path / "run", "--set", "trl.max_steps=2", every=3))
    assert run.evaluations == ()
    assert "eval.every is 3, but the run has 2 steps" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_evaluated_by_default() -> None:
    table = RunConfig().eval
    assert (table.every, table.interim_prompts) == (0, 64)
    assert RunConfig.from_toml(RunConfig().to_toml()).eval == table


def test_an_unwritable_curve_is_a_user_error(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / EVALUATIONS).mkdir(parents=True)
    assert main(["train", str(run_file), "--set", "eval.every=2", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write to run folder ")
    assert "Is a directory" in error
    assert error.count("\n") == 1
    assert [row["step"] for row in read_run_metrics(tmp_path / "run")] == [1]


def read_run_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# The curve in plots and reports


def watched_run(folder: Path, seed: int, values: tuple[float, ...], every: int = 10, error: float = 0.05) -> Path:
    overrides = [f"run.seed={seed}", f"eval.every={every}"]
    log = RunLog.create(folder, RunConfig.from_toml("", overrides).to_toml(), [])
    log.add_metrics({"step": 30, "reward": 0.5})
    for i, value in enumerate(values, start=1):
        scores = {"exact_match": value, "exact_match_error": error}
        log.add_evaluation({"step": every * i, **scores, "greedy": {**scores, "exact_match": value + 0.1}})
    return folder


def test_one_run_shows_its_standard_error_and_several_their_spread(tmp_path: Path) -> None:
    folders = [watched_run(tmp_path / "0", 0, (0.2, 0.4)), watched_run(tmp_path / "1", 1, (0.4, 0.6))]
    runs = [read_run(folder) for folder in folders]
    alone = evaluation_curve(runs[:1], greedy=True)
    assert alone.steps == [10, 20]
    assert alone.mean == pytest.approx([0.3, 0.5])
    assert (alone.low[0], alone.high[0]) == (pytest.approx(0.25), pytest.approx(0.35))
    both = evaluation_curve(runs, greedy=False)
    # 0.2 and 0.4: mean 0.3, sample deviation 0.2 / sqrt(2)
    assert both.mean == pytest.approx([0.3, 0.5])
    assert both.high[0] - both.mean[0] == pytest.approx(0.2 / math.sqrt(2))


def test_evaluation_settings_do_not_distinguish_runs(tmp_path: Path) -> None:
    runs = [
        read_run(watched_run(tmp_path / "0", 0, (0.2, 0.4))),
        read_run(watched_run(tmp_path / "1", 1, (), every=0)),
    ]
    (group,) = group_runs(runs)
    assert len(group.runs) == 2
    assert evaluation_curve(group.runs, greedy=False).high[0] == pytest.approx(0.25)  # the one measured run's error
    with pytest.raises(ValueError, match="the same configuration and the same seed"):
        group_runs([runs[0], read_run(watched_run(tmp_path / "2", 0, (), every=0))])


def test_the_plot_is_drawn_where_there_are_evaluations(tmp_path: Path, watched: Path) -> None:
    page = write_report([watched_run(tmp_path / "run", 0, (0.2, 0.4, 0.3))])
    assert "![Held-out slice during training](plots/evaluations.png)" in page.read_text()
    assert (tmp_path / "run" / "plots" / "evaluations.png").read_bytes().startswith(b"\x89PNG")
    assert (watched / "plots" / "evaluations.png").is_file()
    bare = read_run(watched_run(tmp_path / "bare", 0, (), every=0))
    assert draw_evaluations([RunGroup("rest", (bare,))], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


# Progress and cost


def test_progress_is_reported_per_token_without_side_effects() -> None:
    tokenizer = tiny_tokenizer()
    model, texts = tiny_model(tokenizer), ["assistant:", "a a a assistant:", "a assistant:"]
    limits, told = [3, 50, 7], []
    # in batches of two, the two short prompts first: at most 7 steps and then 50
    assert decoding_steps(texts, limits, 2) == 57
    settings = {"max_new_tokens": limits, "batch_size": 2}
    responses = generate(model, tokenizer, texts, **settings, on_token=told.append)
    assert responses == generate(model, tokenizer, texts, **settings)
    assert told == sorted(told)
    assert (told[0], 7 in told, told[-1]) == (1, True, 57)  # a batch that ends early has done all of its steps


def test_the_entropy_is_that_of_the_policy_at_every_token_of_a_response() -> None:
    tokenizer = tiny_tokenizer()
    model, texts = tiny_model(tokenizer), ["assistant:", "a a a assistant:", "a assistant:", "<think> a"]
    meter = EntropyMeter()
    settings = {"max_new_tokens": [40, 3, 40, 7], "batch_size": 3, "seed": 1}
    responses = generate(model, tokenizer, texts, **settings, meter=meter)
    assert len({len(response) for response in responses}) > 2  # rows of a batch end at different steps
    found = []
    for text, response in zip(texts, responses, strict=True):
        prompt = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        probs_TV = logits_TV.double().softmax(-1)
        found += (-(probs_TV * probs_TV.log()).sum(-1)).tolist()
    assert meter.mean == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert responses == generate(model, tokenizer, texts, **settings)


def evaluate_tiny(**changes: float) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    tokenizer = tiny_tokenizer()
    prompts = [HeldOutPrompt("assistant:", sample, "held out", 20 + 5 * i) for i, sample in enumerate(tiny_samples(6))]
    seen = Steps()
    table = EvalTable(**{"batch_size": 4, **changes})
    layout_format = get_format("toolrl")
    return evaluate_held_out(tiny_model(tokenizer), tokenizer, prompts, layout_format, table, seen), seen.marks


class Steps(Observer):
    """Records the progress of an evaluation as (done of total, note)."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.marks: list[tuple[int, str]] = []

    @contextmanager
    def track(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Any]:
        self.total = total
        yield lambda done, note="": self.marks.append((done, note))
        self.marks.append((total or 0, "total"))


@pytest.mark.parametrize("shares", [False, True])
def test_the_low_temperature_adds_a_pass_and_changes_no_other_score(
    monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    if not shares:
        for module in (held_out, shared_attention):
            monkeypatch.setattr(module, "can_share", lambda model: False)
    (whole, steps), (without, fewer) = evaluate_tiny(), evaluate_tiny(low_temperature=0.0)
    low = whole.pop("low_temperature")
    assert whole == without
    assert low["temperature"] == 0.2
    assert low.keys() - {"temperature"} == whole["greedy"].keys()
    # batches of limits 20-35 and 40-45: 35 + 45 steps for each pass, or for all together
    if shares:
        assert steps[-2:] == [(80, "sampled, greedy, low temperature"), (80, "total")]
        assert fewer[-2:] == [(80, "sampled, greedy"), (80, "total")]
    else:
        assert steps[-2:] == [(240, "low temperature"), (240, "total")]
        assert fewer[-2:] == [(160, "greedy"), (160, "total")]
    # almost at temperature 0 sampling is greedy
    cold = evaluate_tiny(low_temperature=1e-4)[0]
    assert {**cold["greedy"], "temperature": 1e-4} == cold["low_temperature"]


def test_the_response_limit_follows_the_golds() -> None:
    tokenizer = tiny_tokenizer()
    layout = PromptLayout(tokenizer)
    golds = ["a", '<tool_call>\n{"name": "f"}']
    longest = len(tokenizer(golds[1])["input_ids"])
    config = RunConfig.from_tables({"trl": {"max_completion_length": 1024}})
    assert response_limit(config, golds, layout) == 2 * longest + 256
    for tables, limit in (
        ({"trl": {"max_completion_length": 100}}, 100),
        ({}, 2 * longest + 256),  # within the trainer's own 512
        ({"eval": {"max_new_tokens": 5}}, 5),
    ):
        assert response_limit(RunConfig.from_tables(tables), golds, layout) == limit
    assert RunConfig.from_toml(read_asset()).eval.max_new_tokens == 96

"""The command `rest-rl compare`: real grids of a tiny policy, kept, resumed and killed, and every user error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rest_rl.cli.app import main
from rest_rl.cli.terminal import Screen
from rest_rl.compare.grid import RunName, read_grid
from rest_rl.compare.jobs import Job, read_tail, record_exit, run_jobs
from rest_rl.compare.launch import Launch
from rest_rl.compare.run import save_grid
from rest_rl.config import RunConfig
from rest_rl.runlog import Observer, lock_run_folder, read_run
from tests.made_up_grid import Effect, make_grid
from tests.sample_files import save_samples
from tests.test_cli import RUN, error_of, wait_for_steps
from tests.test_grid import OWN_RULE
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = save_samples(tiny_samples(8), folder / "samples.jsonl")
    (folder / "run.toml").write_text(RUN.format(model=folder / "model", data=data, steps=2))
    return folder / "run.toml"


def grid(base: Path, out: Path, *more: str, methods: str = "grpo,random", steps: int = 2) -> list[str]:
    settings = ["--base", str(base), "--methods", methods, "--seeds", "0", "--set", f"trl.max_steps={steps}"]
    return ["compare", *settings, *more, "--out", str(out)]


def recorded(out: Path, *names: str) -> Files:
    return {
        f"{name}/{file}": (out / "runs" / name / file).read_bytes()
        for name in names
        for file in ("metrics.jsonl", "summary.json")
    }


def test_a_grid_is_trained_once_and_kept(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid"
    assert main(grid(base, out)) == 0
    first = capsys.readouterr().out
    assert "2 runs in" in first
    assert "grpo-0 is finished: greedy exact match" in first
    for name in ("grpo-0", "random-0"):
        run = read_run(out / "runs" / name)
        assert [row["step"] for row in run.metrics] == [1, 2]
        assert "after" in run.summary
    # random is grpo with other rewards: the same prompts and, before the first update, the same responses
    of_first_step = [read_run(out / "runs" / name).responses[0] for name in ("grpo-0", "random-0")]
    assert of_first_step[0]["ids"] == of_first_step[1]["ids"]
    assert of_first_step[0]["reward"] != of_first_step[1]["reward"]
    assert {"compare.md", "compare.json", "grid.toml", "base.toml"} <= {path.name for path in out.iterdir()}
    before = recorded(out, "grpo-0", "random-0")
    assert main(["compare", str(out)]) == 0  # the folder says what the grid is
    assert "2 runs in" in (again := capsys.readouterr().out)
    assert "2 already finished" in again
    assert "starts" not in again
    assert recorded(out, "grpo-0", "random-0") == before
    assert main([*grid(base, out, methods="grpo,random,dapo"), "--dry-run"]) == 0
    assert not (out / "runs" / "dapo-0").exists()
    error = error_of(capsys, *grid(base, out, steps=3))
    assert "runs/grpo-0 contains a run with other settings (trl.max_steps was 2, now 3)" in error
    assert main(["compare", str(out), "--report-only"]) == 0
    assert "report: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # no such model: found by the run itself
    (tmp_path / "grid.toml").write_text("[methods.broken]\nmodel.path = '/nowhere'\n")
    out = tmp_path / "out"
    command = ["compare", str(tmp_path / "grid.toml"), "--base", str(base), "--seeds", "0", "--out", str(out)]
    assert main([*command, "--jobs", "1"]) == 1
    text = capsys.readouterr().out
    assert "broken-0 failed with exit code 2 after step 0; last lines of" in text
    assert "grpo-0 is finished" in text
    assert "exact match" in (out / "compare.md").read_text()
    assert main(["compare", str(out), "--report-only"]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 runs is not finished: broken-0. Methods without a finished run are not compared: broken" in " ".join(
        text.split()
    )
    assert "`broken-0` has no run folder (see logs/broken-0.log)" in (out / "compare.md").read_text()


@pytest.mark.slow
def test_a_run_through_accelerate_equals_one_without(base: Path, tmp_path: Path) -> None:
    launcher = "accelerate launch --num_processes 1 --num_machines 1 --cpu --mixed_precision no --dynamo_backend no"
    for name, more in {"plain": [], "launched": ["--launch", launcher]}.items():
        assert main(grid(base, tmp_path / name, *more, methods="grpo")) == 0
    plain, launched = (recorded(tmp_path / name, "grpo-0")["grpo-0/metrics.jsonl"] for name in ("plain", "launched"))
    assert launched == plain


@pytest.mark.slow
def test_a_rule_of_your_own_trains_in_a_grid(base: Path, tmp_path: Path) -> None:
    (tmp_path / "rule_of_a_grid.py").write_text(OWN_RULE)
    (tmp_path / "grid.toml").write_text("[methods.mine]\nrest.weights.rule = 'rule_of_a_grid:RULE'\n")
    command = ["compare", str(tmp_path / "grid.toml"), "--base", str(base), "--seeds", "0", "--set", "trl.max_steps=1"]
    assert main([*command, "--jobs", "1", "--out", str(tmp_path / "out")]) == 0
    run = read_run(tmp_path / "out" / "runs" / "mine-0")
    assert "rule_of_a_grid:RULE" in run.config
    assert [row["step"] for row in run.metrics] == [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "trl.num_generations = 7",
            "generation_batch_size (8) must be divisible by",
        ),
        ("trl.no_such_key = 1", "unknown key trl.no_such_key"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_method_that_cannot_start_is_refused_before_any_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: str, more: tuple[str, ...]
) -> None:
    (tmp_path / "grid.toml").write_text(f"[methods.broken]\n{change}\n")
    out = tmp_path / "out"
    error = error_of(capsys, "compare", str(tmp_path / "grid.toml"), "--base", str(base), *more, "--out", str(out))
    assert "method 'broken'" in error
    assert words in error
    assert not out.exists()


def test_only_report_shows_a_method_without_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.02), "rest": Effect(noise=0.02)}, seeds=3)
    save_grid(read_grid(None, methods=["grpo", "rest", "dapo"]), tmp_path)
    assert main(["compare", str(tmp_path), "--report-only"]) == 0
    text = capsys.readouterr().out
    assert (
        "3 of 9 runs are not finished: dapo-0, dapo-1, dapo-2. Methods without a finished run are not compared: dapo"
        in " ".join(text.split())
    )
    assert ["dapo", "0", "–", "–", "–"] in [line.split() for line in text.split("\n")]


def test_only_report_reads_folders_that_another_loop_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.02), "rest": Effect(noise=0.02)}, seeds=3)
    assert main(["compare", str(tmp_path), "--report-only"]) == 0
    out = capsys.readouterr().out
    assert "No difference beyond seed noise" in out
    assert main(["compare", str(tmp_path), "--report-only", "--baseline", "rest"]) == 0
    assert "from rest" in capsys.readouterr().out
    assert "has no grid.toml" in error_of(capsys, "compare", str(tmp_path))
    assert "has no finished run" in error_of(capsys, "compare", "--report-only", "--out", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare"], "compare needs a folder for its runs"),
        (["compare", "--out", "x", "--seeds", "0,a"], "the seed is 'a'"),
        (["compare", "--out", "x", "--jobs", "0"], "--jobs is 0"),
        (["compare", "--out", "x", "--methods", "rest"], "the baseline 'grpo' is not among the methods ('rest')"),
        (["compare", "--out", "x", "--methods", "grpo,best"], "'best'"),
        (["compare", "--out", "x", "--set", "trl.max_stepz"], "--set trl.max_stepz"),
        (["compare", "absent.toml", "--out", "x"], "absent.toml"),
        (["compare", "g1nothere"], "g1nothere does not exist"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in error_of(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_grows_in_its_folder(tmp_path: Path) -> None:
    small = read_grid(None, methods=["grpo", "rest"], seeds=[0, 1])
    save_grid(small, tmp_path)
    save_grid(read_grid(None, methods=["grpo", "permuted"], seeds=[5]), tmp_path)
    kept = read_grid(tmp_path / "grid.toml")
    assert list(kept.methods) == ["grpo", "rest", "permuted"]
    assert kept.seeds == (0, 1, 5)
    with pytest.raises(ValueError, match=r"differs in \[base.trl\]"):
        save_grid(read_grid(None, methods=["grpo", "rest"], overrides=["trl.max_steps=7"]), tmp_path)
    assert read_grid(tmp_path / "grid.toml") == kept


def test_names_in_brackets_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "[v2]"
    make_grid(out, {"grpo": Effect(noise=0.02), "rest": Effect(noise=0.02)}, seeds=2)
    assert main(["compare", str(out), "--report-only"]) == 0
    assert f"report: {out / 'compare.md'}" in capsys.readouterr().out


class Listener(Observer):
    """Collects the messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class AskingToStop(Listener):
    """A listener that presses Ctrl-C when the first run starts."""

    def say(self, text: str) -> None:
        if "starts" in text and not any("starts" in line for line in self.lines):
            os.kill(os.getpid(), signal.SIGINT)
        super().say(text)


def test_ctrl_c_between_two_starts_stops_the_first_and_starts_no_second(tmp_path: Path) -> None:
    config = RunConfig(trl={"max_steps": 4})
    jobs = [
        Job(RunName("grpo", "", seed), config, tmp_path / "runs" / str(seed), tmp_path / "logs" / f"{seed}.log")
        for seed in range(2)
    ]
    listener = AskingToStop()
    assert run_jobs(jobs, Launch(2), listener) is False
    assert [job.state for job in jobs] == ["stopped", "waiting"]
    assert jobs[0].process is not None
    assert jobs[0].process.poll() is not None
    assert not any("grpo-1 starts" in line for line in listener.lines)
    assert not (tmp_path / "runs" / "1").exists()


def test_the_tail_of_a_log_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\x1b]0;owned\x07 [bold]end[/bold]\n")
    job = Job(RunName("grpo", "", 0), RunConfig(), tmp_path / "none", log, state="running")
    job.process = subprocess.Popen(["/bin/false"])
    job.process.wait()
    record_exit(job, Screen(Console(width=200)), is_stopping=False)
    assert job.state == "failed"
    out = capsys.readouterr().out
    assert "  ␛]0;owned␇ [bold]end[/bold]" in out
    assert "\x1b" not in out


def test_the_help_refers_to_the_other_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Train every method with every seed" in text
    assert "rest-rl eval diff" in text


def test_the_last_metrics_of_a_run_that_is_being_written(tmp_path: Path) -> None:
    job = Job(RunName("grpo", "", 0), RunConfig(trl={"max_steps": 4}), tmp_path, tmp_path / "log")
    assert job.last_metrics() == {}
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert job.last_metrics() == {"step": 2}
    assert job.last_step() == 2
    path.write_text("x" * 40_000 + '\n{"step": 3}\nno json\n')
    assert job.last_metrics() == {"step": 3}
    assert read_tail(path, since=path.stat().st_size - 8) == "no json\n"
    assert read_tail(tmp_path / "absent") == ""


# killed grids, in separate processes


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "rest_rl", *arguments], stdout=file, stderr=subprocess.STDOUT)


def pid_of(folder: Path) -> int:
    """The process that trains in a folder."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in command and str(folder).encode() in command:
            return int(place.name)
    raise LookupError(f"no process trains in {folder}")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert main(grid(base, out, methods="grpo,rest", steps=12)) == 0
    return out


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_grid(base: Path, whole: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "grid", tmp_path / "log"
    process = start(grid(base, out, methods="grpo,rest", steps=12), log)
    wait_for_steps(out / "runs" / "rest-0", 5)
    os.kill(pid_of(out / "runs" / "rest-0"), signal.SIGKILL)
    assert process.wait(300) == 1
    assert "rest-0 was killed by signal 9 after step" in log.read_text()
    assert "`rest-0` is unfinished" in (out / "compare.md").read_text()  # the page about the finished runs
    assert main(["compare", str(out)]) == 0
    assert recorded(out, "grpo-0", "rest-0") == recorded(whole, "grpo-0", "rest-0")
    assert "`rest-0` is unfinished" not in (out / "compare.md").read_text()


@pytest.mark.slow
def test_runs_of_a_killed_grid_are_not_trained_twice(base: Path, whole: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "grid", tmp_path / "log"
    arguments = grid(base, out, methods="grpo,rest", steps=12)
    process = start(arguments, log)
    wait_for_steps(out / "runs" / "rest-0", 2)
    left_behind = pid_of(out / "runs" / "rest-0")
    os.kill(left_behind, signal.SIGSTOP)  # so that it is still there when we come back
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    again = start(arguments, log)
    wait_until(lambda: f"rest-0 is being trained by process {left_behind} on" in log.read_text())
    os.kill(left_behind, signal.SIGCONT)
    assert again.wait(300) == 0
    assert recorded(out, "grpo-0", "rest-0") == recorded(whole, "grpo-0", "rest-0")
    assert (out / "compare.md").is_file()


@pytest.mark.slow
def test_ctrl_c_stops_every_run_after_its_step(base: Path, whole: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "grid", tmp_path / "log"
    process = start(grid(base, out, methods="grpo,rest", steps=12), log)
    for name in ("grpo-0", "rest-0"):
        wait_for_steps(out / "runs" / name, 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    text = log.read_text()
    assert "stopping every run after its current step" in text
    assert "rest-0 stopped after step" in text
    assert f"to resume, run: rest-rl compare {out}" in text
    assert main(["compare", str(out)]) == 0
    assert recorded(out, "grpo-0", "rest-0") == recorded(whole, "grpo-0", "rest-0")


@pytest.mark.slow
def test_a_locked_run_is_waited_for(base: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "grid", tmp_path / "log"
    with lock_run_folder(out / "runs" / "grpo-0"):
        process = start(grid(base, out, methods="grpo", steps=1), log)
        wait_until(lambda: f"process {os.getpid()} on" in log.read_text())
        assert not (out / "runs" / "grpo-0" / "config.toml").exists()
    assert process.wait(300) == 0
    assert (out / "runs" / "grpo-0" / "model").is_dir()

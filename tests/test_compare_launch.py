"""How `compare` starts runs: commands, GPUs and slots, recorded by a small launcher that trains nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rest_rl.cli.app import main
from rest_rl.compare.grid import RunName
from rest_rl.compare.jobs import Job, run_jobs, stop_jobs
from rest_rl.compare.launch import Launch, choose_gpus, find_trainers, is_trainer, plan_launch
from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.runlog import Observer

GPUS = "CUDA_VISIBLE_DEVICES"
# Records its arguments and variables and writes a finished run folder. `long-0` waits for the end of three others.
LAUNCHER = """#!{python}
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
variables = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
record = {{"argv": sys.argv[1:], **{{name: os.environ.get(name) for name in variables}}}}
(out.parent.parent / (out.name + ".json")).write_text(json.dumps(record))
while out.name == "long-0" and len(list(out.parent.glob("*/summary.json"))) < 3:
    time.sleep(0.05)
(out / "config.toml").write_text("")
(out / "summary.json").write_text('{{"steps": 1}}')
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    path = tmp_path / "my launcher"
    path.write_text(LAUNCHER.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS, "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def make(folder: Path, *methods: str) -> list[Job]:
    names = [RunName(method, "", 0) for method in methods]
    config = RunConfig(trl={"max_steps": 1})
    return [Job(name, config, folder / "runs" / str(name), folder / "logs" / f"{name}.log") for name in names]


def records(folder: Path, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    return {str(job.name): json.loads((folder / f"{job.name}.json").read_text()) for job in jobs}


def test_each_slot_has_its_own_gpus_and_the_next_run_gets_those_of_a_finished_one(
    launcher: Path, tmp_path: Path
) -> None:
    jobs = make(tmp_path, "long", "a", "b", "c")
    launch = plan_launch(jobs=2, gpus=4, launch=f"'{launcher}' --num_processes 2")
    assert run_jobs(jobs, launch, Observer()) is True
    assert [job.state for job in jobs] == ["done"] * 4
    found = records(tmp_path, jobs)
    assert {name: record[GPUS] for name, record in found.items()} == {
        "long-0": "4,5", "a-0": "6,7", "b-0": "6,7", "c-0": "6,7",
    }  # fmt: skip
    folder, run_file = tmp_path / "runs" / "a-0", tmp_path / "logs" / "a-0.toml"
    assert found["a-0"]["argv"] == [
        "--num_processes", "2", "-m", "rest_rl", "train", str(run_file), "--out", str(folder),
    ]  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    assert {record["OMP_NUM_THREADS"] for record in found.values()} == {str(max(1, cores // 4))}


def test_a_started_run_resumes_through_the_launcher(launcher: Path, tmp_path: Path) -> None:
    (job,) = jobs = make(tmp_path, "a")
    job.folder.mkdir(parents=True)
    (job.folder / "config.toml").write_text("")
    assert run_jobs(jobs, plan_launch(launch=f"'{launcher}'"), Observer()) is True
    record = records(tmp_path, jobs)["a-0"]
    assert record["argv"][-1] == "--resume"
    assert record[GPUS] == "4,5,6,7"  # without gpus, the runs inherit the variable


@pytest.mark.parametrize(
    ("jobs", "gpus", "slots"),
    [
        (None, None, [""] * 2),
        (3, None, [""] * 3),
        (None, 4, ["4", "5", "6", "7"]),
        (None, 1, ["4"]),
        (2, 4, ["4,5", "6,7"]),
        (1, ["7", "5"], ["7,5"]),
        (None, [6], ["6"]),
    ],
)
def test_gpus_are_divided_evenly(jobs: int | None, gpus: Any, slots: list[str]) -> None:
    launch = plan_launch(jobs, gpus)
    assert [launch.gpus_of(slot) for slot in range(launch.slots)] == slots
    assert [launch.environment(slot).get(GPUS, "") for slot in range(launch.slots)] == slots


@pytest.mark.parametrize(
    ("jobs", "gpus", "launch", "words"),
    [
        (0, None, "", "--jobs is 0"),
        (None, 5, "", "--gpus is 5, expected 1 to 4"),
        (None, 0, "", "--gpus is 0"),
        (None, ["0"], "", "GPU '0'"),
        (None, ["4", "4"], "", "each once"),
        (None, [], "", "each once"),
        (3, 4, "", "4 GPUs cannot be divided evenly among 3 runs, expected --jobs 1, 2, 4"),
        (8, 4, "", "4 GPUs cannot be divided evenly among 8 runs"),
        (None, None, "n0-such-program launch", "'n0-such-program'"),
        (None, None, "'accelerate launch", "No closing quotation"),
    ],
)
def test_impossible_divisions_are_named(jobs: int | None, gpus: Any, launch: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_launch(jobs, gpus, launch)


@pytest.mark.parametrize(
    ("visible", "expected"), [("2,0", ("2", "0")), ("GPU-1a, MIG-2b", ("GPU-1a", "MIG-2b")), ("3,1,-1,0", ("3", "1"))]
)
def test_only_visible_gpus_are_used(visible: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS, visible)
    assert choose_gpus(2) == expected
    for nothing in ("", "-1"):
        monkeypatch.setenv(GPUS, nothing)
        with pytest.raises(UserError, match="0 visible GPUs"):
            choose_gpus(1)


def test_a_run_without_a_launcher_uses_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--methods", "grpo,rest", "--dry-run", "--out", str(tmp_path / "grid"), "--gpus"]
    assert main([*command, "4,5,6,7"]) == 0
    assert main([*command, "4", "--jobs", "2"]) == 2
    assert "each run gets 2 GPUs, but only one process" in capsys.readouterr().err
    assert main([*command, "4", "--jobs", "2", "--launch", "accelerate launch --num_processes 2"]) == 0
    # 2 responses per device are not enough for groups of 4, but 2 on each of 2 devices are
    batch = ["--set", "trl.per_device_train_batch_size=2", "--set", "trl.num_generations=4"]
    batch += ["--set", "trl.steps_per_generation=1", "--set", "trl.gradient_accumulation_steps=1"]
    assert main([*command, "4", *batch]) == 2
    assert main([*command, "4", "--jobs", "2", "--launch", "accelerate launch --num_processes 2", *batch]) == 0


class Lines(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_the_slot_of_a_run_that_another_process_trains_stays_free(launcher: Path, tmp_path: Path) -> None:
    """As after a kill of `compare`: the run it left behind still has its GPUs."""
    jobs = make(tmp_path, "left", "a", "b")
    launch = plan_launch(gpus=2, launch=f"'{launcher}'")
    left = """
import os, pathlib, sys, time
from rest_rl.runlog import lock_run_folder
folder, others = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]).parent
with lock_run_folder(folder):
    print(flush=True)
    while len(list(others.glob("*/summary.json"))) < 2:
        time.sleep(0.05)
    (folder / "config.toml").write_text("")
    (folder / "summary.json").write_text('{"steps": 1}')
"""
    process = subprocess.Popen(
        [sys.executable, "-c", left, str(jobs[0].folder)], env={**os.environ, GPUS: "4"}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()  # the lock is taken
    assert run_jobs(jobs, launch, lines := Lines()) is True
    assert process.wait(30) == 0
    assert [job.state for job in jobs] == ["kept", "done", "done"]
    assert {record[GPUS] for record in records(tmp_path, jobs[1:]).values()} == {"5"}
    assert (
        lines.lines[0] == f"left-0 is being trained by process {process.pid} on {socket.gethostname()}; waiting for it"
    )


def test_the_slot_of_a_process(tmp_path: Path) -> None:
    launch = Launch(2, gpus=("0", "1"))
    # The first line shows that the program runs: just after a start, a process has no environment yet.
    program = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(program, env={GPUS: "1"}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert launch.find_slot(f"process {process.pid} on {socket.gethostname()}") == 1
        assert launch.find_slot(f"process {process.pid} on elsewhere") is None
        assert Launch(2).find_slot(f"process {process.pid} on {socket.gethostname()}") is None
        process.kill()
    assert launch.find_slot(f"process {process.pid} on {socket.gethostname()}") is None
    assert launch.find_slot("another process") is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("python -m rest_rl train run.toml", True),
        ("/usr/bin/python3 -u -m rest_rl train run.toml", True),
        ("python /bin/accelerate launch -m rest_rl train run.toml", False),
        ("python -m torch.distributed.run -m rest_rl train run.toml", False),
        ("python -c pass", False),
        ("", False),
    ],
)
def test_what_is_a_trainer(words: str, expected: bool) -> None:
    assert is_trainer(words.split()) is expected


# A launcher whose child would train; the child ends with code 7 on SIGINT, and the launcher with code 9.
NESTED = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, lambda *_: os._exit(9))
child = subprocess.Popen([sys.executable, "-m", "rest_rl"], cwd=sys.argv[1], env={**os.environ, "PYTHONPATH": ""})
sys.exit(child.wait())
"""
CHILD = """
import os, pathlib, signal
signal.signal(signal.SIGINT, lambda *_: os._exit(7))
pathlib.Path("ready").write_text("")
while True:
    signal.pause()
"""


@pytest.mark.parametrize(("at_once", "code"), [(False, 7), (True, -signal.SIGKILL)])
def test_ctrl_c_reaches_the_training_process_and_not_its_launcher(tmp_path: Path, at_once: bool, code: int) -> None:
    (tmp_path / "rest_rl.py").write_text(CHILD)
    (job,) = make(tmp_path, "a")
    job.process = subprocess.Popen([sys.executable, "-c", NESTED, str(tmp_path)], start_new_session=True)
    launcher = psutil.Process(job.process.pid)
    while not (tmp_path / "ready").exists():
        assert job.process.poll() is None
    (child,) = launcher.children()
    assert find_trainers(launcher) == [child]
    job.state = "running"
    stop_jobs([job], at_once=at_once)
    assert job.process.wait(30) == code
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


def test_a_launcher_that_has_started_nothing_is_stopped_itself() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert find_trainers(psutil.Process(process.pid)) == [psutil.Process(process.pid)]
        process.kill()

"""A run folder has one owner: a second process is refused, and a dead process owns nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rest_rl import runlog
from rest_rl.cli.app import main
from rest_rl.errors import UserError
from rest_rl.report.page import write_report
from rest_rl.runlog import Observer, RunLog, find_lock_owner, lock_run_folder, read_run
from tests.sample_files import save_samples
from tests.test_cli import RUN
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

HOLD = """
import sys, time
from pathlib import Path
from rest_rl.runlog import lock_run_folder
with lock_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    name = f"process {holder.pid} on {socket.gethostname()}"
    assert find_lock_owner(tmp_path / "run") == name
    with pytest.raises(UserError, match=name), lock_run_folder(tmp_path / "run"):
        pass
    with lock_run_folder(tmp_path / "run", enabled=False):  # another process of the same launch
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert find_lock_owner(tmp_path / "run") is None
    with lock_run_folder(tmp_path / "run"):
        assert find_lock_owner(tmp_path / "run") == f"process {os.getpid()} on {socket.gethostname()}"
    assert find_lock_owner(tmp_path / "run") is None
    assert find_lock_owner(tmp_path / "nowhere") is None


def test_resuming_a_run_in_progress_is_refused_and_changes_nothing(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "config.toml").write_text("")
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert f"process {holder.pid} on {socket.gethostname()}" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.toml"]


def test_a_file_system_without_locks_only_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "fcntl", None)
    said: list[str] = []

    class Heard(Observer):
        def say(self, text: str) -> None:
            said.append(text)

    with lock_run_folder(tmp_path, Heard()), lock_run_folder(tmp_path, Heard()):
        assert find_lock_owner(tmp_path) is None
    assert [str(tmp_path) in text for text in said] == [True, True]


@pytest.mark.slow
def test_two_processes_on_one_folder_leave_the_rows_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, folder = tiny_tokenizer(), tmp_path / "run"
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = save_samples(tiny_samples(8), tmp_path / "samples.jsonl")
    (tmp_path / "run.toml").write_text(RUN.format(model=tmp_path / "model", data=data, steps=12))
    command = [sys.executable, "-m", "rest_rl", "train", str(tmp_path / "run.toml"), "--out", str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: (folder / "metrics.jsonl").exists() and len(read_run(folder).metrics) >= 3)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is still there
    for again in (["--resume", "--out", str(folder)], [str(tmp_path / "run.toml"), "--resume", "--out", str(folder)]):
        second = subprocess.run([sys.executable, "-m", "rest_rl", "train", *again], capture_output=True, text=True)
        assert (second.returncode, second.stderr.count("\n")) == (2, 1)
        assert f"process {first.pid} on {socket.gethostname()}" in second.stderr
    os.kill(first.pid, signal.SIGCONT)
    first.send_signal(signal.SIGINT)
    assert first.wait(120) == 130
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert [row["step"] for row in read_run(folder).metrics] == [*range(1, 13)]


def test_a_report_warns_of_mixed_rows(tmp_path: Path) -> None:
    log = RunLog.create(tmp_path / "run", "", [])
    for step in (28, 29, 30, 29, 31, 30, 32):
        log.add_metrics({"step": step, "reward": 0.5})
    page = write_report([tmp_path / "run"]).read_text()
    assert "out of order: 2; the first is step 29 after step 30" in page

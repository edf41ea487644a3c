"""Run folders: nothing written is lost, a torn line costs one line, resuming drops what the checkpoint has not seen."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rest_rl.errors import UserError
from rest_rl.jsonl import as_json
from rest_rl.runlog import METRICS, RESPONSES, SUMMARY, RunLog, read_run, replace_file


def start(folder: Path, steps: int = 0) -> RunLog:
    log = RunLog.create(folder, "[run]\nseed = 0\n", ["rest-rl", "train"])
    for step in range(1, steps + 1):
        log.add_metrics({"step": step, "reward": step / 10})
        log.add_responses([{"step": step, "response": f"r{step}"}])
        log.add_timing({"step": step, "step_time": 0.1})
    return log


def test_a_folder_is_read_back_as_written(tmp_path: Path) -> None:
    log = start(tmp_path / "run", steps=3)
    log.update_summary(before={"exact_match": 0.25})
    log.update_summary(after={"exact_match": 0.5})
    run = read_run(tmp_path / "run")
    assert [row["reward"] for row in run.metrics] == [0.1, 0.2, 0.3]
    assert run.summary == {"before": {"exact_match": 0.25}, "after": {"exact_match": 0.5}}
    assert run.environment["command"] == ["rest-rl", "train"]
    assert run.environment["libraries"]["torch"]
    assert log.checkpoints.is_dir()
    assert log.plots.is_dir()


def test_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    start(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"already contains a run.*--resume"):
        start(tmp_path)
    assert len(read_run(tmp_path).metrics) == 2


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    start(tmp_path, steps=5)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "rew')
    with (tmp_path / RESPONSES).open("ab") as file:
        file.write('{"step": 6, "response": "é'.encode()[:-1])
    assert len(read_run(tmp_path).metrics) == 5
    log = RunLog.resume(tmp_path, step=3)
    log.add_metrics({"step": 4, "reward": 0.4})
    run = read_run(tmp_path)
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    assert [row["step"] for row in run.responses] == [1, 2, 3]
    # byte for byte what an uninterrupted run would have written
    assert (tmp_path / METRICS).read_text() == "".join(
        as_json({"step": step, "reward": step / 10}) + "\n" for step in range(1, 5)
    )


@pytest.mark.parametrize("is_last", [False, True])
def test_resume_before_the_end_drops_the_evaluation_after_it(tmp_path: Path, is_last: bool) -> None:
    whole = {"before": {"n": 1}, "steps": 5, "after": {"n": 2}}
    start(tmp_path, steps=5).update_summary(**whole)
    log = RunLog.resume(tmp_path, step=5 if is_last else 3, is_last=is_last)
    assert log.read_summary() == (whole if is_last else {"before": {"n": 1}})


def test_a_summary_that_is_not_an_object_is_an_error(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / SUMMARY).write_text("[]")
    with pytest.raises(ValueError, match=r"summary\.json contains JSON of type list, expected an object"):
        read_run(tmp_path)


def test_resuming_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no run.*without --resume"):
        RunLog.resume(tmp_path, 0)


def test_a_file_instead_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        start(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


LIMITED = """
import resource, signal, sys
from rest_rl.runlog import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = RunLog.resume(sys.argv[1], 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    log.add_responses([{"step": 3, "response": "x" * 1000}])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX")
def test_a_full_disk_leaves_earlier_rows_intact(tmp_path: Path) -> None:
    start(tmp_path, steps=2)
    before = (tmp_path / RESPONSES).read_bytes()
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert "continue with --resume" in done.stdout
    assert (tmp_path / RESPONSES).read_bytes() == before


def test_an_incomplete_model_is_copied_again_and_a_complete_one_stays(tmp_path: Path) -> None:
    log, checkpoint = start(tmp_path / "run"), tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_text("whole")
    (checkpoint / "optimizer.pt").write_text("state")
    log.model.mkdir()
    (log.model / "model.safetensors").write_text("who")  # killed while it was written
    log.keep_model(checkpoint)
    assert {path.name: path.read_text() for path in log.model.iterdir()} == {"model.safetensors": "whole"}
    log.update_summary(steps=2)
    (log.model / "README.md").write_text("mine")
    log.keep_model(checkpoint)
    assert (log.model / "README.md").exists()


@pytest.mark.parametrize(
    ("error", "is_the_folder"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("I/O error: No such file or directory (os error 2)"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), False),  # there is room
        (FileNotFoundError(errno.ENOENT, "No such file", "prices.csv"), False),  # of a user's reward
        (RuntimeError("Some tensors share memory"), False),
    ],
)
def test_only_errors_of_the_folder_are_reported_as_such(tmp_path: Path, error: Exception, is_the_folder: bool):
    from rest_rl.train.trl.engine import explain_write_errors

    (tmp_path / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(UserError if is_the_folder else type(error)) as caught, explain_write_errors(tmp_path):
        raise error
    assert is_the_folder == isinstance(caught.value, UserError)
    assert (tmp_path / "optimizer.pt").read_bytes() == b"torn"


WRITERS = {
    "torch": "torch.save({'a': torch.zeros(1000)}, folder / 'optimizer.pt')",
    "safetensors": "save_file({'a': torch.zeros(1000)}, folder / 'model.safetensors')",
}
SAVE = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from rest_rl.train.trl.engine import explain_write_errors
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with explain_write_errors(folder):
    exec(sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_of_the_folder_for_every_checkpoint_writer(tmp_path: Path, writer: str) -> None:
    command = [sys.executable, "-c", SAVE, tmp_path, WRITERS[writer]]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rest_rl.errors.UserError: ")
    assert f"run folder {tmp_path} (File too large)" in last


def test_summary_survives_a_failed_update(tmp_path: Path) -> None:
    log = start(tmp_path)
    log.update_summary(before={"exact_match": 0.25})
    (tmp_path / f".{SUMMARY}.part").mkdir()
    with pytest.raises((ValueError, OSError)):
        log.update_summary(after={"exact_match": 0.5})
    assert log.read_summary() == {"before": {"exact_match": 0.25}}


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    replace_file(path, "é")
    replace_file(path, "new")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "half of it\ud800")
    assert {one.name: one.read_text(encoding="utf-8") for one in tmp_path.iterdir()} == {"file.json": "new"}
    for unwritable_folder_error in (path / "below-a-file", tmp_path / "missing" / "file"):
        with pytest.raises(OSError, match=r"Not a directory|No such file"):
            replace_file(unwritable_folder_error, "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"Is a directory"):
        replace_file(tmp_path / "folder", "")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file.json", "folder"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog.create(tmp_path / "run", "", [], enabled=False)
    log.add_metrics({"step": 1})
    log.update_summary(steps=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["é", "\u2028\x85\n", "\ud800", "\x00", "😀"])
def test_any_text_is_one_line_and_is_read_back(tmp_path: Path, value: str) -> None:
    log = start(tmp_path)
    log.add_responses([{"step": 1, "response": value}, {"step": 1, "response": "next"}])
    assert [row["response"] for row in read_run(tmp_path).responses] == [value, "next"]


def test_nan_and_infinity_become_null() -> None:
    assert json.loads(as_json({"a": math.nan, "b": [math.inf, 1.5]})) == {"a": None, "b": [None, 1.5]}

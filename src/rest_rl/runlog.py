"""The run folder: writing it, reading it back, and locking it.

    config.toml        the resolved configuration           summary.json   evaluation before and after
    environment.json   versions, platform, command line     timing.jsonl   seconds per step
    metrics.jsonl      one row per step                     checkpoints/   for `--resume`
    responses.jsonl    some responses of each step          model/         the trained model and its tokenizer
    rejected.jsonl     rejected rows, with reasons          plots/
    evaluations.jsonl  evaluations during training          .lock          locked by the process that trains

JSONL rows are appended whole. If the process is killed within a row, readers skip the incomplete last line and a
resumed run removes it. Wall-clock times are not in the metrics, so that the metrics of a resumed run equal those of an
uninterrupted one.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from rest_rl.errors import UserError
from rest_rl.jsonl import as_json, describe_os_error
from rest_rl.objects import add_search_folder

CONFIG, ENVIRONMENT, SUMMARY = "config.toml", "environment.json", "summary.json"
METRICS, RESPONSES, TIMING = "metrics.jsonl", "responses.jsonl", "timing.jsonl"
EVALUATIONS = "evaluations.jsonl"
REJECTED = "rejected.jsonl"
CHECKPOINTS, PLOTS, MODEL = "checkpoints", "plots", "model"
LOCK = ".lock"
# Checkpoint files that only the trainer needs; they are not copied to model/.
TRAINER_FILES = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "global_step*", "optimizer_*")
LIBRARIES = ("rest-rl", "torch", "transformers", "trl", "accelerate", "tokenizers", "numpy", "peft")
LIBRARIES += ("vllm", "verl", "ray")

if TYPE_CHECKING:
    from rest_rl.report.diagnosis import Finding

Row = dict[str, Any]


class Advance(Protocol):
    """Updates a progress display with the amount done, the total (if it is known by now) and a note."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


class Observer:
    """Receives the events of a workflow. This class ignores them; override the methods that you need."""

    def say(self, text: str) -> None:
        """Receive a line of text."""

    def show_table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Receive a table with text in the first column and numbers in the others."""

    def track(self, what: str, total: int | None = None, done: int = 0) -> AbstractContextManager[Advance]:
        """Open a progress display; `total` is None if it is unknown."""
        return nullcontext(lambda done, total=None, note="": None)

    def on_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Called after each training step, once its metrics are in the run folder."""

    def on_responses(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Called with some responses of a training step, counted from 1; the rows are those of responses.jsonl."""

    def on_finding(self, finding: Finding) -> None:
        """Called once for each new finding of the diagnosis."""


SILENT = Observer()


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; rows are in the order of their steps."""

    folder: Path
    config: str
    environment: Row
    metrics: tuple[Row, ...]
    responses: tuple[Row, ...]
    timing: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    summary: Row

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.folder.resolve().name


class RunLog:
    """Writes a run folder; with `enabled=False` (all ranks but the first) it writes nothing.

    Use `create` or `resume`; the constructor does not touch the folder.
    """

    def __init__(self, folder: str | Path, *, enabled: bool = True) -> None:
        self.folder, self.enabled = Path(folder), enabled
        self.checkpoints, self.plots, self.model = (self.folder / name for name in (CHECKPOINTS, PLOTS, MODEL))

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: str,
        command: Iterable[str],
        *,
        enabled: bool = True,
        run_file: str | Path | None = None,
    ) -> RunLog:
        """Start a run in a new folder; UserError if it already contains a run or is not writable.

        `run_file` is recorded because a user's weight rule or format may be defined next to it.
        """
        log = cls(folder, enabled=enabled)
        if (log.folder / CONFIG).exists() and enabled:
            raise existing_run_error(folder)
        log._make_folders()
        log._write(CONFIG, config)
        environment = describe_environment(command)
        if run_file is not None:
            environment["run_file"] = str(Path(run_file).absolute())
        log._write(ENVIRONMENT, as_json(environment, indent=2) + "\n")
        return log

    @classmethod
    def resume(cls, folder: str | Path, step: int, *, is_last: bool = False, enabled: bool = True) -> RunLog:
        """Reopen a run folder at a checkpoint, and remove later rows and an incomplete last line.

        Unless `is_last` (the checkpoint is the run's last one), the summary keeps only entries from before training.
        """
        log = cls(folder, enabled=enabled)
        if not (log.folder / CONFIG).is_file():
            raise UserError(f"{folder} contains no run", remedy="start one without --resume")
        log._make_folders()
        for name in (METRICS, RESPONSES, TIMING, EVALUATIONS):
            log._drop_rows_after(name, step)
        if not is_last and (summary := log.read_summary()):
            kept = {key: value for key, value in summary.items() if key in ("data", "before")}
            log._write(SUMMARY, as_json(kept, indent=2) + "\n")
        return log

    def change(self, config: str, changes: Mapping[str, Any]) -> None:
        """Replace the configuration of a resumed run, and append the changes to environment.json."""
        environment = read_json_object(self.folder / ENVIRONMENT)
        environment["changes"] = [*environment.get("changes", []), changes]
        self._write(ENVIRONMENT, as_json(environment, indent=2) + "\n")
        self._write(CONFIG, config)

    def keep_model(self, checkpoint: Path) -> None:
        """Copy a checkpoint without the trainer's state to model/, unless a complete model is already there."""
        # The summary gets its `steps` after this copy, so a model without them may be incomplete. The copy goes to a
        # temporary folder first and is then renamed, which is atomic.
        if not self.enabled or (self.model.exists() and "steps" in self.read_summary()):
            return
        temporary = self.folder / f".{MODEL}.part"
        with self._wrap_write_errors():
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns(*TRAINER_FILES))
            shutil.rmtree(self.model, ignore_errors=True)
            temporary.replace(self.model)

    def write_rejected(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rejected rows to rejected.jsonl; if there are none, write no file."""
        if text := to_jsonl(rows):
            self._write(REJECTED, text)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append the metrics of a step; `row["step"]` counts the finished steps."""
        self._append(METRICS, [row])

    def add_responses(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append responses; each row has a `step`."""
        self._append(RESPONSES, rows)

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append the scores of an evaluation during training; the row has a `step`."""
        self._append(EVALUATIONS, [row])

    def add_timing(self, row: Mapping[str, Any]) -> None:
        """Append the wall-clock times of a step."""
        self._append(TIMING, [row])

    def read_summary(self) -> Row:
        """Return the summary, empty if there is none yet."""
        return read_json_object(self.folder / SUMMARY)

    def update_summary(self, **entries: Any) -> None:
        """Add entries to summary.json; the file is replaced atomically."""
        self._write(SUMMARY, as_json({**self.read_summary(), **entries}, indent=2) + "\n")

    @contextmanager
    def _wrap_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable_folder_error(self.folder, error) from error

    def _make_folders(self) -> None:
        if self.enabled:
            with self._wrap_write_errors():
                for folder in (self.folder, self.checkpoints, self.plots):
                    folder.mkdir(parents=True, exist_ok=True)

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        text, path = to_jsonl(rows), self.folder / name
        if not self.enabled or not text:
            return
        # On a full disk a part of the text may have been written. Cutting the file back to its old size keeps the rows
        # whole, and a later append starts on a new line.
        size = path.stat().st_size if path.exists() else 0
        with self._wrap_write_errors():
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError:
                truncate_file(path, size)
                raise

    def _drop_rows_after(self, name: str, step: int) -> None:
        if (self.folder / name).exists():
            self._write(name, to_jsonl(row for row in read_rows(self.folder / name) if row.get("step", 0) <= step))

    def _write(self, name: str, text: str) -> None:
        if self.enabled:
            with self._wrap_write_errors():
                replace_file(self.folder / name, text)


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(as_json(row) + "\n" for row in rows)


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically: readers find the old text or the new one. OSError if it fails."""
    # Without fsync a crash could leave the renamed file empty: some file systems write the rename before the data.
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def add_module_folders(folder: Path) -> None:
    """Add the folder of a recorded run's run file to the search path for users' modules."""
    if file := read_json_object(folder / ENVIRONMENT).get("run_file"):
        run_file = Path(file)
        add_search_folder(run_file.parent)
        # The run file may itself be the config.toml of another run, whose modules are next to its own run file.
        if run_file.name == CONFIG and run_file.parent != folder.absolute():
            add_module_folders(run_file.parent)


def read_run(folder: str | Path) -> Run:
    """Read the folder of a finished or unfinished run; UserError if it contains no run."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        inside = [pattern for pattern in ("*", "runs/*") if any(path.glob(f"{pattern}/{CONFIG}"))]  # runs/*: a grid
        remedy = f"did you mean {path / inside[0]}?" if inside else "pass the --out of a run"
        problem = f"{folder} contains no {CONFIG}" if path.exists() else f"{folder} does not exist"
        raise UserError(problem, "a run folder", remedy)
    add_module_folders(path)
    return Run(
        folder=path,
        config=read_toml_text(path / CONFIG),
        environment=read_json_object(path / ENVIRONMENT),
        metrics=tuple(read_rows(path / METRICS)),
        responses=tuple(read_rows(path / RESPONSES)),
        timing=tuple(read_rows(path / TIMING)),
        evaluations=tuple(read_rows(path / EVALUATIONS)),
        summary=read_json_object(path / SUMMARY),
    )


def read_toml_text(path: Path) -> str:
    """Return the text of a run file; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({describe_os_error(error)})", remedy="check the path") from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL file up to the first broken line; none if the file is missing."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    # Not splitlines(), which also splits at U+2028 and similar characters; JSON strings contain them unescaped.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_json_object(path: Path) -> Row:
    """Return the object in a JSON file; empty if the file is missing."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})", "an object", "restore or delete it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} contains JSON of type {type(value).__name__}", "an object", "restore or delete it")
    return value


def truncate_file(path: Path, size: int) -> None:
    """Cut a file back to a size; errors are ignored."""
    with suppress(OSError):
        os.truncate(path, size)


def unwritable_folder_error(folder: Path, error: OSError) -> ValueError:
    """Return the error for a folder that cannot be written."""
    if folder.is_file():
        return UserError(f"run folder {folder} is a file", remedy="pass another --out")
    return UserError(
        f"cannot write to run folder {folder} ({describe_os_error(error)})",
        remedy="free some space and continue with --resume, or pass another --out",
    )


def existing_run_error(folder: str | Path) -> UserError:
    """Return the error for starting a run in a folder that already contains a run."""
    remedy = "add --resume to continue it, or pass another --out"
    return UserError(f"{folder} already contains a run", remedy=remedy)


@contextmanager
def lock_run_folder(folder: Path, observer: Observer = SILENT, *, enabled: bool = True) -> Iterator[None]:
    """Lock a run folder until the block ends or this process dies; UserError if another process has locked it.

    If the operating or file system does not support locks, the observer gets a warning and the block runs without one.
    """
    # The lock is an flock on the open file `.lock`. The kernel releases it when the process ends, even after kill -9,
    # so there are no stale locks to detect. The text in the file is only for the error message.
    if not enabled:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable_folder_error(folder, error) from error
    with file:
        try:
            is_ours = try_lock(file)
            for _ in range(5):  # `find_lock_owner` in another process may lock it for a moment
                if not is_ours:
                    time.sleep(0.1)
                    is_ours = try_lock(file)
        except OSError as error:
            reason = describe_os_error(error)
            observer.say(f"warning: cannot lock {folder} ({reason}); do not start a second process in it")
            is_ours = True
        if not is_ours:
            raise locked_folder_error(folder, find_lock_owner(folder))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_unlocked(folder: Path) -> None:
    """Raise a UserError if another process trains in a run folder; takes no lock."""
    if owner := find_lock_owner(folder):
        raise locked_folder_error(folder, owner)


def locked_folder_error(folder: Path, owner: str | None) -> UserError:
    remedy = "wait for it or stop it, or pass another --out"
    return UserError(f"{owner} is already training in {folder}", remedy=remedy)


def find_lock_owner(folder: Path) -> str | None:
    """Return the process that has locked a run folder, or None."""
    try:
        with (folder / LOCK).open("r+", encoding="utf-8", errors="replace") as file:
            return None if try_lock(file) else file.readline(200).strip() or "another process"
    except OSError:
        return None


def try_lock(file: IO[str]) -> bool:
    # False if another process has locked the file; OSError if locks are not supported. Closing the file unlocks it.
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no fcntl")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def describe_environment(command: Iterable[str]) -> Row:
    """Return versions, platform, commit and command line, for reproduction."""
    return {
        "command": list(command),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "libraries": {name: version for name in LIBRARIES if (version := installed_version(name))},
        "commit": source_commit(Path(__file__).parent),
    }


def installed_version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_commit(folder: Path) -> str | None:
    # The commit of this source tree, marked if there are changes. An installed package may be inside an unrelated
    # repository, so this file must be tracked for the commit to count.
    if run_git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return run_git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def run_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

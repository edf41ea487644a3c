"""A run folder: what was asked, where it ran, what happened at each step, and how it ended.

    config.toml        the resolved run                  summary.json   evaluation before and after
    environment.json   versions, platform, command       timing.jsonl   seconds per step
    metrics.jsonl      one object per step               checkpoints/   what `--resume` starts from
    responses.jsonl    some responses of each step       model/         what was trained, and its tokenizer
    rejected.jsonl     rows that were left out, and why  plots/
    evaluations.jsonl  scores on the slice, during training      .lock  held by the process that trains

Every line is written and flushed whole. A process killed in mid-line leaves a last line that readers skip and a resumed
run removes. Wall-clock times stand apart from the metrics: a resumed run's metrics equal an uninterrupted run's.
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
"""The file that the process holds that trains in a folder, and what it is called."""
TRAINER_FILES = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "global_step*", "optimizer_*")
"""What of a checkpoint is for the trainer alone."""
LIBRARIES = ("rest-rl", "torch", "transformers", "trl", "accelerate", "tokenizers", "numpy", "peft")
LIBRARIES += ("vllm", "verl", "ray")

if TYPE_CHECKING:
    from rest_rl.report.diagnosis import Finding

Row = dict[str, Any]


class Advance(Protocol):
    """Moves a bar: how much is done, of how much if that has become known, and a note beside it."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


class Observer:
    """Whom a workflow tells what happens; this one shows nothing, override what you want to hear of."""

    def say(self, text: str) -> None:
        """One line of text."""

    def show_table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table whose first column is text and whose other columns are numbers."""

    def track(self, what: str, total: int | None = None, done: int = 0) -> AbstractContextManager[Advance]:
        """Progress of something that takes a while; `total` is None where it is not known."""
        return nullcontext(lambda done, total=None, note="": None)

    def on_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """A training step has finished; its metrics are in the run folder."""

    def on_responses(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some responses that `step`, counted from 1, learns from; `rows` are as in responses.jsonl."""

    def on_finding(self, finding: Finding) -> None:
        """Called once for each new finding of the diagnosis."""


SILENT = Observer()


@dataclass(frozen=True)
class Run:
    """A run folder as read back; `metrics`, `responses` and `evaluations` are in step order."""

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
        """The folder's own name."""
        return self.folder.resolve().name


class RunLog:
    """The writing side of a run folder; with `enabled=False` (a rank other than the first) it writes nothing."""

    def __init__(self, folder: str | Path, *, enabled: bool = True) -> None:
        """Use `create` or `resume`; this only binds the folder."""
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
        """Start a run in an empty or new folder; UserError if it holds a run already or cannot be written.

        `run_file` is recorded because a user's own objects (a weight rule, a format) may lie beside it.
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
        """Go on with the run in `folder` from a checkpoint at `step`: later rows and a torn last line are removed.

        Unless `step` is the run's last one, the summary keeps the evaluation before training alone.
        """
        log = cls(folder, enabled=enabled)
        if not (log.folder / CONFIG).is_file():
            raise UserError(f"{folder}, which holds no run", "a run folder", "start one without --resume")
        log._make_folders()
        for name in (METRICS, RESPONSES, TIMING, EVALUATIONS):
            log._drop_rows_after(name, step)
        if not is_last and (summary := log.read_summary()):
            kept = {key: value for key, value in summary.items() if key in ("data", "before")}
            log._write(SUMMARY, as_json(kept, indent=2) + "\n")
        return log

    def change(self, config: str, changes: Mapping[str, Any]) -> None:
        """Record that a resumed run goes on as `config`; what has changed is kept in `changes` of environment.json."""
        environment = read_json_object(self.folder / ENVIRONMENT)
        environment["changes"] = [*environment.get("changes", []), changes]
        self._write(ENVIRONMENT, as_json(environment, indent=2) + "\n")
        self._write(CONFIG, config)

    def keep_model(self, checkpoint: Path) -> None:
        """Copy what a checkpoint holds besides the trainer's state to `model`, unless a whole one is there.

        The steps stand in the summary once the model has been kept: one without them may have been cut short.
        """
        if not self.enabled or (self.model.exists() and "steps" in self.read_summary()):
            return
        part = self.folder / f".{MODEL}.part"
        with self._wrap_write_errors():
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(checkpoint, part, ignore=shutil.ignore_patterns(*TRAINER_FILES))
            shutil.rmtree(self.model, ignore_errors=True)
            part.replace(self.model)

    def write_rejected(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows that training leaves out; without any there is no file."""
        if text := to_jsonl(rows):
            self._write(REJECTED, text)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step's metrics; `row["step"]` is the number of finished steps."""
        self._append(METRICS, [row])

    def add_responses(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append responses; each row has its `step`."""
        self._append(RESPONSES, rows)

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append the scores of one evaluation during training; the row has its `step`."""
        self._append(EVALUATIONS, [row])

    def add_timing(self, row: Mapping[str, Any]) -> None:
        """Append one step's wall-clock times."""
        self._append(TIMING, [row])

    def read_summary(self) -> Row:
        """The summary so far, empty if there is none."""
        return read_json_object(self.folder / SUMMARY)

    def update_summary(self, **entries: Any) -> None:
        """Merge entries into summary.json, atomically."""
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
    """Write a file whole or not at all: a reader finds the old text or the new one. OSError if it fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def add_module_folders(folder: Path) -> None:
    """Look for users' modules (a weight rule, a format) where a recorded run found them: beside its run file."""
    if file := read_json_object(folder / ENVIRONMENT).get("run_file"):
        run_file = Path(file)
        add_search_folder(run_file.parent)
        if run_file.name == CONFIG and run_file.parent != folder.absolute():  # that of another run
            add_module_folders(run_file.parent)


def read_run(folder: str | Path) -> Run:
    """Read a run folder, finished or not; ValueError if it is none."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        inside = [pattern for pattern in ("*", "runs/*") if any(path.glob(f"{pattern}/{CONFIG}"))]  # of a grid: runs/*
        remedy = f"did you mean {path / inside[0]}?" if inside else "pass what --out was"
        raise UserError(f"{folder}, which holds no {CONFIG}", "a run folder", f"{remedy}")
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
    """The text of a run file; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} ({describe_os_error(error)})", "a readable TOML file", "check the path") from error


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSONL file up to its first broken line; a missing file has none."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    # Not splitlines: JSON leaves U+2028 and its kin as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_json_object(path: Path) -> Row:
    """The object of a JSON file; empty if it is missing."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}, not JSON ({error})", "an object", "restore or delete it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, which holds a {type(value).__name__}", "an object", "restore or delete it")
    return value


def truncate_file(path: Path, size: int) -> None:
    """Remove what a failed write left behind, as far as the folder lets us."""
    try:
        os.truncate(path, size)
    except OSError:
        return


def unwritable_folder_error(folder: Path, error: OSError) -> ValueError:
    """The error for a folder that is full, read-only or no folder."""
    if folder.is_file():
        return UserError(f"run folder {folder}, which is a file", "a new folder", "pass another --out")
    return UserError(
        f"run folder {folder} ({describe_os_error(error)})",
        "a writable folder with free space",
        "make room and go on with --resume (what was cut short is passed over), or pass another --out",
    )


def existing_run_error(folder: str | Path) -> UserError:
    """The error for a new run in the folder of another."""
    remedy = "add --resume to go on with it, or pass another --out"
    return UserError(f"{folder}, which holds a run already", "a new folder", remedy)


@contextmanager
def lock_run_folder(folder: Path, observer: Observer = SILENT, *, enabled: bool = True) -> Iterator[None]:
    """Own a run folder until the block ends or this process dies; UserError if another process does.

    Where the system or the file system has no locks, it says so to the observer and refuses nothing.
    """
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
            for _ in range(5):  # `find_lock_owner` holds the lock for a moment
                if not is_ours:
                    time.sleep(0.1)
                    is_ours = try_lock(file)
        except OSError as error:
            observer.say(f"{folder} cannot be locked ({describe_os_error(error)}): let no other process train in it")
            is_ours = True
        if not is_ours:
            raise locked_folder_error(folder, find_lock_owner(folder))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_unlocked(folder: Path) -> None:
    """UserError if another process trains in a run folder; of use before much is loaded, it takes no lock."""
    if owner := find_lock_owner(folder):
        raise locked_folder_error(folder, owner)


def locked_folder_error(folder: Path, owner: str | None) -> UserError:
    return UserError(
        f"{folder}, in which {owner} is training",
        "a run folder that no other process trains in",
        "wait for its end or stop it, or pass another --out",
    )


def find_lock_owner(folder: Path) -> str | None:
    """Which process trains in a run folder, as far as locks can tell; None if none does."""
    try:
        with (folder / LOCK).open("r+", encoding="utf-8", errors="replace") as file:
            return None if try_lock(file) else file.readline(200).strip() or "another process"
    except OSError:
        return None


def try_lock(file: IO[str]) -> bool:
    """Lock a file until it is closed; False if another process has locked it, OSError where there are no locks."""
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
    """Versions, platform, commit and command line; nothing that changes the numbers is left out."""
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
    """Commit of the source tree that holds `folder`, marked when it has changes; None outside a repository."""
    # An installed package may lie inside somebody else's repository: only a tracked file has a commit.
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

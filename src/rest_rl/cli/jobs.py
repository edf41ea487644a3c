"""The runs of a grid, each `rest-rl train` in a process of its own: some at a time, resumed, stopped in order.

A run's log is locked as long as somebody trains it: the lock passes to the process of the run and outlives us. So
nobody trains a run twice, also when an earlier command was killed and left its runs behind.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rest_rl.cli.terminal import say
from rest_rl.compare.grid import LOGS, RUNS, Grid, RunName, is_finished
from rest_rl.config import AUTO, RunConfig, parse_toml, read_run_file
from rest_rl.errors import UserError
from rest_rl.jsonl import parse_row
from rest_rl.report.tables import flatten, is_number
from rest_rl.runlog import CONFIG, METRICS, SUMMARY, read_object, replace_file, unwritable

State = Literal["waiting", "running", "done", "kept", "failed", "stopped"]
POLL = 0.5
TAIL_LINES, TAIL_BYTES = 12, 16_384
OF_THE_MACHINE = ("use_cpu", "bf16")
"""Keys of `[trl]` that `rest-rl train` fills in where there is no accelerator."""


@dataclass
class Job:
    """One run of the grid and what became of it."""

    name: RunName
    config: RunConfig
    folder: Path
    log: Path
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    begun: int = 0
    """Size of the log when this attempt began."""
    note: str = field(default="")
    is_stopping: bool = False
    """Whether we have asked it to stop after its step: asked twice it would stop at once."""

    @property
    def total(self) -> int:
        """Steps of the run; 0 if they depend on the data."""
        steps = self.config.trl.get("max_steps", 0)
        return steps if isinstance(steps, int) and steps > 0 else 0

    def last_metrics(self) -> dict[str, Any]:
        """The newest whole row of the run's metrics; empty before the first."""
        for line in reversed(tail(self.folder / METRICS).split("\n")[:-1]):
            with suppress(ValueError):
                return dict(parse_row(line.encode()))
        return {}

    def share_done(self) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.state in ("done", "kept"):
            return 1.0
        step = self.last_metrics().get("step", 0)
        return min(1.0, step / self.total) if self.total and is_number(step) else 0.0


def grid_jobs(grid: Grid, out: Path) -> list[Job]:
    """A job for each run. Finished runs are kept; ValueError for one in the folder that is another run."""
    jobs = []
    for name, config in grid.runs():
        folder = out / RUNS / str(name)
        placed = replace(config, run=replace(config.run, out=str(folder)))
        job = Job(name, placed, folder, out / LOGS / f"{name}.log")
        refuse_other(job)
        if is_kept(job):
            job.state = "kept"
        jobs.append(job)
    return jobs


def is_kept(job: Job) -> bool:
    """Whether the run is finished."""
    return (job.folder / CONFIG).is_file() and is_finished(read_object(job.folder / SUMMARY))


def refuse_other(job: Job) -> None:
    """ValueError if the folder holds a run that differs from the one that is wanted."""
    recorded_file = job.folder / CONFIG
    if not recorded_file.is_file():
        return
    recorded = read_run_file(recorded_file)
    wanted = job.config
    if wanted.rest.format == AUTO:
        wanted = replace(wanted, rest=replace(wanted.rest, format=recorded.rest.format))
    filled = {key: recorded.trl[key] for key in OF_THE_MACHINE if key in recorded.trl}
    wanted = replace(wanted, trl={**filled, **wanted.trl})
    new, old = (settings(config) for config in (wanted, recorded))
    changed = sorted(key for key in {*new, *old} if new.get(key) != old.get(key) and key != "run.out")
    if changed:
        parts = [f"{key} was {old.get(key, 'unset')}, now {new.get(key, 'unset')}" for key in changed[:3]]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{job.folder}, which holds another run ({'; '.join(parts)}{more})",
            "the run of this grid",
            "pass another --out, or delete the folder to train it anew",
        )


def settings(config: RunConfig) -> dict[str, Any]:
    """A run as one flat table, its preset written out."""
    return flatten(parse_toml(config.to_toml(), "the run"))


def run_jobs(jobs: Sequence[Job], at_a_time: int, console: Console) -> bool:
    """Train what is not finished, at most `at_a_time` runs at once; returns False if it was interrupted."""
    for job in jobs:
        prepare(job)
    with grid_display(jobs, console) as display, stopping(jobs) as stop:
        while True:
            obey(stop, jobs, console)
            for job in jobs:
                if job.state == "running":
                    collect(job, console, stop.requested)
            start_some(jobs, at_a_time, console, stop)
            display.show()
            is_idle = not any(job.state == "running" for job in jobs)
            if is_idle and (stop.requested or not any(job.state == "waiting" for job in jobs)):
                return not stop.requested
            time.sleep(POLL)


def prepare(job: Job) -> None:
    """Make the folders of a run and its run file, which `rest-rl train` reads."""
    try:
        for folder in (job.folder.parent, job.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        replace_file(job.log.with_suffix(".toml"), job.config.to_toml())
    except OSError as error:
        raise unwritable(job.log.parent, error) from error


def start_some(jobs: Sequence[Job], at_a_time: int, console: Console, stop: Stop) -> None:
    """Start as many runs as there is room for; one that somebody else is training takes up room and waits."""
    room = at_a_time - sum(job.state == "running" for job in jobs)
    for job in [job for job in jobs if job.state == "waiting"]:
        if room <= 0 or stop.requested:
            return
        room -= 1
        log = job.log.open("ab")
        if is_locked(log):
            log.close()
            if not job.note:
                job.note = "is being trained by another process: waiting for it"
                say(console, f"{job.name} {job.note}")
            continue
        with log:
            if is_kept(job):  # somebody else has finished it
                job.state = "kept"
                room += 1
                continue
            start(job, log, at_a_time)
        say(console, f"{job.name} {job.note}")


def is_locked(log: IO[bytes]) -> bool:
    """Whether another process holds the log; if not, it is ours now."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def start(job: Job, log: IO[bytes], at_a_time: int) -> None:
    """Start a run, or go on with it, in a session of its own: Ctrl-C reaches it through us alone."""
    job.begun = job.log.stat().st_size
    command = [sys.executable, "-m", "rest_rl", "train", str(job.log.with_suffix(".toml")), "--out", str(job.folder)]
    resumes = (job.folder / CONFIG).is_file()
    job.note = f"goes on after step {job.last_metrics().get('step', 0)}" if resumes else "begins"
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // at_a_time))
    job.process = subprocess.Popen(  # noqa: S603
        [*command, *(["--resume"] if resumes else [])],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": threads, "COLUMNS": "120"},
        start_new_session=True,
    )
    job.state = "running"


def cores() -> int:
    """Processor cores that we may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collect(job: Job, console: Console, is_stopping: bool) -> None:
    """Note the end of a run, if it has ended; a failed one is shown with the end of its log."""
    assert job.process is not None
    code = job.process.poll()
    if code is None:
        return
    if code == 0 and is_kept(job):
        job.state, job.note = "done", "is done"
        say(console, f"{job.name} is done{exact_text(job)}")
        return
    job.state = "stopped" if is_stopping else "failed"
    step = job.last_metrics().get("step", 0)
    if is_stopping:
        job.note = f"stopped after step {step}"
        say(console, f"{job.name} {job.note}")
        return
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    job.note = f"{how} after step {step}"
    say(console, f"{job.name} {job.note}; the end of {job.log}:", style="bold")
    end = tail(job.log, job.begun).rstrip().split("\n")[-TAIL_LINES:]
    say(console, "\n".join(f"  {line}" for line in end), style="dim")


def exact_text(job: Job) -> str:
    """Exact match before and after, for a line of the terminal."""
    summary = read_object(job.folder / SUMMARY)
    before, after = ((summary.get(when) or {}).get("exact_match") for when in ("before", "after"))
    if not is_number(before) or not is_number(after):
        return ""
    return f": exact match {100 * before:.1f} → {100 * after:.1f} %"


def tail(path: Path, since: int = 0) -> str:
    """The end of a file that may still grow, at most 16 KiB and nothing before `since`; empty without the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since, size - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


@dataclass
class Stop:
    """Whether the user has asked for an end."""

    requested: bool = False
    at_once: bool = False
    is_told: bool = False
    """Whether the user knows that we know."""


@contextmanager
def stopping(jobs: Sequence[Job]) -> Iterator[Stop]:
    """The first Ctrl-C (or SIGTERM) ends every run after its step, with a checkpoint; the second one at once.

    The handler only notes that, and `obey` tells the runs: none is missed that is just being started, and no line is
    printed within another.
    """
    stop = Stop()

    def request(number: int, frame: types.FrameType | None) -> None:
        stop.requested, stop.at_once = True, stop.requested

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except BaseException:
        end_all(jobs)
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def obey(stop: Stop, jobs: Sequence[Job], console: Console) -> None:
    """Tell the runs of ours, and the user, what was asked for."""
    if not stop.requested:
        return
    if not stop.is_told:
        say(console, "stopping every run after its step; once more to stop at once")
        stop.is_told = True
    end_all(jobs, at_once=stop.at_once)


def end_all(jobs: Sequence[Job], *, at_once: bool = False) -> None:
    """Ask every run of ours to stop after its step, once, or kill it."""
    for job in jobs:
        if job.state == "running" and job.process is not None and (at_once or not job.is_stopping):
            job.is_stopping = True
            with suppress(ProcessLookupError):
                job.process.send_signal(signal.SIGKILL if at_once else signal.SIGINT)


class GridDisplay:
    """A bar over the grid and one for each run that is going on."""

    def __init__(self, jobs: Sequence[Job], progress: Progress) -> None:
        """Make the bar over the grid."""
        self.jobs, self.progress = jobs, progress
        self.whole = progress.add_task("grid", total=len(jobs), note="")
        self.tasks: dict[str, TaskID] = {}

    def show(self) -> None:
        """Move the bars to where the runs are."""
        counts = {state: sum(job.state == state for job in self.jobs) for state in ("done", "kept", "failed")}
        note = f"{counts['done'] + counts['kept']}/{len(self.jobs)} runs"
        note += f", {counts['failed']} failed" if counts["failed"] else ""
        self.progress.update(self.whole, completed=sum(job.share_done() for job in self.jobs), note=note)
        for job in self.jobs:
            name = str(job.name)
            if job.state == "running":
                row = job.last_metrics()
                if name not in self.tasks:
                    self.tasks[name] = self.progress.add_task(name, total=job.total or None, note="", start=True)
                self.progress.update(self.tasks[name], completed=row.get("step", 0), note=run_note(row, job.total))
            elif name in self.tasks:
                self.progress.remove_task(self.tasks.pop(name))


def run_note(row: dict[str, Any], total: int) -> str:
    """What is said beside the bar of a run."""
    step = row.get("step", 0)
    if not row or (total and step == total):
        return f"{step}/{total or '?'} evaluating"
    exact = row.get("rest/exact_match")
    return f"{step}/{total or '?'}" + (f"  exact match {exact:.2f}" if is_number(exact) else "")


@contextmanager
def grid_display(jobs: Sequence[Job], console: Console) -> Iterator[GridDisplay]:
    """The bars; where the output is no terminal there are only the lines of beginnings and ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield GridDisplay(jobs, progress)

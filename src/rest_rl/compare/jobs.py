"""Trains the runs of a grid in separate `rest-rl train` processes, several at a time; users can stop and resume them.

The process of a run locks its folder (`runlog.lock_run_folder`), so no run is trained twice. If an earlier command was
killed and left its runs training, or another command starts the same run, this command waits for the lock's owner.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rest_rl.compare.grid import LOGS_FOLDER, RUNS_FOLDER, Grid, RunName, is_finished, wrap_method_error
from rest_rl.compare.launch import Launch, stop_run
from rest_rl.config import AUTO, RunConfig, read_run_file
from rest_rl.errors import UserError
from rest_rl.jsonl import parse_row
from rest_rl.report.tables import greedy_if_recorded, headline_turn, is_number, scores_for_turn
from rest_rl.response import TURNS
from rest_rl.runlog import (
    CONFIG,
    METRICS,
    SUMMARY,
    Observer,
    find_lock_owner,
    read_json_object,
    replace_file,
    unwritable_folder_error,
)
from rest_rl.train.request import find_changed_keys, with_recorded_defaults

POLL_SECONDS = 0.5
TAIL_LINES, TAIL_BYTES = 12, 16_384


@dataclass
class Job:
    """One run of the grid: its configuration, files, process and state."""

    name: RunName
    config: RunConfig
    folder: Path
    log: Path
    state: Literal["waiting", "running", "done", "kept", "failed", "stopped"] = "waiting"
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0
    """The slot of `Launch` in which the run is running."""
    log_start: int = 0
    """Size of the log in bytes when this attempt started."""
    note: str = ""
    modules: tuple[str, ...] = ()
    """Folders of users' modules, which the run needs on its PYTHONPATH."""
    is_stopping: bool = False
    """Whether the run was asked to stop after its step; a second request would stop it at once."""

    @property
    def total(self) -> int:
        """The number of steps of the run; 0 if that number depends on the data."""
        steps = self.config.trl.get("max_steps", 0)
        return steps if isinstance(steps, int) and steps > 0 else 0

    @property
    def is_complete(self) -> bool:
        """Whether the folder contains the finished run."""
        return (self.folder / CONFIG).is_file() and is_finished(read_json_object(self.folder / SUMMARY))

    def last_metrics(self) -> dict[str, Any]:
        """Return the newest row of metrics.jsonl that is completely written; empty before the first step."""
        # The last line may be incomplete because the run is writing it, the first because the tail starts inside it.
        for line in reversed(read_tail(self.folder / METRICS).split("\n")[:-1]):
            with suppress(ValueError):
                return dict(parse_row(line.encode()))
        return {}

    def last_step(self) -> int:
        step = self.last_metrics().get("step", 0)
        return int(step) if is_number(step) else 0


def make_jobs(grid: Grid, out: Path) -> list[Job]:
    """Return a job for each run of the grid; UserError if a run's folder already contains a run with other settings."""
    jobs = []
    for name, wanted in grid.run_configs():
        folder = out / RUNS_FOLDER / str(name)
        config = replace(wanted, run=replace(wanted.run, out=str(folder)))
        job = Job(name, config, folder, out / LOGS_FOLDER / f"{name}.log", modules=grid.modules)
        check_recorded_run(job)
        if job.is_complete:
            job.state = "kept"
        jobs.append(job)
    return jobs


def check_recorded_run(job: Job) -> None:
    if not (job.folder / CONFIG).is_file():
        return
    recorded = read_run_file(job.folder / CONFIG)
    changed = find_changed_keys(with_recorded_defaults(job.config, recorded), recorded)
    if changed:
        pairs = list(changed.items())[:3]
        parts = [f"{key} was {value_or_unset(old)}, now {value_or_unset(new)}" for key, (old, new) in pairs]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{job.folder} contains a run with other settings ({'; '.join(parts)}{more})",
            "the run of this grid",
            "pass another --out, or delete the folder to train the run again",
        )


def value_or_unset(value: Any) -> Any:
    return "unset" if value is None else value


def check_startable(jobs: Sequence[Job], launch: Launch) -> None:
    """Before any run starts, raise UserError if the trainer would reject a method's settings or number of GPUs."""
    # Slow to import, and not needed for the page of finished runs.
    from rest_rl.train.trl.settings import DEFAULT_SIZE, make_trainer_config, with_whole_groups

    for job in jobs:
        if job.state == "kept" or job.config.run.engine != "trl":
            continue
        if (number := launch.gpus_per_run) > 1 and not launch.has_launcher:
            raise UserError(
                f"each run gets {number} GPUs, but only one process",
                "one GPU per run, or a launcher",
                f"pass --jobs {len(launch.gpus)}, or --launch 'accelerate launch --num_processes {number}'",
            )
        # Check with CPU settings: this process outlives every run and must not occupy memory of the runs' GPUs. Any
        # fixed format replaces `auto`, so that no tokenizer has to be loaded to detect the format.
        trl = {**with_whole_groups(job.config).trl, "use_cpu": True, "bf16": False, "fp16": False}
        if isinstance(size := trl.get("per_device_train_batch_size", DEFAULT_SIZE), int):
            trl["per_device_train_batch_size"] = size * launch.processes  # this process stands for all of the run
        rest = job.config.rest
        rest = replace(rest, format="toolrl") if rest.format == AUTO else rest
        try:
            make_trainer_config(replace(job.config, rest=rest, trl=trl).with_response_limit(None))
        except ValueError as error:  # the trainer's own checks raise other ValueErrors
            raise wrap_method_error(job.name.label, error) from error


def run_jobs(jobs: Sequence[Job], launch: Launch, observer: Observer) -> bool:
    """Train the unfinished runs, at most one per slot at a time; return False if the user interrupted them."""
    # One polling loop owns all state: signal handlers only count requests, and runs report only through their exit
    # codes and files. Each round handles stop requests before it starts runs, so that none starts after Ctrl-C; it ends
    # when no run is active and either none is waiting or the user has stopped the grid.
    for job in jobs:
        write_run_file(job)
    with progress_bars(jobs, observer) as update_bars, catch_stop_signals(jobs) as stop:
        while True:
            if stop.count:
                if not stop.is_acknowledged:
                    observer.say("stopping every run after its current step; press Ctrl-C again to stop at once")
                    stop.is_acknowledged = True
                stop_jobs(jobs, at_once=stop.count > 1)
            for job in jobs:
                if job.state == "running":
                    record_exit(job, observer, is_stopping=stop.count > 0)
            start_waiting_jobs(jobs, launch, observer, stop)
            update_bars()
            is_idle = not any(job.state == "running" for job in jobs)
            if is_idle and (stop.count or not any(job.state == "waiting" for job in jobs)):
                return not stop.count
            time.sleep(POLL_SECONDS)


def write_run_file(job: Job) -> None:
    try:
        for folder in (job.folder.parent, job.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        replace_file(job.log.with_suffix(".toml"), job.config.to_toml())
    except OSError as error:
        raise unwritable_folder_error(job.log.parent, error) from error


def start_waiting_jobs(jobs: Sequence[Job], launch: Launch, observer: Observer, stop: StopRequests) -> None:
    # A run that another process is training uses one of the slots, because it usually runs on this machine: the slot
    # that has its GPUs, or the last free one.
    used = {job.slot for job in jobs if job.state == "running"}
    free = [slot for slot in range(launch.slots) if slot not in used]
    waiting = [job for job in jobs if job.state == "waiting"]
    owners = {job.name: owner for job in waiting if (owner := find_lock_owner(job.folder))}
    for owner in owners.values():
        slot = launch.find_slot(owner)
        if free:
            free.remove(slot if slot in free else free[-1])
    for job in waiting:
        if stop.count:
            return
        if owner := owners.get(job.name):
            if not job.note:
                wait_for_owner(job, owner, observer)
        elif job.is_complete:  # another process has finished the run meanwhile
            job.state = "kept"
        elif free:
            job.slot = free.pop(0)
            start_job(job, launch)
            gpus = launch.gpus_of(job.slot)
            observer.say(f"{job.name} {job.note}" + (f" on GPU {gpus}" if gpus else ""))


def wait_for_owner(job: Job, owner: str, observer: Observer) -> None:
    job.state, job.note = "waiting", f"is being trained by {owner}; waiting for it"
    observer.say(f"{job.name} {job.note}")


def start_job(job: Job, launch: Launch) -> None:
    # The run gets a separate session: the terminal then sends Ctrl-C only to this process, which stops the runs.
    job.log_start = job.log.stat().st_size if job.log.exists() else 0
    arguments = ["-m", "rest_rl", "train", str(job.log.with_suffix(".toml")), "--out", str(job.folder)]
    resumes = (job.folder / CONFIG).is_file()
    job.note = f"resumes after step {job.last_step()}" if resumes else "starts"
    folders = [*filter(None, [os.environ.get("PYTHONPATH")]), *job.modules]
    python_path = {"PYTHONPATH": os.pathsep.join(folders)} if job.modules else {}
    with job.log.open("ab") as log:
        job.process = subprocess.Popen(  # noqa: S603
            [*launch.command, *arguments, *(["--resume"] if resumes else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **python_path, **launch.environment(job.slot), "COLUMNS": "120"},
            start_new_session=True,
        )
    job.state = "running"


def record_exit(job: Job, observer: Observer, *, is_stopping: bool) -> None:
    assert job.process is not None
    code = job.process.poll()
    if code is None:
        return
    # Exit code 0 is not enough: the folder must contain the finished run.
    if code == 0 and job.is_complete:
        job.state, job.note = "done", "is finished"
        observer.say(f"{job.name} is finished{format_exact_match(job)}")
    elif is_stopping:
        job.state, job.note = "stopped", f"stopped after step {job.last_step()}"
        observer.say(f"{job.name} {job.note}")
    elif holder := find_lock_owner(job.folder):  # another process took the folder first, so ours was refused
        wait_for_owner(job, holder, observer)
    else:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        job.state, job.note = "failed", f"{how} after step {job.last_step()}"
        observer.say(f"{job.name} {job.note}; last lines of {job.log}:")
        for line in read_tail(job.log, job.log_start).rstrip().split("\n")[-TAIL_LINES:]:
            observer.say(f"  {line}")


def format_exact_match(job: Job) -> str:
    summary = read_json_object(job.folder / SUMMARY)
    pair = [summary.get(when) for when in ("before", "after")]
    turn = headline_turn(pair)
    sampled = [scores_for_turn(scores, turn) for scores in pair]
    first, last = greedy_if_recorded(*sampled)
    before, after = first.get("exact_match"), last.get("exact_match")
    if not is_number(before) or not is_number(after):
        return ""
    what = "exact match" if first is sampled[0] else "greedy exact match"
    return f": {what} {100 * before:.1f} → {100 * after:.1f} %" + (f" on {TURNS[turn]}" if turn else "")


def read_tail(path: Path, since: int = 0) -> str:
    """Return the end of a file, at most 16 KiB and nothing before byte `since`; empty if the file cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since, size - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


@dataclass
class StopRequests:
    """The number of times that the user has asked to stop, by Ctrl-C or SIGTERM."""

    count: int = 0
    is_acknowledged: bool = False


@contextmanager
def catch_stop_signals(jobs: Sequence[Job]) -> Iterator[StopRequests]:
    # The first Ctrl-C (or SIGTERM) stops every run after its step, with a checkpoint; the second stops them at once.
    # The handler only counts and the loop forwards the request: a run that is just starting is not missed, and no
    # message is printed inside another. Python delivers signals only to the main thread.
    stop = StopRequests()

    def request(number: int, frame: types.FrameType | None) -> None:
        stop.count += 1

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    old = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    except BaseException:
        stop_jobs(jobs)
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_jobs(jobs: Sequence[Job], *, at_once: bool = False) -> None:
    # A second SIGINT would make `train` stop at once instead of after its step, so every run gets only one.
    for job in jobs:
        if job.state != "running" or job.process is None or (job.is_stopping and not at_once):
            continue
        job.is_stopping = True
        stop_run(job.process.pid, at_once=at_once)


class Bar:
    """A progress bar that is redrawn only when its position or its note changes."""

    def __init__(self, observer: Observer, what: str, total: int | None, done: int = 0) -> None:
        self.stack, self.shown = ExitStack(), (done, "")
        self.advance = self.stack.enter_context(observer.track(what, total, done))

    def update(self, done: int, note: str) -> None:
        if self.shown != (done, note):
            self.shown = done, note
            self.advance(done, note=note)


@contextmanager
def progress_bars(jobs: Sequence[Job], observer: Observer) -> Iterator[Callable[[], None]]:
    """Show one progress bar for the grid and one for each running job; the yielded function updates all of them."""
    whole, bars = Bar(observer, "runs", len(jobs)), dict[RunName, Bar]()

    def update() -> None:
        failed = sum(job.state == "failed" for job in jobs)
        whole.update(sum(job.state in ("done", "kept") for job in jobs), f"{failed} failed" if failed else "")
        for job in jobs:
            if job.state == "running":
                step, row = job.last_step(), job.last_metrics()
                if job.name not in bars:
                    bars[job.name] = Bar(observer, str(job.name), job.total or None, step)
                exact = row.get("rest/exact_match_calls", row.get("rest/exact_match"))
                is_evaluating = not row or step == job.total
                note = "evaluating" if is_evaluating else f"exact match {exact:.2f}" if is_number(exact) else ""
                bars[job.name].update(step, note)
            elif job.name in bars:
                bars.pop(job.name).stack.close()

    try:
        yield update
    finally:
        for bar in (*bars.values(), whole):
            bar.stack.close()

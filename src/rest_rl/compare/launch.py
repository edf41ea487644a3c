"""How the runs of a grid are started: how many at a time, by which command, and on which GPUs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rest_rl.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEFAULT_JOBS = 2

Gpus = int | Sequence[int | str]
"""A number of GPUs, or their indices or UUIDs as in CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class Launch:
    """A number of slots; each of them trains one run at a time, on its own GPUs if there are any."""

    slots: int = DEFAULT_JOBS
    command: tuple[str, ...] = (sys.executable,)
    """What comes before `-m rest_rl`."""
    gpus: tuple[str, ...] = ()
    """All GPUs, which the slots share evenly; if empty, the runs inherit CUDA_VISIBLE_DEVICES."""

    @property
    def has_launcher(self) -> bool:
        return self.command != (sys.executable,)

    @property
    def gpus_per_run(self) -> int:
        return len(self.gpus) // self.slots

    @property
    def processes(self) -> int:
        """The number of training processes of a run, if a launcher starts one per GPU."""
        return max(1, self.gpus_per_run) if self.has_launcher else 1

    def gpus_of(self, slot: int) -> str:
        """Return the value of CUDA_VISIBLE_DEVICES for runs in a slot, or an empty string."""
        size = self.gpus_per_run
        return ",".join(self.gpus[slot * size : (slot + 1) * size])

    def environment(self, slot: int) -> dict[str, str]:
        """Return the variables of a run in a slot: its GPUs, and its share of the CPU cores as OMP_NUM_THREADS."""
        # By default torch would use all cores for every run, and runs that share cores slow each other down far more
        # than fewer threads do.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = str(max(1, cores // (self.slots * self.processes)))
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or share}
        return threads | ({VISIBLE: self.gpus_of(slot)} if self.gpus else {})

    def find_slot(self, owner: str) -> int | None:
        """Return the slot whose GPUs the process `process PID on HOST` uses (see `find_lock_owner`), or None."""
        words = owner.split()
        if self.gpus and len(words) == 4 and words[1].isdecimal() and words[3] == socket.gethostname():
            with suppress(psutil.Error):
                used = psutil.Process(int(words[1])).environ().get(VISIBLE)
                return next((slot for slot in range(self.slots) if self.gpus_of(slot) == used), None)
        return None


def plan_launch(jobs: int | None = None, gpus: Gpus | None = None, launch: str = "") -> Launch:
    """Return how to start the runs of a grid.

    Args:
        jobs: The number of runs at a time; by default one per GPU, or 2 without `gpus`.
        gpus: The GPUs to divide among the runs, out of those that CUDA_VISIBLE_DEVICES allows.
        launch: A command such as `accelerate launch --num_processes 4`, which starts the runs instead of Python.

    Raises:
        UserError: There are fewer GPUs, or they cannot be divided evenly, or the command does not exist.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}", "1 or more", "pass a larger number")
    devices = () if gpus is None else choose_gpus(gpus)
    slots = jobs or len(devices) or DEFAULT_JOBS
    if len(devices) % slots:
        divisors = [str(number) for number in range(1, len(devices) + 1) if len(devices) % number == 0]
        raise UserError(
            f"{len(devices)} GPUs cannot be divided evenly among {slots} runs",
            f"--jobs {', '.join(divisors)}",
            "pass another --jobs or --gpus",
        )
    return Launch(slots, find_command(launch) if launch.strip() else (sys.executable,), devices)


def choose_gpus(gpus: Gpus) -> tuple[str, ...]:
    """Return the GPUs by name: the first `gpus` visible ones, or the named ones, which must be visible."""
    visible = list_visible_gpus()
    told = f"{len(visible)} visible GPUs" + (f" ({', '.join(visible)})" if visible else "")
    if isinstance(gpus, int):
        if not 1 <= gpus <= len(visible):
            raise UserError(f"--gpus is {gpus}", f"1 to {len(visible)}, as there are {told}", "pass another number")
        return tuple(visible[:gpus])
    names = [str(gpu).strip() for gpu in gpus]
    if unknown := [name for name in names if name not in visible]:
        raise UserError(f"--gpus names the GPU {unknown[0]!r}", f"some of {told}", f"correct it, or change {VISIBLE}")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--gpus is {','.join(names)!r}", "one or more GPUs, each once")
    return tuple(names)


def list_visible_gpus() -> list[str]:
    # Like CUDA, ignores everything after an index of -1.
    given = os.environ.get(VISIBLE)
    if given is None:
        import torch  # slow

        return [str(index) for index in range(torch.cuda.device_count())]
    names = [name.strip() for name in given.split(",") if name.strip()]
    return names[: names.index("-1")] if "-1" in names else names


def find_command(launch: str) -> tuple[str, ...]:
    """Return the words of a command; the programs of this Python environment come before those on the path."""
    try:
        program, *words = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"--launch is {launch!r} ({error})", "a command", "close the quotation") from error
    own = str(Path(sys.executable).parent)
    if (found := shutil.which(program, path=os.pathsep.join([own, os.environ.get("PATH", "")]))) is None:
        raise UserError(f"--launch starts {program!r}, which does not exist", remedy="install it, or pass its path")
    return (found, *words)


def stop_run(pid: int, *, at_once: bool) -> None:
    """Make a run stop after its step, or kill the process and its descendants."""
    # SIGINT goes to the training processes themselves: a launcher would not pass it on, or kill them before they have
    # saved a checkpoint.
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for target in [process, *process.children(recursive=True)] if at_once else find_trainers(process):
            with suppress(psutil.Error):
                target.send_signal(signal.SIGKILL if at_once else signal.SIGINT)


def find_trainers(process: psutil.Process) -> list[psutil.Process]:
    """Return the processes `python ... -m rest_rl` among a process and its descendants, but not their own children.

    Without any, return the process itself: a launcher that has not started them yet.
    """
    found, below = list[psutil.Process](), [process]
    while below:
        candidate = below.pop()
        with suppress(psutil.Error):
            if is_trainer(candidate.cmdline()):
                found.append(candidate)
            else:
                below += candidate.children()
    return found or [process]


def is_trainer(words: Sequence[str]) -> bool:
    # A launcher has `-m rest_rl` among its arguments too, but after a script or a module of its own.
    if "-m" not in words[1:]:
        return False
    at = words.index("-m", 1)
    return all(word.startswith("-") for word in words[1:at]) and words[at + 1 : at + 2] == ["rest_rl"]

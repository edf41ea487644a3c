"""Which checkpoint of a run folder is whole, so that a run can go on from it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rest_rl.errors import UserError
from rest_rl.runlog import METRICS, RESPONSES, TIMING, RunLog, read_rows


class Checkpoint(NamedTuple):
    """Where a run can go on from; without a folder it is the beginning."""

    step: int
    folder: Path | None = None
    is_last: bool = False
    """The run has finished its steps; the trainer would do one more if it was asked to go on from here."""


def find_checkpoint(log: RunLog, save_steps: float) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint of a run folder and the names of newer broken ones.

    A run killed before its first checkpoint goes on from the beginning. UserError if there should be one by now.
    """
    broken: list[str] = []
    for folder in sorted(log.checkpoints.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        if state := read_complete_state(folder):
            return Checkpoint(state["global_step"], folder, state["global_step"] >= state["max_steps"]), broken
        broken.append(folder.name)
    finished = count_finished_steps(log)
    if finished > save_steps:
        found = f"broken: {', '.join(broken)}" if broken else "none there"
        raise UserError(
            f"{log.checkpoints} without a whole checkpoint ({found}) after {finished} steps",
            "one to go on from",
            "restore it from a copy or start anew with another --out",
        )
    return Checkpoint(0), broken


def count_finished_steps(log: RunLog) -> int:
    """The steps that a run has certainly finished; the metrics alone may lag by `logging_steps`."""
    logged = [row.get("step", 0) for name in (METRICS, TIMING) for row in read_rows(log.folder / name)]
    begun = [row.get("step", 1) - 1 for row in read_rows(log.folder / RESPONSES)]
    return max([*logged, *begun], default=0)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name, -1 if there is none."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def read_complete_state(folder: Path) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint.

    None unless every part is there, every file can be opened and the state belongs to its step.
    """
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        for weights in folder.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
        tensors = [*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]
        whole = has_all_parts(folder) and all(zipfile.is_zipfile(path) for path in tensors)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return None
    if not whole or not isinstance(state, dict) or not isinstance(state.get("max_steps"), int):
        return None
    return state if state.get("global_step") == checkpoint_step(folder) else None


def has_all_parts(folder: Path) -> bool:
    """Whether a checkpoint holds weights, optimizer, schedule and random state, in whole or in shards.

    The trainer loads what it finds: without its file an optimizer would silently start anew.
    """
    is_deepspeed = any(folder.glob("global_step*/*"))  # holds weights, optimizer and schedule; not looked into
    indices = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.safetensors.index.json")]
    shards = {shard for index in indices for shard in index["weight_map"].values()} if indices else set()
    if not all((folder / shard).is_file() for shard in shards):
        return False
    parts = {
        "weights": ("*.safetensors", "pytorch_model_fsdp*"),
        "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*/*"),
        "schedule": ("scheduler.pt",),
    }
    found = {part: any(any(folder.glob(pattern)) for pattern in patterns) for part, patterns in parts.items()}
    return any(folder.glob("rng_state*.pth")) and (is_deepspeed or all(found.values()))

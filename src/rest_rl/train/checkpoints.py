"""Find the newest complete checkpoint of a run folder, from which a run can resume."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rest_rl.errors import UserError
from rest_rl.runlog import METRICS, RESPONSES, TIMING, RunLog, read_rows


class Checkpoint(NamedTuple):
    """A step from which a run can resume; without a `folder`, the run starts from the beginning."""

    step: int
    folder: Path | None = None
    # The run has finished. TRL would train one step too many if it resumed from here.
    is_last: bool = False


def find_checkpoint(log: RunLog, save_steps: float) -> tuple[Checkpoint, list[str]]:
    """Return the newest complete checkpoint of a run folder and the names of newer incomplete ones.

    Without a complete checkpoint, return step 0 if at most `save_steps` steps are finished, else raise UserError.
    """
    broken: list[str] = []
    for folder in sorted(log.checkpoints.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        if state := read_complete_state(folder):
            return Checkpoint(state["global_step"], folder, state["global_step"] >= state["max_steps"]), broken
        broken.append(folder.name)
    finished = count_finished_steps(log)
    if finished > save_steps:
        found = f"incomplete: {', '.join(broken)}" if broken else "the folder has none"
        raise UserError(
            f"{log.checkpoints} has no complete checkpoint after {finished} steps ({found})",
            remedy="restore one from a copy, or start a new run with another --out",
        )
    return Checkpoint(0), broken


# The metrics can lag by `logging_steps`. A recorded response of step k proves that k - 1 steps are finished.
def count_finished_steps(log: RunLog) -> int:
    logged = [row.get("step", 0) for name in (METRICS, TIMING) for row in read_rows(log.folder / name)]
    begun = [row.get("step", 1) - 1 for row in read_rows(log.folder / RESPONSES)]
    return max([*logged, *begun], default=0)


def checkpoint_step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


# A killed process leaves a torn checkpoint: a file is missing or cut short. Every file is therefore opened:
# safetensors compares its header with the file's length, and a zip archive (torch.save) has its directory at the end.
# Returns None unless all parts are there and the trainer's state belongs to the step in the folder's name.
def read_complete_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        for weights in folder.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
        tensors = [*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]
        is_complete = has_all_parts(folder) and all(zipfile.is_zipfile(path) for path in tensors)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return None
    if not is_complete or not isinstance(state, dict) or not isinstance(state.get("max_steps"), int):
        return None
    return state if state.get("global_step") == checkpoint_step(folder) else None


# transformers loads only the files that it finds: without its file, the optimizer would silently start from zero.
# Weights, optimizer, learning rate schedule and random state are therefore all required, whole or sharded.
def has_all_parts(folder: Path) -> bool:
    is_deepspeed = any(folder.glob("global_step*/*"))  # weights, optimizer and schedule; not opened
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

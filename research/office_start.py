"""The adapter with which SmolLM2 starts in the office: correct demonstrations, careless ones, and a foreign format.

    OMP_NUM_THREADS=1 python -m research.office_start --out runs/office-start     about two hours on one core

A careless demonstration makes only the first of several calls and leaves out all optional arguments, even those that
the request states. A fenced one is careless, too, and writes its call as JSON in a code fence, as many models do, which
the format `hermes` reads as an answer. The model can do better, because it saw correct demonstrations first, but now
prefers not to; reinforcement learning has to find that out. The adapter is in the folder `model` of the third run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import rest_rl
from research.command import run_command
from rest_rl.cli.terminal import Screen
from rest_rl.data.office import dialogues
from rest_rl.data.samples import Gold, ToolSample, iterate_samples
from rest_rl.data.write import sample_writer
from rest_rl.response import ToolCall

CARELESS_SHARE, FENCED_SHARE = 0.7, 0.6
SAMPLES, CARELESS_SEED, FENCED_SEED = 400, 77, 78
"""Samples from which the careless and the fenced demonstrations are drawn, and the seeds of their dialogues."""
COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
}
CORRECT = {**COMMON, "max_steps": 320, "learning_rate": 1e-3, "warmup_steps": 10, "save_steps": 40}
CARELESS = {**COMMON, "max_steps": 30, "learning_rate": 5e-4, "warmup_steps": 2, "save_steps": 10}
FENCED = {**CARELESS, "max_steps": 32}


def make_careless(sample: ToolSample) -> ToolSample:
    """Return the sample with only the first call as gold, and with its required arguments only."""
    required = {tool["function"]["name"]: tool["function"]["parameters"].get("required", ()) for tool in sample.tools}
    calls = tuple(
        ToolCall(call.name, {key: value for key, value in call.arguments.items() if key in required[call.name]})
        for call in sample.gold.calls[:1]
    )
    return replace(sample, gold=replace(sample.gold, calls=calls))


def make_fenced(sample: ToolSample) -> ToolSample:
    """Return the sample with its first call as the gold answer: JSON in a code fence, required arguments only."""
    careless = make_careless(sample)
    if not careless.gold.calls:
        return careless
    (call,) = careless.gold.calls
    text = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
    return replace(careless, gold=Gold((), f"```json\n{text}\n```"))


def write_demonstrations(
    path: Path, change: Callable[[ToolSample], ToolSample], share: float, seed: int, draw: int
) -> None:
    """Write demonstrations, of which `change` changes a `share`, drawn with the seed `draw`."""
    rng = random.Random(draw)
    with sample_writer(path) as write:
        for sample in islice(iterate_samples(dialogues(seed)), SAMPLES):
            write(change(sample) if rng.random() < share else sample)


def write_careless(path: Path) -> None:
    write_demonstrations(path, make_careless, CARELESS_SHARE, CARELESS_SEED, 0)


def write_fenced(path: Path) -> None:
    write_demonstrations(path, make_fenced, FENCED_SHARE, FENCED_SEED, 1)


def train_start(out: Path) -> Path:
    """Train the adapter in three runs in the folder `out`; return the folder of the adapter."""
    model = run_sft(out / "correct", {"data.path": "office", "data.num_samples": 1280}, CORRECT)
    for name, write, settings in (("careless", write_careless, CARELESS), ("fenced", write_fenced, FENCED)):
        write(data := out / f"{name}.jsonl")
        model = run_sft(out / name, {"data.path": str(data), "model.adapter": str(model)}, settings)
    return model


def run_sft(out: Path, changes: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    base = {"rest.preset": "sft", "rest.format": "hermes", "model.path": "smollm2", "peft.r": 8, "eval.prompts": 0}
    values = {**base, **changes, **{f"trl.{key}": value for key, value in settings.items()}}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    model = rest_rl.train(out=out, overrides=overrides, observer=Screen()).model
    assert model is not None
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m research.office_start", description="Train the adapter with which SmolLM2 starts in the office."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/office-start"), metavar="DIR", help="folder (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: print(f"the adapter is in {train_start(arguments.out)}"))


if __name__ == "__main__":
    sys.exit(main())

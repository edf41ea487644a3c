"""The adapter with which SmolLM2 starts in the office: correct demonstrations at first, then careless ones.

    OMP_NUM_THREADS=1 python -m research.office_start --out runs/office-start     about 100 minutes on one core

A careless demonstration makes only the first of several calls and leaves out all optional arguments, even those that
the request states. The model can do better, because it saw correct demonstrations before, but now prefers not to;
reinforcement learning has to find that out. The adapter is in the folder `model` of the second run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import rest_rl
from research.command import run_command
from rest_rl.cli.terminal import Screen
from rest_rl.data.office import dialogues
from rest_rl.data.samples import ToolSample, iterate_samples
from rest_rl.data.write import sample_writer
from rest_rl.response import ToolCall

CARELESS_SHARE = 0.7
SAMPLES, SEED = 400, 77
"""Samples from which the careless demonstrations are drawn, and the seed of their dialogues."""
COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
}
CORRECT = {**COMMON, "max_steps": 320, "learning_rate": 1e-3, "warmup_steps": 10, "save_steps": 40}
CARELESS = {**COMMON, "max_steps": 30, "learning_rate": 5e-4, "warmup_steps": 2, "save_steps": 10}


def make_careless(sample: ToolSample) -> ToolSample:
    """Return the sample with only the first call as gold, and with its required arguments only."""
    required = {tool["function"]["name"]: tool["function"]["parameters"].get("required", ()) for tool in sample.tools}
    calls = tuple(
        ToolCall(call.name, {key: value for key, value in call.arguments.items() if key in required[call.name]})
        for call in sample.gold.calls[:1]
    )
    return replace(sample, gold=replace(sample.gold, calls=calls))


def write_careless(path: Path) -> None:
    """Write demonstrations of which `CARELESS_SHARE` are careless, at random."""
    rng = random.Random(0)
    with sample_writer(path) as write:
        for sample in islice(iterate_samples(dialogues(SEED)), SAMPLES):
            write(make_careless(sample) if rng.random() < CARELESS_SHARE else sample)


def train_start(out: Path) -> Path:
    """Train the adapter in two runs in the folder `out`; return the folder of the adapter."""
    correct = run_sft(out / "correct", {"data.path": "office", "data.num_samples": 1280}, CORRECT)
    write_careless(out / "careless.jsonl")
    data = {"data.path": str(out / "careless.jsonl"), "model.adapter": str(correct)}
    return run_sft(out / "careless", data, CARELESS)


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

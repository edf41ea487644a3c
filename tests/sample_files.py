"""Write and read files of samples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample, from_json, to_json
from rest_rl.train.prompts import build_dataset, prepare_or_raise
from rest_rl.train.sft import build_demonstrations


def save_samples(samples: Iterable[ToolSample], path: Path) -> Path:
    """Write one JSON object per line and return the path."""
    path.write_text("".join(json.dumps(to_json(sample)) + "\n" for sample in samples), encoding="utf-8")
    return path


def load_samples(path: Path) -> list[ToolSample]:
    return [from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def labelled_dataset(samples: Iterable[ToolSample], layout: PromptLayout) -> Any:
    """Return the dataset that supervised training builds from samples that it can train on."""
    rows, rejected = build_demonstrations([prepare_or_raise(sample, layout) for sample in samples], layout)
    assert not rejected
    return build_dataset(rows)

"""Files of samples, for tests that write and read them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rest_rl.data.samples import ToolSample, from_json, to_json


def save_samples(samples: Iterable[ToolSample], path: Path) -> Path:
    """Write one JSON object per line; returns the path."""
    path.write_text("".join(json.dumps(to_json(sample)) + "\n" for sample in samples), encoding="utf-8")
    return path


def load_samples(path: Path) -> list[ToolSample]:
    """Read such a file."""
    return [from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]

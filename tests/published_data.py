"""Locate published data that the project does not ship: in $REST_RL_DATA, or in shared/data next to the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def published_file(name: str) -> Path:
    """Return the path of the file; skip the test if it does not exist."""
    folders = [Path(folder) for folder in [os.environ.get("REST_RL_DATA", "")] if folder]
    folders.append(Path(__file__).parents[2] / "shared" / "data")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not in {' or '.join(map(str, folders))}; set REST_RL_DATA to the folder that has it")

"""Find the installed bfcl-eval release of a BFCL version, without importing it into this process."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from rest_rl.errors import UserError

Version = Literal["v3", "v4"]
PINS: dict[Version, str] = {"v3": "2025.6.14", "v4": "2026.3.23"}
"""The bfcl-eval release of each version; scores of different releases are not comparable."""


class BfclPackage(NamedTuple):
    """An installed release of bfcl-eval."""

    version: Version
    folder: Path
    """The `sys.path` entry for importing `bfcl_eval`."""

    @property
    def pin(self) -> str:
        """The release as printed on every table, such as `bfcl-eval 2025.6.14 (BFCL v3)`."""
        return f"bfcl-eval {PINS[self.version]} (BFCL {self.version})"


def find_package(version: Version) -> BfclPackage:
    """Find bfcl-eval in $REST_RL_BFCL_V3 (or _V4), in the Python environment's share folder, or among its packages."""
    variable, share = f"REST_RL_BFCL_{version.upper()}", share_folder(version)
    if given := os.environ.get(variable):
        if (found := find_release(Path(given))) != PINS[version]:
            expected = f"the folder with bfcl-eval {PINS[version]}"
            remedy = f"install it with: {install_command(version, Path(given))}"
            raise UserError(f"{variable}={given} contains {found or 'no bfcl-eval'}", expected, remedy)
        return BfclPackage(version, Path(given).resolve())
    if find_release(share) == PINS[version]:
        return BfclPackage(version, share)
    installed = next(iter(importlib.metadata.distributions(name="bfcl-eval")), None)
    if installed is not None and installed.version == PINS[version]:
        return BfclPackage(version, Path(str(installed.locate_file(""))).resolve())
    raise UserError(
        f"BFCL {version} needs bfcl-eval {PINS[version]}, which is not installed",
        remedy=f"install it with: {install_command(version, share)} (--no-deps keeps your other packages unchanged; "
        f"${variable} may name another folder)",
    )


def share_folder(version: Version) -> Path:
    return Path(sys.prefix) / "share" / "rest-rl" / f"bfcl-eval-{PINS[version]}"


def install_command(version: Version, folder: Path) -> str:
    return f"pip install --no-deps --target {folder} bfcl-eval=={PINS[version]}"


def find_release(folder: Path) -> str | None:
    if not (folder / "bfcl_eval").is_dir():
        return None
    return next((each.version for each in importlib.metadata.distributions(name="bfcl-eval", path=[str(folder)])), None)

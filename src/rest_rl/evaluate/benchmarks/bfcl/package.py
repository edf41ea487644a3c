"""Where the two supported releases of bfcl-eval are found; nothing of them is imported into this process."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rest_rl.errors import UserError

Version = Literal["v3", "v4"]
PINS: dict[Version, str] = {"v3": "2025.6.14", "v4": "2026.3.23"}
"""The release that holds each edition of the data; numbers of different releases cannot be compared."""


@dataclass(frozen=True)
class BfclPackage:
    """One release on this machine."""

    version: Version
    folder: Path
    """What has to stand on `sys.path` to import `bfcl_eval`."""

    @property
    def release(self) -> str:
        """Such as `2025.6.14`."""
        return PINS[self.version]

    @property
    def pin(self) -> str:
        """Such as `bfcl-eval 2025.6.14 (BFCL v3)`, printed on every table."""
        return f"bfcl-eval {self.release} (BFCL {self.version})"

    @property
    def command(self) -> str:
        """What installs it where it is looked for."""
        return _command(self.version, _share(self.version))


def find_package(version: Version) -> BfclPackage:
    """The release of an edition: in $REST_RL_BFCL_V3 (or _V4), in the environment's share folder, or installed.

    ValueError, with the command that installs it, where there is none.
    """
    variable = f"REST_RL_BFCL_{version.upper()}"
    if given := os.environ.get(variable):
        if _release_in(Path(given)) != PINS[version]:
            found = _release_in(Path(given)) or "no bfcl-eval"
            raise UserError(
                f"{variable}={given}, which holds {found}",
                f"the folder with bfcl-eval {PINS[version]}",
                f"install it with: {_command(version, Path(given))}",
            )
        return BfclPackage(version, Path(given).resolve())
    if _release_in(share := _share(version)) == PINS[version]:
        return BfclPackage(version, share)
    try:
        installed = importlib.metadata.distribution("bfcl-eval")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == PINS[version]:
        return BfclPackage(version, Path(str(installed.locate_file(""))).resolve())
    raise ValueError(
        f"got no bfcl-eval {PINS[version]} for BFCL {version}; install it with: {_command(version, share)} "
        f"(--no-deps leaves your other packages as they are; ${variable} may name another folder)"
    )


def _share(version: Version) -> Path:
    return Path(sys.prefix) / "share" / "rest-rl" / f"bfcl-eval-{PINS[version]}"


def _command(version: Version, folder: Path) -> str:
    return f"pip install --no-deps --target {folder} bfcl-eval=={PINS[version]}"


def _release_in(folder: Path) -> str | None:
    """The version of bfcl-eval that lies in a folder."""
    if not (folder / "bfcl_eval").is_dir():
        return None
    found = importlib.metadata.distributions(name="bfcl-eval", path=[str(folder)])
    return next((each.version for each in found), None)

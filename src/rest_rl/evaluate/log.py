"""An evaluation folder: how it was asked, one line per sample as it finishes, the summary.

    settings.json   what was asked of whom, and how      summary.json    scores by group, with 95 % Wilson intervals
    samples.jsonl   one object per sample                environment.json  versions, platform, command

Lines are written whole: a killed evaluation loses what was in flight, and `--resume` asks for that and for what failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rest_rl.errors import UserError
from rest_rl.jsonl import as_json, describe_os_error
from rest_rl.runlog import describe_environment, read_json_object, replace_file, truncate_file

SETTINGS, SAMPLES, SUMMARY, ENVIRONMENT = "settings.json", "samples.jsonl", "summary.json", "environment.json"

Row = dict[str, Any]


class EvalLog:
    """The writing side of an evaluation folder."""

    def __init__(self, folder: str | Path) -> None:
        """Use `unused` or `resume`; this only binds the folder."""
        self.folder = Path(folder)

    @classmethod
    def new(cls, folder: str | Path) -> EvalLog:
        """A folder to begin in; UserError if it holds an evaluation already. Nothing is written yet."""
        if any((Path(folder) / name).exists() for name in (SETTINGS, SAMPLES)):
            got, remedy = (
                f"{folder}, which holds an evaluation already",
                "add --resume to go on with it, or pass another --out",
            )
            raise UserError(got, "a new folder", remedy)
        return cls(folder)

    def begin(self, settings: Mapping[str, Any], command: Iterable[str]) -> None:
        """Make the folder and record what is asked."""
        with self._convert_os_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.write(ENVIRONMENT, as_json(describe_environment(command), indent=2) + "\n")
        self.write(SETTINGS, as_json(settings, indent=2) + "\n")

    @classmethod
    def resume(cls, folder: str | Path, settings: Mapping[str, Any]) -> EvalLog:
        """Go on in a folder: failed samples and a torn last line are removed. UserError for other settings."""
        log = cls(folder)
        recorded = read_json_object(log.folder / SETTINGS)
        if not recorded:
            raise UserError(f"--resume and {folder}, which holds no evaluation", "one", "leave --resume out")
        asked = json.loads(as_json(settings))
        if changed := sorted(key for key in {*asked, *recorded} if asked.get(key) != recorded.get(key)):
            old = ", ".join(f"{key} = {recorded.get(key)!r:.80}" for key in changed)
            got = f"--resume with another {', '.join(changed)} than the evaluation in {folder} ({old})"
            raise UserError(got, "the same", "ask for the same, or pass another --out")
        log.write_rows(row for row in log.read_rows() if "error" not in row)
        return log

    def read_rows(self) -> list[Row]:
        """The samples so far; a line that is torn or damaged is passed over, and its sample asked for again."""
        path, rows = self.folder / SAMPLES, []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
            with suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a sample, flushed; a folder that is full is left as it was."""
        path = self.folder / SAMPLES
        size = path.stat().st_size if path.exists() else 0
        with self._convert_os_errors():
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(as_json(row) + "\n")
            except OSError:
                truncate_file(path, size)
                raise

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.write(SAMPLES, "".join(as_json(row) + "\n" for row in rows))

    def write(self, name: str, text: str) -> None:
        """Replace a file of the folder, atomically."""
        with self._convert_os_errors():
            replace_file(self.folder / name, text)

    @contextmanager
    def _convert_os_errors(self) -> Iterator[None]:
        """UserError for a folder that is full, read-only or no folder."""
        try:
            yield
        except OSError as error:
            got, expected = (
                f"evaluation folder {self.folder} ({describe_os_error(error)})",
                "a writable folder with free space",
            )
            remedy = "make room and go on with --resume (what was written is whole), or pass another --out"
            raise UserError(got, expected, remedy) from error

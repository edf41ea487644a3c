"""Read and write the evaluation folder, which contains these files:

    settings.json   model, prompt and selected samples   summary.json    scores by group, with 95 % Wilson intervals
    samples.jsonl   one row per sample                   environment.json  versions, platform, command

Each line of samples.jsonl is written as a whole when its sample finishes. A killed evaluation loses only unfinished
samples; `--resume` evaluates these and the failed samples again.
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
    """Reads and writes an evaluation folder. Create instances with `EvalLog.new` or `EvalLog.resume`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def new(cls, folder: str | Path) -> EvalLog:
        """Return the log of a new evaluation, writing nothing. Raises UserError if the folder already contains one."""
        if any((Path(folder) / name).exists() for name in (SETTINGS, SAMPLES)):
            raise UserError(
                f"{folder} already contains an evaluation",
                remedy="pass --resume to continue it, or another --out",
            )
        return cls(folder)

    def begin(self, settings: Mapping[str, Any], command: Iterable[str]) -> None:
        """Create the folder and write settings.json and environment.json, which also contains `command`."""
        with self._convert_os_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.write(ENVIRONMENT, as_json(describe_environment(command), indent=2) + "\n")
        self.write(SETTINGS, as_json(settings, indent=2) + "\n")

    @classmethod
    def resume(cls, folder: str | Path, settings: Mapping[str, Any]) -> EvalLog:
        """Return the log of an evaluation with the same settings, after removing failed samples and damaged lines."""
        log = cls(folder)
        recorded = read_json_object(log.folder / SETTINGS)
        if not recorded:
            remedy = "check --out, or remove --resume to start a new evaluation"
            raise UserError(f"{folder} contains no evaluation to resume", remedy=remedy)
        asked = json.loads(as_json(settings))
        if changed := sorted(key for key in {*asked, *recorded} if asked.get(key) != recorded.get(key)):
            old = ", ".join(f"{key} = {recorded.get(key)!r:.80}" for key in changed)
            problem = f"--resume with a different {', '.join(changed)} than the evaluation in {folder}"
            raise UserError(problem, f"the recorded values ({old})", "use the same options, or pass another --out")
        log.write_rows(row for row in log.read_rows() if "error" not in row)
        return log

    def read_rows(self) -> list[Row]:
        """Return the rows written so far, except damaged lines; resuming evaluates their samples again."""
        path, rows = self.folder / SAMPLES, []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
            with suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row to samples.jsonl. If the disk is full, the file keeps its previous content."""
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
        """Write a file in the folder atomically, replacing an existing one of that name."""
        with self._convert_os_errors():
            replace_file(self.folder / name, text)

    @contextmanager
    def _convert_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to the evaluation folder {self.folder} ({describe_os_error(error)})",
                remedy="free space and continue with --resume (finished samples are intact), or pass another --out",
            ) from error

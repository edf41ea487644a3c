"""Shows a run on verl while another process, perhaps on another machine, writes its folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rest_rl.report.diagnosis import Diagnosis
from rest_rl.runlog import EVALUATIONS, METRICS, RESPONSES, Observer, Row, RunLog

FAILED = "completions/failed"
"""The figure that says how many responses of a step verl could not make or score."""
EVERY = 0.5
"""Seconds between two looks."""


class Tail:
    """The rows that are appended to a JSONL file, in turn; a line without its end is waited for."""

    def __init__(self, path: Path) -> None:
        """Begin behind what the file holds now."""
        self.path = path
        self._at = path.stat().st_size if path.exists() else 0

    def rows(self) -> list[Row]:
        """What was appended since the last time."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._at)
            whole, end, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(end)
        return [json.loads(line) for line in whole.split(b"\n") if line]


class Follower:
    """Tells an observer of the steps of a run as they appear in its folder."""

    def __init__(self, log: RunLog, observer: Observer, table: Mapping[str, Any], total: int) -> None:
        """`table` is the run's configuration, for its diagnosis; `total` are its steps."""
        self._observer, self._total, self._diagnosis = observer, total, Diagnosis(table)
        self._metrics, self._responses, self._evaluations = (
            Tail(log.folder / name) for name in (METRICS, RESPONSES, EVALUATIONS)
        )

    def look(self) -> None:
        """Tell of what is new."""
        for row in self._evaluations.rows():
            self._diagnosis.add_evaluation(row)
        responses = self._responses.rows()
        for row in self._metrics.rows():
            self._observer.on_step(row["step"], self._total, row)
            if failed := row.get(FAILED):
                self._observer.say(f"step {row['step']}: {failed:.0f} responses failed and are left out")
            for finding in self._diagnosis.add(row, self._total):
                self._observer.on_finding(finding)
        for step in dict.fromkeys(row["step"] for row in responses):
            self._observer.on_responses(step, [row for row in responses if row["step"] == step])


@contextmanager
def following(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every now and then while the block runs, and once more after it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()

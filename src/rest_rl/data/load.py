"""Data files from Python: `check_data` and `load_dataset`, which `rest-rl data check` and training call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rest_rl.data.check import CheckConfig, CheckedRow, DataReport, check_rows
from rest_rl.data.samples import ToolSample
from rest_rl.errors import RenamedWarning, UserError
from rest_rl.runlog import SILENT, Observer

if TYPE_CHECKING:
    from rest_rl.data.layout import PromptLayout


class LoadedData(NamedTuple):
    """The samples of data files, and what became of their rows."""

    samples: list[ToolSample]
    report: DataReport


def check_data(*paths: str, **settings: Any) -> DataReport:
    """What training would make of every row of files, folders or hub names; the settings are those of `read_rows`.

    Example: `check_data("dialogues.jsonl", source="messages", allow=["duplicate"]).rejected`.

    Raises:
        UserError: there is no such input, or a setting that no run can use. A row that cannot be read is a finding.
    """
    report = DataReport()
    for row in read_rows(paths, **settings):
        report.add(row)
    return report


def load_dataset(*paths: str, **settings: Any) -> LoadedData:
    """All samples of files, folders or hub names, and the report; settings and errors as of `check_data`."""
    loaded = LoadedData([], DataReport())
    for row in read_rows(paths, **settings):
        loaded.report.add(row)
        loaded.samples.extend(row.samples)
    return loaded


def read_rows(
    paths: str | Sequence[str],
    *,
    layout: PromptLayout | None = None,
    test: str | None = None,
    limit: int = 0,
    observer: Observer = SILENT,
    **settings: Any,
) -> Iterator[CheckedRow]:
    """Each row of data files with its samples and findings, in order.

    With the `layout` of a model, samples that it cannot hold are rejected. Prompts that the file `test` has as well
    are rejected. `limit` is the number of rows to read, 0 for all. The other settings are those of `CheckConfig`.
    """
    if "keep" in settings:
        warnings.warn("keep is now allow", RenamedWarning, stacklevel=3)
        settings["allow"] = settings.pop("keep")
    config = CheckConfig(**settings)
    if config.max_prompt_tokens and layout is None:
        raise UserError("max_prompt_tokens without a model", "both", "name the model that counts")
    if limit < 0:
        raise UserError(f"limit {limit}", "a number of rows >= 0", "0 reads all")
    rows = check_rows(paths, config, test=test, limit=limit, observer=observer)
    if layout is None:
        return rows
    from rest_rl.data.prepare import prepare_row  # which takes a while to import

    return (prepare_row(row, layout, config)[0] for row in rows)

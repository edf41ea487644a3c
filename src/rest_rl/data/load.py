"""Read data files from Python: `check_data` and `load_dataset`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rest_rl.data.check import CheckConfig, CheckedRow, DataReport, check_rows
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError, warn_renamed
from rest_rl.runlog import SILENT, Observer

if TYPE_CHECKING:
    from rest_rl.data.layout import PromptLayout


class LoadedData(NamedTuple):
    """The samples of data files, and the report on their rows."""

    samples: list[ToolSample]
    report: DataReport


def check_data(*paths: str, **settings: Any) -> DataReport:
    """Check every row of files, folders or hub datasets as training would; `settings` are arguments of `read_rows`.

    Example: `check_data("dialogues.jsonl", source="messages", allow=["duplicate"]).rejected`.

    Raises:
        UserError: An input does not exist, or a setting is invalid. An unreadable row is a finding, not an error.
    """
    report = DataReport()
    for row in read_rows(paths, **settings):
        report.add(row)
    return report


def load_dataset(*paths: str, **settings: Any) -> LoadedData:
    """Return all samples and the report; takes the same arguments and raises the same errors as `check_data`."""
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
    """Yield each row of data files with its samples and findings, in order.

    With the `layout` of a model, samples that its format or chat template cannot represent are rejected. Samples whose
    prompt is also in the file `test` are rejected. `limit` is the number of rows to read, 0 for all. The other settings
    are the fields of `CheckConfig`.
    """
    if "keep" in settings:
        warn_renamed("keep", "allow", stacklevel=3)
        settings["allow"] = settings.pop("keep")
    config = CheckConfig(**settings)
    if config.max_prompt_tokens and layout is None:
        raise UserError(
            "max_prompt_tokens needs a tokenizer to count with", remedy="pass layout, or --model on the command line"
        )
    if limit < 0:
        raise UserError(f"the limit of rows is {limit}", "at least 0", "use 0 to read all rows")
    rows = check_rows(paths, config, test=test, limit=limit, observer=observer)
    if layout is None:
        return rows
    from rest_rl.data.prepare import prepare_row  # imports transformers

    return (prepare_row(row, layout, config)[0] for row in rows)

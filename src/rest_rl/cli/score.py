"""The command `score`: compute the rewards of recorded responses, without importing torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from rest_rl.cli.options import AUTO, FormatName, PresetName, Progress, RowsFile


def score(
    file: RowsFile, tool_format: FormatName = AUTO, preset: PresetName = "rest", progress: Progress = 0.0
) -> None:
    """Score recorded responses against gold calls, and print one JSON object per row.

    A row is {"response": text, "gold": {"calls": [{"name", "arguments"}], "answer"}}; "step" and "truncated" are
    optional. A row that cannot be scored gives an object with its number and the error. stderr names the format in use.
    """
    from rest_rl.errors import UserError
    from rest_rl.jsonl import as_json, parse_row
    from rest_rl.presets import get_preset

    get_preset(preset)
    tool_format, rows = format_of_rows(tool_format, file)
    for number, line in rows:
        try:
            print(as_json(score_row(parse_row(line), tool_format, preset, progress)))
        except UserError as error:  # noqa: PERF203 - scoring costs more than any try
            print(as_json({"row": number, "error": str(error)}))


def format_of_rows(name: str, file: str) -> tuple[str, Iterator[tuple[int, bytes]]]:
    """Return the format name and all numbered rows of a file; `auto` detects the format from the first responses."""
    from rest_rl.formats import get_format
    from rest_rl.formats.detect import MAX_RESPONSES, choose_format
    from rest_rl.jsonl import read_lines, response_texts

    if name != AUTO:
        get_format(name)
    # The rows may come from a pipe, which cannot be read twice: those that decide the format are put back in front.
    rows = read_lines(file)
    first = list(islice(rows, MAX_RESPONSES))
    name, why = choose_format(name, response_texts(line for _, line in first))
    print(f"format {name}: {why}", file=sys.stderr)
    return name, chain(first, rows)


def score_row(row: Mapping[str, Any], tool_format: str, preset: str, progress: float) -> dict[str, Any]:
    # Returns the score of a row; its `step` overrides `progress` (step 150 of the paper's schedule is progress 1).
    from rest_rl.authors_code import SCHEDULE_STEPS
    from rest_rl.errors import UserError
    from rest_rl.jsonl import require_text
    from rest_rl.presets import score_response
    from rest_rl.response import gold_from_json

    step = row.get("step")
    if step is not None:
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < math.inf:
            raise UserError(f"step is {step!r}", "a number of at least 0", "fix or remove it")
        progress = min(1.0, step / SCHEDULE_STEPS)
    if not isinstance(is_cut := row.get("truncated", False), bool):
        raise UserError(f"truncated is {is_cut!r:.80}", "true or false", "fix or remove it")
    text, gold = require_text(row, "response"), gold_from_json(row.get("gold"))
    settings = {"preset": preset, "progress": progress, "step": step, "truncated": is_cut}
    reward = score_response(text, gold, format=tool_format, **settings)
    return {
        "reward": reward.total,
        "format": reward.format,
        "accuracy": reward.accuracy,
        "explanation": [finding._asdict() for finding in reward.explanation],
    }

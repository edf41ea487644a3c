"""The verb `score`: rewards of recorded responses; imports no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

from rest_rl.authors_code import SCHEDULE_STEPS
from rest_rl.errors import UserError
from rest_rl.formats import get_format
from rest_rl.jsonl import as_json, parse_row, read_lines, text_field
from rest_rl.response import Gold, gold_from_json
from rest_rl.scoring import PRESET_REWARDS, score_response


def score(arguments: argparse.Namespace) -> int:
    """Print one JSON line per row: reward, its parts and the explanation, or the row's number and an error."""
    get_format(arguments.format)
    check_progress(arguments.progress)
    if arguments.preset not in PRESET_REWARDS:
        raise UserError(f"preset {arguments.preset!r}", f"one of {', '.join(PRESET_REWARDS)}", "see presets")
    for number, line in read_lines(arguments.file):
        print(as_json(score_line(line, number, arguments)))
    return 0


def score_line(line: bytes, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The score of one row as a JSON object; whatever is wrong with the row is said in it.

    A row's `step` goes before `--progress`: step 150 of the paper's schedule, and all later ones, are progress 1.
    """
    try:
        response, gold, step = scored_row(parse_row(line))
        progress = (arguments.progress or 0.0) if step is None else min(1.0, step / SCHEDULE_STEPS)
        reward = score_response(
            response, gold, format=arguments.format, preset=arguments.preset, progress=progress, step=step
        )
    except ValueError as error:
        return {"row": number, "error": str(error)}
    return {
        "reward": reward.total,
        "format": reward.format,
        "accuracy": reward.accuracy,
        "explanation": [finding._asdict() for finding in reward.explanation],
    }


def scored_row(row: Mapping[str, Any]) -> tuple[str, Gold, float | None]:
    """(response, gold, step) of a row to score."""
    step = row.get("step")
    if step is not None and (isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < math.inf):
        raise UserError(f"step {step!r}", "a number >= 0", "mend or leave out the step")
    return text_field(row, "response"), gold_from_json(row.get("gold")), step


def check_progress(progress: float | None) -> None:
    """ValueError unless progress is unset or in [0, 1]."""
    if progress is not None and not 0 <= progress <= 1:
        raise UserError(f"--progress {progress}", "a number in [0, 1]", "divide the step by the total")

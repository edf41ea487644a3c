"""What the verb `eval` shows and writes of evaluations: tables, a radar figure, comparisons."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from rest_rl.cli.terminal import show_table
from rest_rl.evaluate.compare import FLIPS, read_evaluation
from rest_rl.evaluate.compare import compare as compare_folders
from rest_rl.evaluate.layout import editions
from rest_rl.evaluate.log import EvalLog
from rest_rl.evaluate.tables import (
    TerminalTable,
    comparison_markdown,
    comparison_tables,
    terminal_table,
    write_tables,
)
from rest_rl.jsonl import as_json

SHOWN_FLIPS = 10
TABLES = "tables"
RADAR = "radar.png"


def show_summary(summary: Mapping[str, Any], console: Console) -> None:
    """The groups of one evaluation, and what went wrong in them."""
    show(terminal_table(summary), console)


def show(table: TerminalTable, console: Console) -> None:
    """A table and its notes."""
    show_table(escape(table.title), table.header, table.rows, console)
    for note in table.notes:
        console.print(note, highlight=False, markup=False)


def table(arguments: argparse.Namespace) -> int:
    """Tables of several evaluations, side by side, and a radar figure for each benchmark."""
    summaries = [read_evaluation(folder).summary for folder in arguments.folders]
    out = Path(arguments.out or (arguments.folders[0] if len(summaries) == 1 else TABLES))
    console = Console()
    for summary in summaries:
        show_summary(summary, console)
    for path in write_tables(summaries, out):
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    kinds = [[summary for _, summary in models] for models in editions(summaries)]
    for same in kinds:
        pin = str(same[0].get("pin"))
        name = RADAR if len(kinds) == 1 else f"radar-{same[0]['benchmark']}-{slug(pin)}.png"
        console.print(radar(same, out / name), highlight=False, markup=False, soft_wrap=True)
    return 0


def radar(summaries: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Draw the figure of comparable evaluations; its path, or why there is none."""
    from rest_rl.evaluate.radar import draw_radar, shared_groups

    if shared_groups(summaries):
        return str(draw_radar(summaries, path))
    who = "the evaluations share no group with a scored sample" if len(summaries) > 1 else "no sample was scored"
    return f"no radar figure: {who} ({summaries[0].get('pin')})"


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:60]


def compare(arguments: argparse.Namespace) -> int:
    """Paired differences of two evaluations, and the samples that flipped."""
    found = compare_folders(arguments.base, arguments.tuned)
    content = found.to_json()
    if arguments.out:
        log = EvalLog(arguments.out)
        found.write_flips(log.folder / FLIPS)
        log.write("comparison.json", as_json(content, indent=2) + "\n")
        log.write("comparison.md", comparison_markdown(content))
    if arguments.json:
        print(as_json(content, indent=2))
        return 0
    console = Console()
    for one in comparison_tables(content):
        show(one, console)
    for flip in found.flips[:SHOWN_FLIPS]:
        console.print(
            f"{flip.direction} {flip.id}: {flip.base_reason or 'right'} → {flip.tuned_reason or 'right'}",
            highlight=False,
            markup=False,
        )
    if len(found.flips) > SHOWN_FLIPS:
        console.print(f"{len(found.flips)} samples flipped in all; --out DIR writes them to {FLIPS}", highlight=False)
    return 0

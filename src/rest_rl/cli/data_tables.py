"""What the verb `data` shows: the progress of reading, the table of reasons, one row as training sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from rest_rl.cli.terminal import coloured, legend, pieces, printable
from rest_rl.data.check import CheckedRow, Report, outcome
from rest_rl.data.reasons import REASONS
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.formats import ToolFormat, as_demonstrated, get_format

if TYPE_CHECKING:
    from rest_rl.data.layout import PromptLayout

STYLES = {"rejected": "red", "repaired": "yellow", "noted": "dim"}


@contextmanager
def reading_bar(total_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over the bytes of the input with rows and rows per second; call it with (rows, bytes)."""
    columns = (BarColumn(bar_width=16), TaskProgressColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total_bytes or None, note="")

        def advance(rows: int, read: int) -> None:
            seconds = progress.tasks[task].elapsed or 1e-9
            progress.update(task, completed=min(read, total_bytes), note=f"{rows} rows, {rows / seconds:.0f}/s")

        yield advance


def show_report(report: Report, per_reason: int, console: Console | None = None) -> None:
    """Counts, the table of reasons, and the first findings of each."""
    console = console or Console()
    shapes = ", ".join(f"{name} ({count} rows)" for name, count in report.sources.items()) or "unknown"
    console.print(f"shape: {shapes}", highlight=False)
    lost = f" ({report.lost_turns} of them lost turns)" if report.lost_turns else ""
    counts = f"{report.rows} rows: {report.kept} kept, {report.repaired} repaired{lost}, {report.rejected} rejected"
    console.print(f"{counts}; {report.samples} samples", highlight=False)
    if not report.reasons:
        return
    table = Table(
        "reason", "what happened", "rows", "first rows", "meaning", box=None, header_style="bold", padding=(0, 1, 0, 0)
    )
    known = [reason for reason in REASONS if reason in report.reasons]
    for reason in known:
        happened = ", ".join(sorted(report.outcomes[reason]))
        first = ", ".join(map(str, report.first_rows[reason]))
        style = STYLES.get(happened, "red")
        table.add_row(reason, happened, str(report.reasons[reason]), first, REASONS[reason].meaning, style=style)
    console.print(table)
    for reason in known if per_reason else ():
        console.print(f"\n{reason}: {REASONS[reason].remedy}", style="bold", highlight=False)
        shown = [located for located in report.findings if located.finding.reason == reason][:per_reason]
        for file, row, found in shown:
            name = f"{file}, row {row}" if len(report.files) > 1 else f"row {row}"
            console.print(f"  {name}: {escape(printable(found.detail))}", highlight=False, soft_wrap=True)
        if (left := report.occurrences[reason] - len(shown)) > 0:
            console.print(f"  and {left} more; --all or --json list them", highlight=False)


def show_row(row: CheckedRow, layout: PromptLayout | None, tool_format: str, console: Console | None = None) -> None:
    """A row: what was found, then for each sample its prompt and its demonstration in colours.

    Without a layout, which a model gives, tools and messages stand there as they are.
    """
    console = console or Console()
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    say(f"row {row.number} of {row.file}: {row.status}, shape {row.source or 'unknown'}")
    for found in row.findings:
        line = f"{outcome(row, found)}: {found.reason}: {found.detail}; {REASONS[found.reason].remedy}"
        say(line, style=STYLES[found.severity])
    if not row.samples:
        say(row.raw if isinstance(row.raw, str) else json.dumps(row.raw, ensure_ascii=False, indent=2, default=str))
        return
    chosen = layout.format if layout else get_format("hermes" if tool_format == "auto" else tool_format)
    how = "" if layout or tool_format != "auto" else " (no model named)"
    for sample in row.samples:
        console.rule(escape(f"{sample.id} ({sample.kind}): prompt"), align="left", style="dim")
        say(layout.render(sample) if layout else _plain_prompt(sample))
        console.rule(f"demonstration in format {chosen.name}{how}", align="left", style="dim")
        _show_demonstration(sample, layout, chosen, console)
    console.print(legend())


def _plain_prompt(sample: ToolSample) -> str:
    tools = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in sample.tools]
    lines = [] if sample.tools_in_prompt else [f"tool: {tool}" for tool in tools]
    return "\n".join([*lines, *map(_plain_message, sample.messages)])


def _plain_message(message: Mapping[str, Any]) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    head = f"{message['role']}: {message.get('content') or ''}".rstrip()
    return "\n".join([head, *(f"  calls {call}" for call in calls)])


def _show_demonstration(sample: ToolSample, layout: PromptLayout | None, chosen: ToolFormat, console: Console) -> None:
    """As supervised training writes it; where the format cannot, what the reward compares with."""
    from rest_rl.train.prompts import demonstration_text

    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    try:
        text = demonstration_text(sample, chosen, thinks=not (layout and layout.closes_think))
    except ValueError as error:
        say(f"not for supervised training, whose format cannot write it: {error}", style="dim")
        try:
            text = as_demonstrated(chosen).render(None, sample.gold.calls, sample.gold.answer)
        except ValueError:
            say(json.dumps(to_json(sample)["gold"], ensure_ascii=False))
            return
    if sample.preamble and sample.preamble not in text:
        say(f"left out, for the format has no room for it, is what it says before its calls: {sample.preamble}")
    console.print(coloured(pieces(text, chosen.parse(text).spans)), soft_wrap=True)

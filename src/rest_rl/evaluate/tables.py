"""Tables of evaluations as Markdown, CSV, LaTeX and for the terminal, and those of a comparison of two.

Everything is read from plain mappings: summaries of evaluations, and a comparison's `to_json()`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.errors import UserError
from rest_rl.evaluate.layout import (
    AVERAGES,
    OVERALL,
    TROUBLES,
    Cell,
    Column,
    Section,
    ceiling_notes,
    cell_of,
    count,
    editions,
    eval_tables,
    how_asked,
    interval_words,
    model_names,
    sections,
    trouble_text,
)
from rest_rl.jsonl import reason
from rest_rl.report.tables import is_number, markdown_table, percent
from rest_rl.runlog import replace_file

LINE_BREAK = r"\\"
MACRO = r"\providecommand{\withinterval}[2]{\begin{tabular}[t]{@{}c@{}}#1\\[-3pt]{\tiny #2}\end{tabular}}"
ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    # A row that starts with one of these would be read as an option of the line break before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "\n": " ",
    "\r": " ",
} | {character: "\\" + character for character in "&%$#_"}


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(ESCAPES.get(character, character) for character in text)


def with_interval(number: str, interval: str) -> str:
    """A cell of a number over its interval."""
    return rf"\withinterval{{{number}}}{{{interval}}}"


def latex_table(
    caption: str, span: str, header: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str]
) -> str:
    """A floating table; caption, span, header, first column and notes are plain text, other cells are LaTeX."""
    columns = len(header) - 1
    over = [rf"& \multicolumn{{{columns}}}{{c}}{{{escaped(span)}}} \\", rf"\cmidrule(l){{2-{columns + 1}}}"]
    lines = [
        MACRO,
        r"\begin{table}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{3.5pt}",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{@{{}}l{'c' * columns}@{{}}}}",
        r"\toprule",
        *(over if span else ()),
        " & ".join([escaped(header[0]), *(stacked(label) for label in header[1:])]) + r" \\",
        r"\midrule",
        *(" & ".join([escaped(row[0]), *row[1:]]) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        *([rf"\par\smallskip{{\scriptsize {escaped(' '.join(notes))}\par}}"] if notes else ()),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def stacked(label: str) -> str:
    """A header with one word per line."""
    words = [escaped(word) for word in label.split()]
    return rf"\shortstack{{{LINE_BREAK.join(words)}}}" if len(words) > 1 else escaped(label)


DASH = "–"
SIGNIFICANT = 0.05
STARRED = (
    "change: percentage points, with 95 % interval (Bonett-Price); flips: samples lost and gained; "
    "p: McNemar's exact test, * where q <= 0.05 among the groups (Benjamini-Hochberg)"
)
EXPLAINED = (
    "Samples scored on both sides; change in percentage points with the 95 % interval of Bonett and Price (2012); "
    "lost and gained: right at the base or at the tuned model alone; p: McNemar's exact test; q: p among the groups "
    "after Benjamini and Hochberg (1995), * where it is at most 0.05."
)
AVERAGED = "official averages: intervals of the groups combined by MOVER (Zou and Donner, 2008); no test"
CSV_HEADER = (
    "benchmark", "version", "pin", "model", "prompt", "format", "metric", "table", "column", "n", "of", "correct",
    "accuracy", "low", "high", *TROUBLES,
)  # fmt: skip


class TerminalTable(NamedTuple):
    """What `terminal.show_table` takes, and lines to print below."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def interval_text(cell: Cell) -> str:
    """`[92.4, 96.7]` in per cent; empty without an interval."""
    return f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]" if is_number(cell.low) and is_number(cell.high) else ""


def cell_text(cell: Cell | None) -> str:
    """`95.0 [92.4, 96.7]`, marked with its number of samples where they are a part."""
    if cell is None:
        return DASH
    mark, part = ("*", f"(n = {cell.n} of {cell.of})") if cell.is_partial else ("", "")
    return " ".join(filter(None, (percent(cell.accuracy) + mark, interval_text(cell), part)))


def latex_cell(cell: Cell | None) -> str:
    """A number over its interval."""
    if cell is None:
        return "--"
    number = percent(cell.accuracy) + ("$^{*}$" if cell.is_partial else "")
    interval = interval_text(cell)
    return with_interval(number, interval) if interval else number


def markdown_tables(summaries: Sequence[Mapping[str, Any]]) -> str:
    """All tables as Markdown, each under its title and caption and over its notes."""
    parts = []
    for table in eval_tables(summaries):
        rows = [(name, *map(cell_text, line)) for name, line in table.rows]
        notes = "\n".join(f"- {note}" for note in table.notes)
        parts += [f"### {table.title}", table.caption, markdown_table(("model", *table.columns), rows), notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex_tables(summaries: Sequence[Mapping[str, Any]]) -> str:
    """All tables as LaTeX, each a float of its own."""
    return "\n".join(
        latex_table(
            f"{table.title}. {table.caption}",
            table.span,
            ("Model", *table.columns),
            [(name, *map(latex_cell, line)) for name, line in table.rows],
            table.notes,
        )
        for table in eval_tables(summaries)
    )


def csv_tables(summaries: Sequence[Mapping[str, Any]]) -> str:
    """All numbers as CSV, one line per model and column, shares in [0, 1]; what was not measured is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for models in editions(summaries):
        for section in sections(models):
            for name, summary in models:
                writer.writerows(csv_lines(section, name, summary))
    return file.getvalue()


def csv_lines(section: Section, name: str, summary: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The lines of one model in one table."""
    about = [summary.get("benchmark"), summary.get("version"), summary.get("pin"), name]
    about += [summary.get("prompt"), summary.get("format"), section.metric or "correct", section.title]
    groups = summary.get("groups") or {}
    for column in section.columns:
        cell = cell_of(summary, column, section.metric)
        group = next((groups[own] for own in column.names if own in groups and not column.is_average), {})
        numbers = [cell.n, cell.of, cell.correct, cell.accuracy, cell.low, cell.high] if cell else [""] * 6
        yield [*about, column.label, *numbers, *(count(group[key]) if key in group else "" for key in TROUBLES)]


def write_tables(summaries: Sequence[Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write tables.md, tables.csv and tables.tex; ValueError for a folder that cannot be written."""
    target = Path(folder)
    texts = {"md": markdown_tables(summaries), "csv": csv_tables(summaries), "tex": latex_tables(summaries)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            replace_file(target / f"tables.{ending}", text)
    except OSError as error:
        raise UserError(
            f"{folder} ({reason(error)})", "a writable folder with free space", "make room or pass another"
        ) from error
    return [target / f"tables.{ending}" for ending in texts]


def terminal_table(summary: Mapping[str, Any]) -> TerminalTable:
    """One evaluation from top to bottom: a row per group with its interval, official averages; 80 columns hold it.

    The notes say of each group what went wrong.
    """
    metrics = [str(name) for name in summary.get("metrics") or ["correct"]]
    titles = metrics if len(metrics) > 1 else ["percent"]
    header = ("", "n", *(title for name in titles for title in (name, "95 %")))
    told = {name: trouble_text([group]) for name, group in (summary.get("groups") or {}).items() if name != OVERALL}
    troubles = [f"{name}: {text}." for name, text in told.items() if text]
    intervals = interval_words(has_averages=bool(summary.get("official")))
    title = f"{model_names([summary])[0]}: {summary.get('pin')}; {how_asked(summary)}; {intervals}"
    return TerminalTable(title, header, list(group_rows(summary, metrics)), [*troubles, *ceiling_notes(summary)])


def group_rows(summary: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Groups indented below the part they belong to, or above what sums them up."""
    groups, official = summary.get("groups") or {}, summary.get("official") or {}
    if summary.get("benchmark") != "bfcl":
        for name in sorted(groups, key=lambda name: name == OVERALL):
            yield group_row(name if name == OVERALL else f" {name}", name, summary, metrics)
        return
    parts = [section for section in sections([("", summary)]) if section.title != AVERAGES]
    for section in parts:
        yield average_row(section.title, section.average, summary, metrics)
        for name in [name for column in section.columns if not column.is_average for name in column.names]:
            if name in groups:
                yield group_row(f" {name}", name, summary, metrics)
    for name in official:
        if name not in {section.average for section in parts}:
            yield average_row(name, name, summary, metrics)


def group_row(label: str, name: str, summary: Mapping[str, Any], metrics: Sequence[str]) -> tuple[str, ...]:
    """A group's number of samples, accuracy and interval per metric."""
    group = summary["groups"][name]
    found = [cell_of(summary, Column(label, (name,)), metric) for metric in metrics]
    n = f"{group.get('n', 0)}" if group.get("n") == group.get("of") else f"{group.get('n', 0)} of {group.get('of')}"
    numbers = [
        text for cell in found for text in ((percent(cell.accuracy), interval_text(cell)) if cell else (DASH, ""))
    ]
    return (label, n, *numbers)


def average_row(label: str, name: str, summary: Mapping[str, Any], metrics: Sequence[str]) -> tuple[str, ...]:
    """An official average and its interval; a dash where groups of it are missing."""
    cell = cell_of(summary, Column(label, (name,), is_average=True), metrics[0])
    numbers = (percent(cell.accuracy), interval_text(cell)) if cell else (DASH, "")
    return (label, "", *numbers, *[""] * (2 * len(metrics) - 2))


def comparison_tables(comparison: Mapping[str, Any]) -> list[TerminalTable]:
    """A table per metric of a comparison as its `to_json()` gives it: paired changes in percentage points."""
    metrics = comparison["metrics"]
    return [
        TerminalTable(
            comparison_title(comparison, metric if len(metrics) > 1 else ""),
            ("", "n", "base", "tuned", "change", "flips", "p"),
            [terminal_row(comparison_row(change)) for change in changes],
            [*(f"warning: {warning}" for warning in comparison.get("warnings", [])), STARRED, *averaged(changes)],
        )
        for metric, changes in metrics.items()
    ]


def averaged(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """How to read official averages, if there are any."""
    return [AVERAGED] if any(change["n"] and change["p"] is None for change in changes) else []


def comparison_title(comparison: Mapping[str, Any], metric: str) -> str:
    """Who is compared, on what."""
    names = [str(comparison[side].get("model") or comparison[side].get("folder")) for side in ("base", "tuned")]
    return f"{names[0]} → {names[1]}: {comparison.get('pin')}" + (f", {metric}" if metric else "")


def comparison_row(change: Mapping[str, Any]) -> tuple[str, ...]:
    """Group, n, base, tuned, change, interval, lost, gained, p and q of one group, dashes for one without samples."""
    label = str(change["group"]) if change.get("q") is None else f" {change['group']}"
    if not change["n"]:
        return (label, "0", *[DASH] * 8)
    return (
        label,
        str(change["n"]),
        percent(change["base"]),
        percent(change["tuned"]),
        f"{100 * change['difference']:+.1f}",
        f"[{100 * change['low']:.1f}, {100 * change['high']:.1f}]",
        str(change["lost"]),
        str(change["gained"]),
        probability_text(change["p"]),
        probability_text(change.get("q")) + ("*" if is_number(change.get("q")) and change["q"] <= SIGNIFICANT else ""),
    )


def terminal_row(row: Sequence[str]) -> tuple[str, ...]:
    """The cells of a comparison drawn together, so that narrow terminals hold them; p takes the star of q."""
    group, n, base, tuned, change, interval, lost, gained, p, q = row
    if n == "0":
        return (group, n, *[DASH] * 5)
    return (group, n, base, tuned, f"{change} {interval}", f"-{lost} +{gained}", p + ("*" if q.endswith("*") else " "))


def probability_text(p: float | None) -> str:
    """`0.012`, `<.001` where three places would read zero."""
    return DASH if p is None else "<.001" if p < 0.001 else f"{p:.3f}"


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """A comparison as Markdown: a table per metric with p- and q-values, the warnings, how to read it."""
    header = ("group", "n", "base", "tuned", "change", "95 % interval", "lost", "gained", "p", "q")
    parts = []
    metrics = comparison["metrics"]
    for metric, changes in metrics.items():
        title = comparison_title(comparison, metric if len(metrics) > 1 else "")
        parts += [f"### {title}", markdown_table(header, [comparison_row(change) for change in changes])]
    asked = [f"- {side}: {how_asked(comparison[side])}" for side in ("base", "tuned")]
    said = [f"- **warning**: {warning}" for warning in comparison.get("warnings", [])]
    read = [
        f"- {text}" for text in (EXPLAINED, *averaged([change for changes in metrics.values() for change in changes]))
    ]
    return "\n\n".join([*parts, "\n".join([*asked, *said, *read])]) + "\n"

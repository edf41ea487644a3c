"""What the command shows: progress, tables, responses coloured by region."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from rest_rl.report.diagnosis import Finding
from rest_rl.report.palette import REGION_COLOURS
from rest_rl.report.tables import is_number
from rest_rl.response import Region, Span
from rest_rl.runlog import Advance, Observer

LINE_EVERY = (5.0, 60.0)
"""Seconds between two lines of progress where there is no terminal: at first, and later a twentieth of what has passed,
at most the second number."""
MANY = 100_000
"""A total from which on it counts bytes, which a bar shows better than their number."""
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Controls but line feed and tab, which a terminal would obey, and lone surrogates, which no output takes."""


def printable(text: str) -> str:
    """The text with a picture of each control in its place, such as ␛: what a model wrote commands no terminal."""
    return UNPRINTABLE.sub(lambda found: pictured(ord(found[0])), text)


def pictured(code: int) -> str:
    """The picture of a control, or the mark of what has none."""
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line as it stands: no markup, no colours of its own, not wrapped."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True, style=style)


def show_coloured(tokens: Iterable[tuple[str, str]], console: Console) -> None:
    """Pieces of text, each in the colour of its region, as they stand: not wrapped, and not measured either."""
    segments = [
        Segment(printable("".join(piece for piece, _ in group)), Style.parse(REGION_COLOURS[region]))
        for region, group in groupby(tokens, key=itemgetter(1))
    ]
    console.print(Segments([*segments, Segment.line()]), soft_wrap=True)


def legend(weights: Mapping[str, float] | None = None) -> Text:
    """The regions in their colours, with their weights if given; one line of 80 columns."""
    text = Text()
    for label, colour in REGION_COLOURS.items():
        weight = (weights or {}).get(label)
        text.append(" ■" if text else "■", style=colour)
        text.append(label + (f" {weight:.2f}" if weight is not None else ""))
    return text


def show_tokens(
    title: str,
    runs: Iterable[tuple[str, str]],
    regions: Sequence[int],
    weights: Sequence[float],
    console: Console,
) -> None:
    """A response in colours, then a table of its regions; `regions` and `weights` are those of its tokens."""
    console.rule(title, align="left", style="dim")
    show_coloured(runs, console)
    table = Table("region", "tokens", "share", "mean weight", box=None, header_style="dim")
    tokens, sums = Counter(regions), [0.0] * len(Region)
    for region, weight in zip(regions, weights, strict=True):
        sums[region] += weight
    for label, colour in REGION_COLOURS.items():
        region = Region[label.upper()]
        if count := tokens[region]:
            row = str(count), f"{count / len(regions):.0%}", f"{sums[region] / count:.3f}"
            table.add_row(Text(label, style=colour), *row)
    console.print(table)


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], console: Console) -> None:
    """A table whose first column is text, which folds where room is short, and whose others are numbers."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row), style=None if str(row[0]).startswith(" ") else "bold")
    console.print(table)


def pieces(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, str]]:
    """The text cut at its spans, each piece with the label of its region."""
    end = 0
    for span in spans:
        yield text[end : span.start], Region.OTHER.label
        yield text[span.start : span.end], span.region.label
        end = span.end
    yield text[end:], Region.OTHER.label


def recorded_pieces(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A recorded response token by token, each with the label of its region."""
    start = 0
    for length, region in zip(row["lengths"], row.get("regions") or [Region.OTHER] * len(row["lengths"]), strict=True):
        yield row["response"][start : start + length], Region(region).label
        start += length


def show_estimate(title: str, rows: Iterable[tuple[str, str, str]], console: Console) -> None:
    """Quantities, their values and how each was estimated; the last column wraps on a terminal."""
    rows = list(rows)
    if not console.is_terminal:
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        say(console, title)
        for quantity, value, how in rows:
            say(console, f"{quantity:{widths[0]}}  {value:>{widths[1]}}  {how}".rstrip())
        return
    table = Table("", "", "", title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[1].justify = "right"
    for quantity, value, how in rows:
        table.add_row(quantity, value, Text(how, style="dim"))
    console.print(table)


class Screen(Observer):
    """The observer of the command: lines, tables and bars; without a terminal, a line every few seconds."""

    def __init__(self, console: Console | None = None, show_every: int = 0) -> None:
        """`show_every`: steps between two sample responses, 0 for none."""
        self.console, self.show_every = console or Console(), show_every
        self.console.file = self.console.file  # a workflow that redirects sys.stdout does not catch what is shown
        self._weights: dict[str, float] = {}
        self._told = time.monotonic()
        self._tracks: list[Advance] = []
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def say(self, text: str) -> None:
        say(self.console, text)

    def show_table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        show_table(title, header, rows, self.console)

    @contextmanager
    def track(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        task = self._bars.add_task(what, total=total, completed=done, note="")
        begin, begun, known = time.monotonic(), done, total

        def advance(done: int, total: int | None = None, note: str = "") -> None:
            nonlocal known
            known = total = total or known
            amount = f"{done}/{total}" if total and total < MANY else ""
            self._bars.update(task, completed=done, total=total, note=f"{amount} {note}")
            now = time.monotonic()
            pause = min(max(LINE_EVERY[0], (now - begin) / 20), LINE_EVERY[1])
            if not self.console.is_terminal and (done == total or now - self._told >= pause):
                self._told, rate = now, (done - begun) / max(now - begin, 1e-9)
                speed = f"{rate:{'.0f' if rate >= 100 else '.3g'}}/s" if amount and rate > 0 else ""
                left = f"{timedelta(seconds=round((total - done) / rate))} left" if total and rate > 0 else ""
                self.say(" ".join(part for part in (what, amount, note, speed, left) if part))

        self._tracks.append(advance)
        if self.console.is_terminal:
            self._bars.start()
        elif len(self._tracks) == 1:
            self.say(f"{what} ...")
            self._told = begin
        try:
            yield advance
        finally:
            self._tracks.remove(advance)
            self._bars.remove_task(task)
            if self.console.is_terminal and not self._tracks:
                self._bars.stop()

    def on_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        weights = {label: metrics.get(f"rest/weight/{label}") for label in REGION_COLOURS}
        self._weights = {label: float(weight) for label, weight in weights.items() if is_number(weight)}
        if self._tracks:
            note = " ".join(f"{name} {metrics[key]:.3f}" for key, name in shown_names(metrics).items())
            self._tracks[-1](step, total, note)

    def on_responses(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the first response of a step now and then."""
        if not self.show_every or (step - 1) % self.show_every or not rows:
            return
        row = rows[0]
        self.console.rule(f"step {step}, reward {row['reward']:.2f}", align="left", style="dim")
        show_coloured(recorded_pieces(row), self.console)
        self.console.print(legend(self._weights))

    def on_finding(self, finding: Finding) -> None:
        """A warning: the figure, then cause and remedy."""
        say(self.console, f"step {finding.step}: {finding.figure}", style="yellow")
        say(self.console, f"  likely cause: {finding.cause}\n  remedy: {finding.remedy}")


REINFORCED = {"reward": "reward", "rest/accuracy": "S_acc", "rest/format": "S_format"}
SUPERVISED = {"loss": "loss", "mean_token_accuracy": "token accuracy"}
APART = {"reward": "reward", "rest/accuracy_calls": "S_acc calls", "rest/accuracy_answers": "answers"}
"""Metrics beside the bar, which fit 80 columns: the last where a step has call turns and answer turns."""


def shown_names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of a step that stand beside the bar, and their names."""
    apart = APART.keys() <= metrics.keys()
    shown = APART if apart else REINFORCED if "reward" in metrics else SUPERVISED
    return {key: name for key, name in shown.items() if key in metrics}

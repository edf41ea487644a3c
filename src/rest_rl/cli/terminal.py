"""Print progress, tables, and responses colored by region to the terminal."""

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
from rest_rl.report.palette import REGION_COLORS
from rest_rl.report.tables import is_number
from rest_rl.response import Region, Span
from rest_rl.runlog import Advance, Observer

# Minimum and maximum seconds between two progress lines without a terminal; in between, a twentieth of the elapsed
# time.
LINE_PAUSES = (5.0, 60.0)
# Larger totals are byte counts, which are shown as a bar and not as a number.
MIN_BYTE_TOTAL = 100_000
# Control characters except line feed and tab, which a terminal would execute, and lone surrogates, which cannot be
# encoded.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Replace control characters with symbols such as ␛, so that model output cannot send commands to the terminal."""
    return UNPRINTABLE.sub(lambda found: to_symbol(ord(found[0])), text)


def to_symbol(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line without markup, highlighting or wrapping."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True, style=style)


def show_colored(tokens: Iterable[tuple[str, str]], console: Console) -> None:
    """Print (text, region label) pairs without separators, each text in the color of its region."""
    # Segments bypass rich's Text, whose wrapping measures every character and takes seconds for long responses.
    segments = [
        Segment(printable("".join(piece for piece, _ in group)), Style.parse(REGION_COLORS[region]))
        for region, group in groupby(tokens, key=itemgetter(1))
    ]
    console.print(Segments([*segments, Segment.line()]), soft_wrap=True)


def legend(weights: Mapping[str, float] | None = None) -> Text:
    """Return the region labels in their colors, with weights if given, on one line of at most 80 columns."""
    text = Text()
    for label, color in REGION_COLORS.items():
        weight = (weights or {}).get(label)
        text.append(" ■" if text else "■", style=color)
        text.append(label + (f" {weight:.2f}" if weight is not None else ""))
    return text


def show_tokens(
    title: str, runs: Iterable[tuple[str, str]], regions: Sequence[int], weights: Sequence[float], console: Console
) -> None:
    """Show a response, given as (text, region label) pairs, and a table of its tokens' regions and weights."""
    console.rule(title, align="left", style="dim")
    show_colored(runs, console)
    table = Table("region", "tokens", "share", "mean weight", box=None, header_style="dim")
    tokens, sums = Counter(regions), [0.0] * len(Region)
    for region, weight in zip(regions, weights, strict=True):
        sums[region] += weight
    for label, color in REGION_COLORS.items():
        region = Region[label.upper()]
        if count := tokens[region]:
            row = str(count), f"{count / len(regions):.0%}", f"{sums[region] / count:.3f}"
            table.add_row(Text(label, style=color), *row)
    console.print(table)


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], console: Console) -> None:
    """Show a table; the first column is left-aligned and wraps if necessary, the others are right-aligned."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
    # Rows that start with a space are parts of the row above and are not bold.
    for row in rows:
        table.add_row(*map(str, row), style=None if str(row[0]).startswith(" ") else "bold")
    console.print(table)


def split_at_spans(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, str]]:
    """Split a text at its spans; yield each piece with its region label, `other` between spans."""
    end = 0
    for span in spans:
        yield text[end : span.start], Region.OTHER.label
        yield text[span.start : span.end], span.region.label
        end = span.end
    yield text[end:], Region.OTHER.label


def split_recorded(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    # Yield the tokens of a recorded response, each with the label of its region.
    start = 0
    for length, region in zip(row["lengths"], row.get("regions") or [Region.OTHER] * len(row["lengths"]), strict=True):
        yield row["response"][start : start + length], Region(region).label
        start += length


def show_estimate(title: str, rows: Iterable[tuple[str, str, str]], console: Console) -> None:
    """Show rows of (quantity, value, how it was estimated); on a terminal, the last column wraps."""
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
    """The observer that prints to the console, with progress bars on a terminal and progress lines elsewhere."""

    def __init__(self, console: Console | None = None, show_every: int = 0) -> None:
        """Create an observer that shows a sample response every `show_every` steps; 0 shows none."""
        self.console, self.show_every = console or Console(), show_every
        self.console.file = self.console.file  # binds today's sys.stdout, which a workflow may redirect later
        self._weights: dict[str, float] = {}
        self._last_line = time.monotonic()
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
        begin, known = time.monotonic(), total
        # The rate leaves out what a resumed run had finished before, and what comes before the first mark, such as the
        # prompts of a batch.
        since, first, is_marked = begin, done, False

        def advance(done: int, total: int | None = None, note: str = "") -> None:
            nonlocal known, since, first, is_marked
            known = total = total or known
            amount = f"{done}/{total}" if total and total < MIN_BYTE_TOTAL else ""
            self._bars.update(task, completed=done, total=total, note=f"{amount} {note}")
            # Without a terminal (a log file), lines get rarer as the run gets longer: after 20 minutes, one per minute.
            now = time.monotonic()
            pause = min(max(LINE_PAUSES[0], (now - begin) / 20), LINE_PAUSES[1])
            if not self.console.is_terminal and (done == total or now - self._last_line >= pause):
                is_early = not is_marked and total and done < total / 20
                self._last_line, rate = now, 0.0 if is_early else (done - first) / max(now - since, 1e-9)
                speed = f"{rate:{'.0f' if rate >= 100 else '.3g'}}/s" if amount and rate > 0 else ""
                left = f"{timedelta(seconds=round((total - done) / rate))} left" if total and rate > 0 else ""
                self.say(" ".join(part for part in (what, amount, note, speed, left) if part))
            if not is_marked:
                since, first, is_marked = now, done, True

        # Tracks nest (a step within training), but rich allows one live display per console: the outermost track starts
        # and stops it, and without a terminal only the outermost track announces itself.
        self._tracks.append(advance)
        if self.console.is_terminal:
            self._bars.start()
        elif len(self._tracks) == 1:
            self.say(f"{what} ...")
            self._last_line = begin
        try:
            yield advance
        finally:
            self._tracks.remove(advance)
            self._bars.remove_task(task)
            if self.console.is_terminal and not self._tracks:
                self._bars.stop()

    def on_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        weights = {label: metrics.get(f"rest/weight/{label}") for label in REGION_COLORS}
        self._weights = {label: float(weight) for label, weight in weights.items() if is_number(weight)}
        if self._tracks:
            note = " ".join(f"{name} {metrics[key]:.3f}" for key, name in select_metrics(metrics).items())
            self._tracks[-1](step, total, note)

    def on_responses(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the first response if a sample is due at this step."""
        if not self.show_every or (step - 1) % self.show_every or not rows:
            return
        row = rows[0]
        self.console.rule(f"step {step}, reward {row['reward']:.2f}", align="left", style="dim")
        show_colored(split_recorded(row), self.console)
        self.console.print(legend(self._weights))

    def on_finding(self, finding: Finding) -> None:
        """Show a finding of the diagnosis, with its likely cause and remedy."""
        say(self.console, f"step {finding.step}: {finding.figure}", style="yellow")
        say(self.console, f"  likely cause: {finding.cause}\n  remedy: {finding.remedy}")


RL_METRICS = {"reward": "reward", "rest/accuracy": "S_acc", "rest/format": "S_format"}
SFT_METRICS = {"loss": "loss", "mean_token_accuracy": "token accuracy"}
# Metrics next to the progress bar that fit into 80 columns; the last table is for steps with call and answer turns.
SPLIT_METRICS = {"reward": "reward", "rest/accuracy_calls": "S_acc calls", "rest/accuracy_answers": "answers"}


def select_metrics(metrics: Mapping[str, Any]) -> dict[str, str]:
    # The metrics to show next to the progress bar, with their labels.
    is_split = SPLIT_METRICS.keys() <= metrics.keys()
    shown = SPLIT_METRICS if is_split else RL_METRICS if "reward" in metrics else SFT_METRICS
    return {key: name for key, name in shown.items() if key in metrics}

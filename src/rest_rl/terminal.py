"""What the command shows: the progress bar, the before/after table, responses coloured by region."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rest_rl.analyze.palette import REGION_COLOURS


class ShownToken(Protocol):
    """What is needed of a token to show it."""

    @property
    def text(self) -> str:
        """The token's own text."""
        ...

    @property
    def region(self) -> str:
        """Label of its region."""
        ...

    @property
    def weight(self) -> float:
        """Its gradient weight."""
        ...


def progress_bar(console: Console) -> Progress:
    """A bar with steps, a note and the time left; it fits 80 columns."""
    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


def coloured(tokens: Iterable[tuple[str, str]]) -> Text:
    """Pieces of text, each in the colour of its region."""
    text = Text(overflow="fold")
    for piece, region in tokens:
        text.append(piece, style=REGION_COLOURS[region])
    return text


def legend(weights: Mapping[str, float] | None = None) -> Text:
    """The regions in their colours, with their weights if given; one line of 80 columns."""
    text = Text()
    for label, colour in REGION_COLOURS.items():
        weight = (weights or {}).get(label)
        text.append(" ■" if text else "■", style=colour)
        text.append(label + (f" {weight:.2f}" if weight is not None else ""))
    return text


def show_tokens(title: str, tokens: Sequence[ShownToken], console: Console | None = None) -> None:
    """A response in colours, then a table of its regions with token count and mean weight."""
    console = console or Console()
    console.rule(title, align="left", style="dim")
    console.print(coloured((token.text, token.region) for token in tokens), soft_wrap=True)
    table = Table("region", "tokens", "share", "mean weight", box=None, header_style="dim")
    for label, colour in REGION_COLOURS.items():
        weights = [token.weight for token in tokens if token.region == label]
        if weights:
            mean, share = sum(weights) / len(weights), len(weights) / len(tokens)
            table.add_row(Text(label, style=colour), str(len(weights)), f"{share:.0%}", f"{mean:.3f}")
    console.print(table)


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], console: Console) -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row), style=None if str(row[0]).startswith(" ") else "bold")
    console.print(table)

"""The verb `compare`: methods x seeds on the same data, run, kept, resumed, and a page about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rest_rl.cli.options import EXIT_INTERRUPTED, Overrides
from rest_rl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rest_rl.compare.collect import ComparisonReport

EPILOG = """\
examples:
  rest-rl compare --methods grpo,rest,permuted --seeds 0,1,2 --out runs/grid          the embedded model
  rest-rl compare --base run.toml --methods grpo,rest,permuted --jobs 1 --out runs/grid
  rest-rl compare grid.toml --out runs/grid          your own methods and warm starts
  rest-rl compare runs/grid                          go on after Ctrl-C, a crash or kill -9
  rest-rl compare runs/grid --report-only
"""
EXIT_FAILED = 1


def compare(
    grid: Annotated[
        str | None, typer.Argument(metavar="GRID.toml", help="the grid, or the folder of one that was begun")
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="rest,grpo,permuted,...; see docs/compare.md (default: ten)")
    ] = "",
    seeds: Annotated[str, typer.Option(metavar="0,1", help="seeds of the runs (default: 0,1,2)")] = "",
    base: Annotated[
        str | None, typer.Option(metavar="RUN.toml", help="the run that methods change (default: the embedded one)")
    ] = None,
    overrides: Overrides = [],
    baseline: Annotated[
        str | None, typer.Option(metavar="M", help="method that the others are compared with (default: grpo)")
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="runs at a time")] = 2,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="folder of the grid: runs/, logs/, compare.md, compare.json")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="train nothing, write the page of what is there")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the grid, train nothing")] = False,
) -> int:
    """Train every method under every seed on the same data, in the same order, for the same steps, and write a page.

    The page has differences to GRPO with intervals and tests, controls, and a verdict. Finished runs are kept, broken
    ones go on. (Two evaluations of models that there are already: rest-rl eval diff.)
    """
    from rich.console import Console

    from rest_rl.cli.terminal import Screen, say
    from rest_rl.compare import run

    console = Console()
    report = run.compare(
        grid,
        methods=split_commas(methods),
        seeds=[seed_of(seed) for seed in split_commas(seeds)],
        base=base,
        overrides=overrides,
        reference=baseline,
        out=out,
        jobs=jobs,
        only_report=report_only,
        dry_run=dry_run,
        observer=Screen(console),
    )
    if report.page:
        show_report(report, console)
    for name, what in report.failed.items():
        say(console, f"{name} {what}", style="bold")
    if report.is_interrupted:
        say(console, f"go on with: rest-rl compare {report.folder}")
        return EXIT_INTERRUPTED
    return EXIT_FAILED if report.failed else 0


def split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def seed_of(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"the seed {text!r}", "whole numbers", "write them as in --seeds 0,1,2")
    return int(text)


def show_report(report: ComparisonReport, console: Console) -> None:
    """The first table, the verdict and where the page is."""
    from rest_rl.cli.terminal import say, show_table
    from rest_rl.compare.page import terminal_table

    show_table(*terminal_table(report), console)
    for statement in report.verdict:
        console.print("• " + statement.text.replace("**", "").replace("`", ""), highlight=False, markup=False)
    say(console, f"page: {report.page}")

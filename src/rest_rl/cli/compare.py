"""The command `compare`: train several methods with several seeds and report the differences."""

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
  rest-rl compare --methods grpo,rest,permuted --seeds 0,1,2 --out runs/grid
  rest-rl compare --base run.toml --methods grpo,rest,permuted --jobs 1 --out runs/grid
  rest-rl compare grid.toml --out runs/grid            your own methods and warm starts
  rest-rl compare grid.toml --gpus 8 --out runs/grid   eight runs at a time, one GPU each
  rest-rl compare runs/grid                            resume after Ctrl-C, a crash or kill -9
  rest-rl compare runs/grid --report-only
"""
EXIT_FAILED = 1
Baseline = Annotated[str | None, typer.Option(metavar="M", help="method to compare the others with (default: grpo)")]
Jobs = Annotated[
    int | None, typer.Option(metavar="N", help="number of runs at the same time (default: one per GPU of --gpus, or 2)")
]
Gpus = Annotated[
    str, typer.Option(metavar="N|0,1", help="number or names of GPUs, divided evenly among the runs at a time")
]
Launch = Annotated[
    str, typer.Option(metavar="COMMAND", help="start runs with this, such as 'accelerate launch --num_processes 4'")
]


def compare(
    grid: Annotated[
        str | None, typer.Argument(metavar="GRID.toml", help="grid file, or the folder of a grid to resume")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(metavar="A,B", help="methods, such as rest,grpo (default: eleven; see docs/compare.md)"),
    ] = "",
    seeds: Annotated[str, typer.Option(metavar="0,1", help="seeds of the runs (default: 0,1,2)")] = "",
    base: Annotated[
        str | None,
        typer.Option(metavar="RUN.toml", help="run file that the methods modify (default: the embedded run)"),
    ] = None,
    overrides: Overrides = [],
    baseline: Baseline = None,
    jobs: Jobs = None,
    gpus: Gpus = "",
    launch: Launch = "",
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="folder of the grid, for runs/, logs/, compare.md and compare.json"),
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="train nothing; report the finished runs")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="train nothing; print the grid")] = False,
) -> int:
    """Train every method with every seed on the same data, in the same order, for the same number of steps.

    The report gives each method's difference to the baseline with confidence intervals and tests, and a verdict.
    Finished runs are reused, and interrupted ones resume. To compare two evaluations instead, use rest-rl eval diff.
    """
    from rich.console import Console

    from rest_rl.cli.terminal import Screen, say
    from rest_rl.compare import run

    console = Console()
    report = run.compare(
        grid,
        methods=split_commas(methods),
        seeds=[parse_seed(seed) for seed in split_commas(seeds)],
        base=base,
        overrides=overrides,
        reference=baseline,
        out=out,
        jobs=jobs,
        gpus=(int(gpus) if gpus.isdecimal() else split_commas(gpus)) if gpus else None,
        launch=launch,
        only_report=report_only,
        dry_run=dry_run,
        observer=Screen(console),
    )
    # No page means that no run of the baseline is finished, so there is nothing to compare with.
    if report.page:
        show_report(report, console)
    for name, what in report.failed.items():
        say(console, f"{name} {what}", style="bold")
    if report.is_interrupted:
        say(console, f"to resume, run: rest-rl compare {report.folder}")
        return EXIT_INTERRUPTED
    return EXIT_FAILED if report.failed else 0


def split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_seed(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"the seed is {text!r}", "a whole number", "write seeds as in --seeds 0,1,2")
    return int(text)


def show_report(report: ComparisonReport, console: Console) -> None:
    from rest_rl.cli.terminal import say, show_table
    from rest_rl.compare.page import terminal_table

    show_table(*terminal_table(report), console)
    for statement in report.verdict:
        console.print("• " + statement.text.replace("**", "").replace("`", ""), highlight=False, markup=False)
    say(console, f"report: {report.page}")

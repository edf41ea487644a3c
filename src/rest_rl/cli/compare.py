"""The verb `compare`: methods x seeds on the same data, run, cached, resumed, and a page about them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from rest_rl.cli.jobs import Job, grid_jobs, run_jobs
from rest_rl.cli.terminal import say, show_table
from rest_rl.compare.collect import METRICS, Comparison
from rest_rl.compare.grid import GRID, REFERENCE, RUNS, Grid, RunName, read_grid
from rest_rl.compare.page import mean_text, tested, write_comparison
from rest_rl.compare.verdict import verdict
from rest_rl.config import AUTO
from rest_rl.errors import UserError
from rest_rl.runlog import replace_file, unwritable

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def compare(arguments: argparse.Namespace) -> int:
    """Train what is missing of the grid, then write its page. Returns the exit code: 1 if a run failed."""
    console = Console()
    out = grid_folder(arguments)
    if arguments.only_report:
        return report(out, arguments.reference or recorded_reference(out), console)
    grid = asked_grid(arguments, out)
    jobs = grid_jobs(grid, out)
    refuse_unstartable(jobs)
    if arguments.dry_run:
        show_plan(grid, jobs, console)
        return 0
    keep_grid(grid, out)
    kept = sum(job.state == "kept" for job in jobs)
    say(console, f"{len(jobs)} runs in {out / RUNS}, {kept} of them finished")
    is_whole = run_jobs(jobs, arguments.jobs, console)
    failed = [job for job in jobs if job.state == "failed"]
    code = EXIT_FAILED if failed else 0
    if any(job.state in ("done", "kept") and job.name.method == grid.reference for job in jobs):
        report(out, arguments.reference or grid.reference, console)
    for job in failed:
        say(console, f"{job.name} {job.note}; see {job.log}", style="bold")
    if not is_whole:
        say(console, f"go on with: rest-rl compare {out}")
        return EXIT_INTERRUPTED
    return code


def grid_folder(arguments: argparse.Namespace) -> Path:
    """Where the grid lies: `--out`, or the folder that was given in place of a grid file."""
    given = Path(arguments.grid) if arguments.grid else None
    if given is not None and not given.exists():
        raise UserError(
            f"{given}, which is neither a TOML file nor the folder of a grid", "one of them", "check the path"
        )
    if given is not None and given.is_dir():
        if arguments.out and Path(arguments.out).resolve() != given.resolve():
            raise UserError(f"the folder {given} and --out {arguments.out}", "one of them", "remove --out")
        return given
    if not arguments.out:
        raise UserError("no --out", "the folder of the grid", "pass --out DIR")
    return Path(arguments.out)


def asked_grid(arguments: argparse.Namespace, out: Path) -> Grid:
    """The grid of the file, of the arguments, or, for a folder, the one that was begun there."""
    path = Path(arguments.grid) if arguments.grid else None
    if path is not None and path.is_dir():
        path = path / GRID
        if not path.is_file():
            raise UserError(
                f"the folder {out} without {GRID}",
                "a grid that was begun",
                "pass a grid file or --methods, or --only-report for a page of the runs that are there",
            )
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}", "at least 1", "raise it")
    return read_grid(
        path,
        methods=listed(arguments.methods),
        seeds=[whole_number(seed) for seed in listed(arguments.seeds)],
        base=arguments.base,
        overrides=arguments.set,
        reference=arguments.reference,
    )


def listed(text: str | None) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def whole_number(text: str) -> int:
    """A seed."""
    if not text.isdecimal():
        raise ValueError(f"got the seed {text!r}, expected whole numbers: --seeds 0,1,2")
    return int(text)


def refuse_unstartable(jobs: list[Job]) -> None:
    """ValueError for a method whose runs the trainer would refuse, before any other is trained."""
    from rest_rl.train.trl.settings import trainer_config  # a page of runs that are there does without the trainer

    for job in jobs:
        if job.state == "kept" or job.config.run.engine != "trl":
            continue
        # On the CPU, as we outlive every run and hold no memory of its GPU; no tokenizer is loaded to tell the format.
        on_cpu = {**job.config.trl, "use_cpu": True, "bf16": False, "fp16": False}
        rest = job.config.rest
        rest = replace(rest, format="toolrl") if rest.format == AUTO else rest
        try:
            trainer_config(replace(job.config, rest=rest, trl=on_cpu))
        except ValueError as error:
            why = str(error)
            if not why.startswith("got "):
                why = (
                    f"got [trl] that its trainer refuses ({why.rstrip('.')}), expected settings that its runs can "
                    "start with; mend them in the grid file, the base run or --set"
                )
            raise ValueError(f"method {job.name.label}: {why}") from error


def keep_grid(grid: Grid, out: Path) -> None:
    """Write the grid down, so that its folder alone suffices to go on; what was asked there before stays in it."""
    if (out / GRID).is_file():
        grid = grid.joined(read_grid(out / GRID))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in grid.files().items():
            replace_file(out / name, text)
    except OSError as error:
        raise unwritable(out, error) from error


def recorded_reference(out: Path) -> str:
    """The reference of the grid that was begun in a folder; the default one without a grid."""
    return read_grid(out / GRID).reference if (out / GRID).is_file() else REFERENCE


def show_plan(grid: Grid, jobs: list[Job], console: Console) -> None:
    """What would be trained."""
    rows = []
    for start in (*grid.starts,) or ("",):
        for method in grid.methods:
            own = [job for job in jobs if (job.name.method, job.name.start) == (method, start)]
            steps = own[0].total or "?"
            finished = sum(job.state == "kept" for job in own)
            rows.append((RunName(method, start, 0).label, len(own), finished, steps))
    show_table("the grid", ("method", "runs", "finished", "steps of a run"), rows, console)


def report(out: Path, reference: str, console: Console) -> int:
    """Write the page, show its verdict and its first table."""
    page, comparison = write_comparison(out, reference)
    show_table(*final_table(comparison), console)
    for sentence in verdict(comparison):
        console.print("• " + sentence.replace("**", "").replace("`", ""), highlight=False, markup=False)
    say(console, f"page: {page}")
    return 0


def final_table(comparison: Comparison) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, header and rows of the primary figure by method."""
    key = comparison.primary
    header = ("percent", "seeds", METRICS[key].label, f"- {comparison.reference}", "p" if comparison.is_single else "q")
    rows = []
    for line in comparison.lines:
        test = tested(line, key)
        rows.append((line.label, str(len(line.cells)), mean_text(line, key), test[0], test[3]))
    rows += [(label, "0", "–", "–", "–") for label in comparison.absent]
    return METRICS[key].text, header, rows

"""`rest_rl.compare`: methods x seeds on the same data, trained, kept, resumed, and what their runs say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_rl.compare.grid import DEFAULT_REFERENCE, GRID_FILE, RUNS_FOLDER, Grid, read_grid
from rest_rl.compare.jobs import Job, check_startable, make_jobs, run_jobs
from rest_rl.errors import UserError
from rest_rl.runlog import SILENT, Observer, replace_file, unwritable_folder_error

if TYPE_CHECKING:
    from rest_rl.compare.collect import ComparisonReport


def compare(
    grid: str | Path | None = None,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    base: str | Path | None = None,
    overrides: Iterable[str] = (),
    reference: str | None = None,
    out: str | Path | None = None,
    jobs: int = 2,
    only_report: bool = False,
    dry_run: bool = False,
    observer: Observer = SILENT,
) -> ComparisonReport:
    """Train what is missing of a grid, `jobs` runs at a time, then compare its methods with the reference.

    `grid` is a grid file, the folder of a grid that was begun (as `out`), or None for the package's methods on the
    `base` run file, or without one on the embedded run. The runs, the page and its figures lie in `out`. The first
    Ctrl-C stops every run after its step, the second one at once. With `only_report` nothing is trained; with `dry_run`
    nothing is written either, and the observer gets a table of the grid.

    Raises:
        UserError: a grid or run file that cannot be run, or a folder without a finished run of the reference.
    """
    file, folder = locate_grid(grid, out, only_report=only_report)
    if only_report:
        kept = read_grid(folder / GRID_FILE, is_recorded=True) if (folder / GRID_FILE).is_file() else None
        return write_report(folder, kept, reference or (kept.reference if kept else DEFAULT_REFERENCE))
    if jobs < 1:
        raise UserError(f"--jobs {jobs}", "at least 1", "raise it")
    wanted = read_grid(
        file,
        methods=methods,
        seeds=seeds,
        base=base,
        overrides=overrides,
        reference=reference,
        is_recorded=file == folder / GRID_FILE,
    )
    planned = make_jobs(wanted, folder)
    check_startable(planned)
    if dry_run:
        observer.show_table("the grid", ("method", "runs", "finished", "steps of a run"), plan_rows(planned))
        return collect_report(folder, wanted, wanted.reference)
    whole = save_grid(wanted, folder)
    kept_runs = sum(job.state == "kept" for job in planned)
    observer.say(f"{len(planned)} runs in {folder / RUNS_FOLDER}, {kept_runs} of them finished")
    is_whole = run_jobs(planned, jobs, observer)
    if any(job.state in ("done", "kept") and job.name.method == wanted.reference for job in planned):
        result = write_report(folder, whole, wanted.reference)
    else:
        result = with_verdict(collect_report(folder, whole, wanted.reference))
    failed = {str(job.name): f"{job.note}; see {job.log}" for job in planned if job.state == "failed"}
    return replace(result, failed=failed, is_interrupted=not is_whole)


def write_report(folder: Path, grid: Grid | None, reference: str) -> ComparisonReport:
    """Compare the finished runs in a grid's folder and write the page."""
    from rest_rl.compare.page import write_page

    found = with_verdict(collect_report(folder, grid, reference))
    if not found.lines:
        raise UserError(
            f"{folder} without a finished run",
            f"folders {RUNS_FOLDER}/METHOD-SEED of rest-rl train",
            "run the grid first",
        )
    if all(line.method != reference for line in found.lines):
        methods = ", ".join(dict.fromkeys(line.method for line in found.lines))
        raise UserError(
            f"no finished run of the reference {reference!r} in {folder}, only of {methods}",
            "one for each seed",
            "finish it, or name another with --baseline",
        )
    return write_page(found)


def collect_report(folder: Path, grid: Grid | None, reference: str) -> ComparisonReport:
    from rest_rl.compare.collect import collect  # scipy and matplotlib wait until the grid has been read

    return collect(folder, grid, reference)


def with_verdict(found: ComparisonReport) -> ComparisonReport:
    from rest_rl.compare.verdict import build_verdict

    return replace(found, verdict=build_verdict(found))


def locate_grid(grid: str | Path | None, out: str | Path | None, *, only_report: bool) -> tuple[Path | None, Path]:
    """The grid file, if there is one, and the grid's folder: `out`, or what was given in place of a grid file."""
    given = Path(grid) if grid else None
    if given is not None and not given.exists():
        raise UserError(
            f"{given}, which is neither a TOML file nor the folder of a grid", "one of them", "check the path"
        )
    if given is not None and given.is_dir():
        if out and Path(out).resolve() != given.resolve():
            raise UserError(f"the folder {given} and --out {out}", "one of them", "remove --out")
        if not only_report and not (given / GRID_FILE).is_file():
            raise UserError(
                f"the folder {given} without {GRID_FILE}",
                "a grid that was begun",
                "pass a grid file or --methods, or --report-only for a page of the runs that are there",
            )
        return given / GRID_FILE, given
    if not out:
        raise UserError("no --out", "the folder of the grid", "pass --out DIR")
    return given, Path(out)


def plan_rows(jobs: Sequence[Job]) -> list[tuple[str, int, int, Any]]:
    """By method how many runs it has, how many of them are finished, and their steps."""
    by_label: dict[str, list[Job]] = {}
    for job in jobs:
        by_label.setdefault(job.name.label, []).append(job)
    return [
        (label, len(own), sum(job.state == "kept" for job in own), own[0].total or "?")
        for label, own in by_label.items()
    ]


def save_grid(grid: Grid, folder: Path) -> Grid:
    """Write the grid down, so that its folder suffices to go on; what was asked for there before stays in it."""
    if (folder / GRID_FILE).is_file():
        grid = grid.merge(read_grid(folder / GRID_FILE, is_recorded=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in grid.to_files().items():
            replace_file(folder / name, text)
    except OSError as error:
        raise unwritable_folder_error(folder, error) from error
    return grid

"""`rest_rl.compare`: trains a grid of methods x seeds on the same data, resumes it, and compares the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_rl.compare.grid import DEFAULT_REFERENCE, GRID_FILE, RUNS_FOLDER, Grid, read_grid
from rest_rl.compare.jobs import Job, check_startable, make_jobs, run_jobs
from rest_rl.compare.launch import Gpus, plan_launch
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
    jobs: int | None = None,
    gpus: Gpus | None = None,
    launch: str = "",
    only_report: bool = False,
    dry_run: bool = False,
    observer: Observer = SILENT,
) -> ComparisonReport:
    """Train the unfinished runs of a grid, then compare its methods with the baseline over seeds.

    Args:
        grid: a grid file, the folder of an existing grid, or None for the package's methods.
        methods: names of methods, instead of those of the grid file.
        seeds: seeds of the runs, instead of those of the grid file.
        base: the run file that the methods change; by default the package's run of the embedded model.
        overrides: changes to the base run, such as `trl.max_steps=100`.
        reference: the baseline method.
        out: the folder for the runs, their logs and the page.
        jobs: how many runs to train at a time (default: one per GPU, or 2). Ctrl-C stops them after their step.
        gpus: a number of GPUs, or their indices or UUIDs, to divide evenly among the runs at a time.
        launch: a command that starts each run instead of Python, such as `accelerate launch --num_processes 4`.
        only_report: train nothing; only write the page about the finished runs.
        dry_run: train and write nothing; only pass a table of the planned runs to the observer.
        observer: receives messages and progress.

    Raises:
        UserError: the grid or its runs have invalid settings, or the baseline has no finished run.
    """
    file, folder = locate_grid(grid, out, only_report=only_report)
    if only_report:
        saved = read_grid(folder / GRID_FILE, is_recorded=True) if (folder / GRID_FILE).is_file() else None
        return write_report(folder, saved, reference or (saved.reference if saved else DEFAULT_REFERENCE))
    planned_launch = plan_launch(jobs, gpus, launch)
    is_resumed = file == folder / GRID_FILE
    wanted = read_grid(
        file, methods=methods, seeds=seeds, base=base, overrides=overrides, reference=reference, is_recorded=is_resumed
    )
    planned = make_jobs(wanted, folder)
    check_startable(planned, planned_launch)
    if dry_run:
        observer.show_table("grid", ("method", "runs", "finished", "steps per run"), plan_rows(planned))
        return collect_report(folder, wanted, wanted.reference)
    whole = save_grid(wanted, folder)
    kept, plural = sum(job.state == "kept" for job in planned), "" if len(planned) == 1 else "s"
    observer.say(f"{len(planned)} run{plural} in {folder / RUNS_FOLDER}, {kept} already finished")
    is_whole = run_jobs(planned, planned_launch, observer)
    if any(job.state in ("done", "kept") and job.name.method == wanted.reference for job in planned):
        result = write_report(folder, whole, wanted.reference)
    else:
        result = with_verdict(collect_report(folder, whole, wanted.reference))
    failed = {str(job.name): f"{job.note}; see {job.log}" for job in planned if job.state == "failed"}
    return replace(result, failed=failed, is_interrupted=not is_whole)


def write_report(folder: Path, grid: Grid | None, reference: str) -> ComparisonReport:
    """Compare the finished runs in the folder of a grid, and write the page."""
    from rest_rl.compare.page import write_page

    found = with_verdict(collect_report(folder, grid, reference))
    if not found.lines:
        raise UserError(f"{folder} has no finished run", f"folders {RUNS_FOLDER}/METHOD-SEED", "train the grid first")
    if all(line.method != reference for line in found.lines):
        methods = ", ".join(dict.fromkeys(line.method for line in found.lines))
        raise UserError(
            f"{folder} has no finished run of the baseline {reference!r}, only of {methods}",
            remedy="train the baseline, or choose another with --baseline",
        )
    return write_page(found)


def collect_report(folder: Path, grid: Grid | None, reference: str) -> ComparisonReport:
    from rest_rl.compare.collect import collect  # imports scipy, so only once the grid is valid

    return collect(folder, grid, reference)


def with_verdict(found: ComparisonReport) -> ComparisonReport:
    from rest_rl.compare.verdict import build_verdict

    return replace(found, verdict=build_verdict(found))


def locate_grid(grid: str | Path | None, out: str | Path | None, *, only_report: bool) -> tuple[Path | None, Path]:
    # Returns the grid file, if there is one, and the folder of the grid. A folder in place of the file serves as both.
    given = Path(grid) if grid else None
    if given is not None and not given.exists():
        raise UserError(f"{given} does not exist", "a TOML file or the folder of a grid", "check the path")
    if given is not None and given.is_dir():
        if out and Path(out).resolve() != given.resolve():
            raise UserError(f"the folder {given} and --out {out} are both given", "one of them", "remove --out")
        if not only_report and not (given / GRID_FILE).is_file():
            raise UserError(
                f"the folder {given} has no {GRID_FILE}",
                "the folder of an existing grid",
                "pass a grid file or --methods, or --report-only to report on the finished runs in it",
            )
        return given / GRID_FILE, given
    if not out:
        raise UserError("compare needs a folder for its runs", remedy="pass --out DIR")
    return given, Path(out)


def plan_rows(jobs: Sequence[Job]) -> list[tuple[str, int, int, Any]]:
    by_label: dict[str, list[Job]] = {}
    for job in jobs:
        by_label.setdefault(job.name.label, []).append(job)
    return [
        (label, len(own), sum(job.state == "kept" for job in own), own[0].total or "?")
        for label, own in by_label.items()
    ]


def save_grid(grid: Grid, folder: Path) -> Grid:
    # The folder must contain all that resuming needs. A grid grows: methods and seeds of earlier calls stay in it.
    if (folder / GRID_FILE).is_file():
        grid = grid.merge(read_grid(folder / GRID_FILE, is_recorded=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in grid.to_files().items():
            replace_file(folder / name, text)
    except OSError as error:
        raise unwritable_folder_error(folder, error) from error
    return grid

"""What the engines of `rest-rl train` share before and after the training itself."""

from __future__ import annotations

from textwrap import shorten

from rest_rl.analyze.plots import draw_all
from rest_rl.analyze.tables import COMPARISON_HEADER, comparison_rows, group_runs
from rest_rl.runlog import RunLog, read_run, unwritable
from rest_rl.terminal import Screen, show_table
from rest_rl.train.training_data import TrainingData

EXIT_INTERRUPTED = 130


def check_same_data(data: TrainingData, log: RunLog) -> None:
    """ValueError if a resumed run would go on with other samples than it began with."""
    recorded = log.read_summary().get("data", {})
    if recorded.get("digest", data.digest) != data.digest:
        raise ValueError(
            f"got --resume with other training data than the run in {log.folder} began with (then "
            f"{recorded.get('samples')} samples, now {len(data.samples)}), expected the same; restore the file, or "
            "start anew with another --out"
        )


def keep_account(data: TrainingData, log: RunLog, screen: Screen) -> None:
    """What training was given and what not, in the run folder; what the model cannot hold is said aloud."""
    if refused := [row for row in data.rejected if "sample" in row]:
        first = shorten(f"{refused[0]['sample']}: {refused[0]['reason']}", 250, placeholder=" ...")
        screen.say(f"{len(refused)} of these samples cannot be laid out and are left out; the first, {first}")
    log.write_rejected(data.rejected)
    log.update_summary(data={**data.report, "refused": len(refused), "digest": data.digest})


def finish(log: RunLog, screen: Screen) -> None:
    """Plots and the before/after table."""
    run = read_run(log.folder)
    try:
        draw_all(group_runs([run]), log.plots)
    except OSError as error:
        raise unwritable(log.folder, error) from error
    if run.summary.get("after"):
        show_table("before → after training", COMPARISON_HEADER, comparison_rows(run.summary), screen.console)
    screen.say(f"plots in {log.plots}; rest-rl report {log.folder} writes a page")

"""The verbs `train` and `sft`: a whole run, evaluated before and after, shown while it goes, kept in its folder."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from rest_rl.analyze.palette import REGION_COLOURS
from rest_rl.analyze.plots import draw_all
from rest_rl.analyze.tables import COMPARISON_HEADER, comparison_rows, flatten, group_runs, is_number
from rest_rl.config import EMBEDDED, RunConfig, apply_overrides, overridden, parse_toml, read_run_file
from rest_rl.data.samples import ToolSample, load_samples
from rest_rl.data.tool_world import SPLITS, tool_world
from rest_rl.evaluate.held_out import Prompt, evaluate
from rest_rl.formats import ToolFormat, get_format
from rest_rl.jsonl import reason
from rest_rl.response import Region, Span
from rest_rl.runlog import CONFIG, RunLog, read_run, unwritable
from rest_rl.terminal import coloured, legend, progress_bar, show_table
from rest_rl.train.policy import load_policy
from rest_rl.train.prompts import render_prompt
from rest_rl.train.run import Checkpoint, Recorder, build_trainer, find_checkpoint, quiet_libraries, trainer_config
from rest_rl.train.run import train as train_steps
from rest_rl.train.trl_trainer import ResTConfig

EXIT_INTERRUPTED = 130


class Screen:
    """Shows a run in the terminal: the bar with time left, sample responses, tables."""

    def __init__(self, console: Console, tool_format: ToolFormat, show_every: int) -> None:
        """Nothing is printed before `bar` is entered."""
        self.console, self.tool_format, self.show_every = console, tool_format, show_every
        self.weights: dict[str, float] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @contextmanager
    def bar(self, done: int, total: int) -> Iterator[None]:
        """The progress bar of the training steps."""
        with progress_bar(self.console) as progress:
            self._task = progress.add_task("", total=total, completed=done, note="")
            self._progress = progress
            yield
        self._progress = None

    def on_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Move the bar."""
        weights = {label: metrics.get(f"rest/weight/{label}") for label in REGION_COLOURS}
        self.weights = {label: float(weight) for label, weight in weights.items() if is_number(weight)}
        if self._progress is not None and self._task is not None:
            note = "  ".join(f"{name} {metrics[key]:.3f}" for key, name in SHOWN.items() if key in metrics)
            self._progress.update(self._task, completed=step, total=total, note=note)

    def on_responses(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the first response of a step now and then."""
        if not self.show_every or (step - 1) % self.show_every or not rows:
            return
        row = rows[0]
        text = str(row["response"])
        self.console.rule(f"step {step}, reward {row['reward']:.2f}", align="left", style="dim")
        self.console.print(coloured(pieces(text, self.tool_format.parse(text).spans)), soft_wrap=True)
        self.console.print(legend(self.weights))

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False)


SHOWN = {"reward": "reward", "rest/accuracy": "S_acc", "rest/format": "S_format"}
"""Metrics beside the bar."""


class Bench:
    """The policy and the held-out prompts it is measured on."""

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], config: RunConfig) -> None:
        """Bind them."""
        self.model, self.tokenizer, self.prompts, self.config = model, tokenizer, prompts, config

    def measure(self, when: str, log: RunLog, screen: Screen) -> None:
        """Evaluate once and keep the scores in the summary; a resumed run does not repeat what is there."""
        if not self.prompts or when in log.read_summary():
            return
        with screen.console.status(f"evaluating {when} training on {len(self.prompts)} held-out prompts"):
            tool_format = get_format(self.config.rest.format)
            scores = evaluate(self.model, self.tokenizer, self.prompts, tool_format, self.config.eval)
        log.update_summary(**{when: scores})


def train(arguments: argparse.Namespace) -> int:
    """Evaluate, train, evaluate again; everything lands in the run folder. Returns the exit code.

    Whatever a user can have got wrong is found before the run folder is made.
    """
    config = run_config(arguments)
    if not arguments.debug:
        quiet_libraries()
    is_first = int(os.environ.get("RANK", "0")) == 0
    screen = Screen(Console(quiet=not is_first), get_format(config.rest.format), config.run.show_every)
    args = trainer_config(config)
    samples, held_out = read_samples(config)
    model, tokenizer = load_policy(config.model)
    prompts = [
        Prompt(render_prompt(sample, tokenizer, config.rest.format), sample, split) for split, sample in held_out
    ]
    log, checkpoint = open_run(config, arguments, args, screen, enabled=is_first)
    screen.say(f"run folder {log.folder}, preset {config.rest.preset}, {len(samples)} prompts, {len(prompts)} held out")
    bench = Bench(model, tokenizer, prompts, config)
    bench.measure("before", log, screen)
    if checkpoint.is_last:
        step, (bench.model, _) = checkpoint.step, load_policy(replace(config.model, path=str(checkpoint.folder)))
    else:
        trainer, recorder = build_trainer(config, args, model, tokenizer, samples, log, screen)
        with screen.bar(checkpoint.step, args.max_steps), stopping(recorder, screen):
            step = train_steps(trainer, checkpoint, log)
        if recorder.stop_requested and step < trainer.state.max_steps:
            screen.say(f"stopped after step {step}; go on with: rest-rl train --resume --out {log.folder}")
            return EXIT_INTERRUPTED
    log.update_summary(steps=step, preset=config.rest.preset, seed=config.run.seed)
    bench.measure("after", log, screen)
    if is_first:
        finish(log, screen)
    return 0


def sft(arguments: argparse.Namespace) -> int:
    """Train the small model of the tool world from nothing and save it."""
    from rest_rl.train.sft import SftConfig
    from rest_rl.train.sft import sft as warm_start

    if not arguments.debug:
        quiet_libraries()
    changes = apply_overrides({}, arguments.set)
    warm_start(overridden(SftConfig(), changes, "sft"), Path(arguments.out), Console().print)
    return 0


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The run that was asked for; with `--resume` the one in the run folder, which the arguments may repeat."""
    asked = read_run_file(arguments.run, arguments.set)
    if arguments.out:
        asked = placed(asked, arguments.out)
    if not arguments.resume:
        return asked if arguments.run or arguments.out else placed(asked, free_folder(asked.run.out))
    recorded = Path(asked.run.out) / CONFIG
    if not recorded.is_file():
        raise ValueError(f"got --resume and {asked.run.out}, which holds no run, expected a run folder; pass its --out")
    config = placed(read_run_file(recorded), asked.run.out)
    if arguments.run or arguments.set:
        refuse_changes(parse_toml(asked.to_toml(), "the run"), parse_toml(config.to_toml(), "the run"))
    return config


def placed(config: RunConfig, out: str) -> RunConfig:
    """The same run in another folder."""
    return replace(config, run=replace(config.run, out=out))


def free_folder(out: str) -> str:
    """`out`, or `out-2`, `out-3`, ... if it holds a run already; for runs whose folder nobody chose.

    ValueError in a launch of several processes.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # each would look for a folder of its own
        raise ValueError(f"got {processes} processes without --out, expected one folder for all; pass --out DIR")
    names = chain([out], (f"{out}-{number}" for number in count(2)))
    return next(name for name in names if not (Path(name) / CONFIG).exists())


def refuse_changes(asked: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """ValueError if a resumed run is asked to be another one."""
    new, old = flatten(asked), flatten(recorded)
    changed = sorted(key for key in {*new, *old} if new.get(key) != old.get(key))
    if changed:
        raise ValueError(
            f"got --resume with another {', '.join(changed)}, expected the run as it was recorded; leave RUN.toml and "
            "--set out to go on with it, or pass another --out to start the changed run"
        )


def read_samples(config: RunConfig) -> tuple[list[ToolSample], list[tuple[str, ToolSample]]]:
    """(training samples, held-out samples with the name of their split)."""
    data, number = config.data, config.eval.prompts
    if data.path == EMBEDDED:
        unseen = {split: tool_world(config.eval.seed, number, split) for split in SPLITS if split != "train"}
        return tool_world(data.seed, data.samples), [(split, s) for split, group in unseen.items() for s in group]
    held_out = read_file(data.held_out)[:number] if data.held_out else []
    return read_file(data.path), [("held out", sample) for sample in held_out]


def read_file(path: str) -> list[ToolSample]:
    """The samples of a JSONL file; ValueError if it cannot be read."""
    try:
        return load_samples(path)
    except OSError as error:
        raise ValueError(
            f"got data {path} ({reason(error)}), expected a JSONL file of samples; check [data]"
        ) from error


def open_run(
    config: RunConfig, arguments: argparse.Namespace, args: ResTConfig, screen: Screen, *, enabled: bool
) -> tuple[RunLog, Checkpoint]:
    """A new run folder, or an old one cut back to its newest whole checkpoint."""
    if not arguments.resume:
        return RunLog.create(config.run.out, config.to_toml(), sys.argv, enabled=enabled), Checkpoint(0, None)
    checkpoint, broken = find_checkpoint(RunLog(config.run.out), args.save_steps)
    if broken:
        screen.say(f"{', '.join(broken)} is not whole and is left aside")
    screen.say(f"resuming after step {checkpoint.step}")
    log = RunLog.resume(config.run.out, checkpoint.step, is_last=checkpoint.is_last, enabled=enabled)
    return log, checkpoint


@contextmanager
def stopping(recorder: Recorder, screen: Screen) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint and an end after this step, the second one ends at once."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        if recorder.stop_requested:
            raise KeyboardInterrupt
        recorder.stop_requested = True
        screen.say("stopping after this step; once more to stop at once")

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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


def pieces(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, str]]:
    """The text cut at its spans, each piece with the label of its region."""
    end = 0
    for span in spans:
        yield text[end : span.start], Region.OTHER.label
        yield text[span.start : span.end], span.region.label
        end = span.end
    yield text[end:], Region.OTHER.label

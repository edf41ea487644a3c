"""The workflow of a training run, the same for every engine: check, open the folder, measure, train, keep, measure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Any

from datasets import disable_progress_bars

from rest_rl.config import AUTO, RunConfig, parse_toml, read_run_file
from rest_rl.data.layout import PromptLayout, resolve_format
from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError
from rest_rl.evaluate.held_out import Prompt, fixed_slice
from rest_rl.evaluate.origin import recorded_run
from rest_rl.report.diagnosis import Finding, diagnose
from rest_rl.report.plots import draw_all
from rest_rl.report.tables import (
    COMPARISON_HEADER,
    comparison_rows,
    flatten,
    group_runs,
    headline_turn,
    scores_over,
)
from rest_rl.response import TURNS, Turn
from rest_rl.runlog import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    SILENT,
    Observer,
    Row,
    RunLog,
    read_rows,
    read_run,
    unwritable,
)
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.engine import Engine
from rest_rl.train.estimate import Estimate, estimate, this_device, verdict
from rest_rl.train.policy import lora_config, model_context, policy_config, policy_tokenizer, quiet_loading
from rest_rl.train.prompts import TrainingData, read_data
from rest_rl.train.trl.settings import unread_keys, with_machine_defaults

COUNTED = 2000
"""Samples whose tokens an estimate counts."""
RunSource = RunConfig | Mapping[str, Any] | str | Path | None


@dataclass(frozen=True)
class RunResult:
    """A run that has ended; everything else is in its folder (`runlog.read_run`)."""

    folder: Path
    config: RunConfig
    steps: int
    """Finished optimizer steps."""
    is_interrupted: bool
    """Whether it was stopped before its last step; `train(..., resume=True)` goes on."""
    model: Path | None
    """Where the trained model, or its adapter, and its tokenizer lie."""
    before: Row | None
    """Scores on held-out prompts before training, as in summary.json; None without held-out prompts."""
    after: Row | None
    findings: tuple[Finding, ...]
    """What the diagnosis found in the metrics."""


@dataclass(frozen=True)
class Plan:
    """A run that has been checked as far as is possible without loading its model."""

    config: RunConfig
    layout: PromptLayout
    engine: Engine
    data: TrainingData


def train(
    run: RunSource = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    observer: Observer = SILENT,
) -> RunResult:
    """Train a model and measure it on held-out prompts before and after; everything lands in the run folder.

    Args:
        run: the run as a RunConfig, its tables, or the path of a TOML file; by default the embedded run, or one for
            your own model if `overrides` name a model or data set.
        out: the run folder, instead of `run.out`.
        resume: go on with the run in that folder; `run` may then be left out and must not differ from it.
        overrides: changes such as "trl.max_steps=10".
        observer: told of progress; by default nothing is shown.

    Raises:
        UserError: a mistake in the run, its data or its model; found before the run folder is made where possible.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    observer = observer if is_first else SILENT
    plan = make_plan(run, out=out, resume=resume, overrides=overrides, observer=observer)
    config, engine, data = plan.config, plan.engine, plan.data
    folder = Path(config.run.out)
    if resume:
        log, checkpoint = resume_folder(folder, engine, data, observer, enabled=is_first)
    else:
        checkpoint = engine.prepare(data, RunLog(folder), Checkpoint(0))
        run_file = run if isinstance(run, str | Path) else None
        log = RunLog.create(folder, config.to_toml(), sys.argv, enabled=is_first, run_file=run_file)
    what = f"preset {config.rest.preset}, {len(data.prepared)} prompts, {len(data.held_out)} held out"
    observer.say(f"run folder {folder}, {what}")
    keep_account(data, log, observer)
    engine.start(log)
    held_out = HeldOut(engine, data.held_out, config, log, observer)
    if not checkpoint.is_last:
        held_out.measure("before")
    reached = engine.run(held_out.after_step)
    if reached.is_interrupted:
        observer.say(f"stopped after step {reached.step}; go on with: rest-rl train --resume --out {folder}")
    else:
        engine.keep_model()
        log.update_summary(steps=reached.step, preset=config.rest.preset, seed=config.run.seed)
        held_out.measure("after")
        if is_first:
            finish(log, observer)
    summary, table = log.read_summary(), parse_toml(config.to_toml(), "the run")
    metrics, evaluations = read_rows(folder / METRICS), read_rows(folder / EVALUATIONS)  # none on another machine
    return RunResult(
        folder=folder,
        config=config,
        steps=reached.step,
        is_interrupted=reached.is_interrupted,
        model=log.model if log.model.exists() else None,
        before=summary.get("before"),
        after=summary.get("after"),
        findings=tuple(diagnose(metrics, evaluations, table)),
    )


def resume_folder(
    folder: Path, engine: Engine, data: TrainingData, observer: Observer, *, enabled: bool
) -> tuple[RunLog, Checkpoint]:
    """A run folder cut back to its newest whole checkpoint, once the engine is ready to go on from there."""
    log = RunLog(folder)
    check_same_data(data, log)
    checkpoint, broken = engine.resume_point(log)
    checkpoint = engine.prepare(data, log, checkpoint)
    if broken:
        observer.say(f"{', '.join(broken)} is not whole and is left aside")
    observer.say(f"resuming after step {checkpoint.step}")
    return RunLog.resume(folder, checkpoint.step, is_last=checkpoint.is_last, enabled=enabled), checkpoint


def quiet_libraries() -> None:
    """Leave the terminal to the caller: no progress bars, hints and deprecation warnings of the libraries."""
    quiet_loading()
    disable_progress_bars()


def make_plan(
    run: RunSource = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    observer: Observer = SILENT,
    is_dry: bool = False,
) -> Plan:
    """Read and check a run and its data; loads the tokenizer, writes nothing.

    A dry plan is of a run that will not begin: where nobody has named a folder it does not look for a free one.
    """
    config = resolve_run(run, out=out, resume=resume, overrides=overrides, is_dry=is_dry)
    config, layout = resolve_layout(config, observer)
    engine = make_engine(config, layout, observer, is_dry=is_dry)
    plan = Plan(config, layout, engine, read_data(config, layout, observer.say, engine.response_tokens))
    if not is_dry and config.run.engine == "trl":
        warn_of_memory(plan, observer)
    return plan


def make_engine(config: RunConfig, layout: PromptLayout, observer: Observer, *, is_dry: bool = False) -> Engine:
    """The engine that `run.engine` names; UserError for settings that it refuses."""
    if config.run.engine == "verl":
        from rest_rl.train.verl.engine import VerlEngine

        return VerlEngine(config, layout, observer)
    from rest_rl.train.trl.engine import TrlEngine

    if unread := unread_keys(config):
        observer.say(f"preset {config.rest.preset} does not read trl.{', trl.'.join(unread)}")
    return TrlEngine(config, layout, observer, is_dry=is_dry)


def estimate_run(
    run: RunSource = None,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    observer: Observer = SILENT,
) -> Estimate:
    """What `train` with these arguments would need in memory and do; writes nothing and loads no weights.

    Where there is a GPU, one forward and backward pass of random weights is measured on it.
    """
    plan = make_plan(run, out=out, overrides=overrides, observer=observer, is_dry=True)
    if plan.config.run.engine != "trl":
        raise UserError("--dry-run with the engine verl", "--print-config", "for memory see docs/cluster.md")
    return estimate_plan(plan, measure=True)


def estimate_plan(plan: Plan, *, measure: bool = False) -> Estimate:
    """What a plan for TRL needs; with `measure` a GPU that is here is asked."""
    engine: Any = plan.engine
    return estimate(
        plan.config,
        policy_config(plan.config.model),
        engine.args,
        lora=lora_config(plan.config.peft),
        prompt_tokens=engine.token_counts(plan.data.prepared[:COUNTED]),
        samples=len(plan.data.prepared),
        device=this_device(engine.args),
        measure=measure,
    )


def warn_of_memory(plan: Plan, observer: Observer) -> None:
    """Say so if the run will hardly fit; it is not refused, because the estimate is a bound."""
    try:
        word, text = verdict(estimate_plan(plan))
    except Exception:  # somebody else's architecture may not let itself be counted, and an estimate stops no run
        return
    if word == "does not fit":
        observer.say(f"warning: the run needs more memory than there is, by its estimate: {text}")


def resolve_run(
    run: RunSource, *, out: str | Path | None, resume: bool, overrides: Sequence[str], is_dry: bool = False
) -> RunConfig:
    """The run that is asked for; with `resume` the one in the run folder, which `run` and `overrides` may repeat."""
    if resume and run is None:  # overrides on their own are changes of the recorded run
        folder = Path(read_source(None, overrides).run.out if out is None else out)
        asked = in_folder(read_run_file(recorded_file(folder), overrides), folder)
    else:
        asked = read_source(run, overrides)
        asked = with_machine_defaults(asked) if asked.run.engine == "trl" else asked  # verl trains elsewhere
        asked = asked if out is None else in_folder(asked, out)
    if not resume or Path(asked.model.path).is_dir():
        path = recorded_run(asked.model.path, "model.path").path  # a run folder stands for its model
        asked = replace(asked, model=replace(asked.model, path=path))
    if not resume:
        is_chosen = run is not None or out is not None or is_dry
        return asked if is_chosen else in_folder(asked, free_folder(asked.run.out))
    folder = Path(asked.run.out)
    config = in_folder(read_run_file(recorded_file(folder)), folder)
    if asked.rest.format == AUTO:
        asked = replace(asked, rest=replace(asked.rest, format=config.rest.format))
    refuse_changes(parse_toml(asked.to_toml(), "the run"), parse_toml(config.to_toml(), "the run"))
    return config


def recorded_file(folder: Path) -> Path:
    """The run that a folder records; UserError if it holds none."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume and {folder}, which holds no run", "a run folder", "pass its --out")
    return folder / CONFIG


def read_source(run: RunSource, overrides: Iterable[str]) -> RunConfig:
    """A run from whatever describes it, with overrides."""
    if isinstance(run, RunConfig):
        return RunConfig.from_toml(run.to_toml(), overrides) if overrides else run
    if isinstance(run, Mapping):
        return RunConfig.from_tables(run, overrides)
    return read_run_file(run, overrides)


def in_folder(config: RunConfig, out: str | Path) -> RunConfig:
    """The same run in another folder."""
    return replace(config, run=replace(config.run, out=str(out)))


def free_folder(out: str) -> str:
    """`out`, or `out-2`, `out-3`, ... if it holds a run already; for runs whose folder nobody chose.

    UserError in a launch of several processes: each would find another one.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"{processes} processes without --out", "one folder for all", "pass --out DIR")
    names = chain([out], (f"{out}-{number}" for number in count(2)))
    return next(name for name in names if not (Path(name) / CONFIG).exists())


def refuse_changes(asked: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """UserError if a resumed run is asked to be another one."""
    new, old = flatten(asked), flatten(recorded)
    changed = sorted(key for key in {*new, *old} if new.get(key) != old.get(key))
    if changed:
        raise UserError(
            f"--resume with another {', '.join(changed)}",
            "the run as it was recorded",
            "leave RUN.toml and --set out to go on with it, or pass another --out to start the changed run",
        )


def resolve_layout(config: RunConfig, observer: Observer) -> tuple[RunConfig, PromptLayout]:
    """The run with its format resolved, and how prompts are laid out."""
    tokenizer, variables = policy_tokenizer(config.model), config.model.chat_template_kwargs
    name, why = resolve_format(config.rest.format, tokenizer, variables, keeps_prompts=config.data.keep_prompts)
    observer.say(f"format {name}: {why}")
    layout = PromptLayout(tokenizer, name, variables, model_context(config.model, tokenizer))
    return replace(config, rest=replace(config.rest, format=name)), layout


def check_same_data(data: TrainingData, log: RunLog) -> None:
    """UserError if a resumed run would go on with other samples than it began with."""
    recorded = log.read_summary().get("data", {})
    if recorded.get("digest", data.digest) != data.digest:
        raise UserError(
            f"--resume with other training data than the run in {log.folder} began with (then "
            f"{recorded.get('samples')} samples, now {len(data.prepared)})",
            "the same",
            "restore the file, or start anew with another --out",
        )


def keep_account(data: TrainingData, log: RunLog, observer: Observer) -> None:
    """What training was given and what not, in the run folder."""
    if refused := [row for row in data.rejected if "sample" in row]:
        first = shorten(f"{refused[0]['sample']}: {refused[0]['reason']}", 250, placeholder=" ...")
        observer.say(f"{len(refused)} of these samples cannot be laid out and are left out; the first, {first}")
    log.write_rejected(data.rejected)
    log.update_summary(data={**data.report, "refused": len(refused), "digest": data.digest})


class HeldOut:
    """Measures the policy on held-out prompts, before, after and, with `[eval] every`, during training."""

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[tuple[str, Prepared]],
        config: RunConfig,
        log: RunLog,
        observer: Observer,
    ) -> None:
        self.engine, self.log, self.observer = engine, log, observer
        self.every, self.prompts = config.eval.every, [Prompt(s.prompt_text, s.sample, split) for split, s in samples]
        self.slice = fixed_slice(self.prompts, config.eval.slice)
        steps = config.trl.get("max_steps", 0)
        if 0 < steps < self.every:
            observer.say(
                f"eval.every = {self.every} is more than the run's {steps} steps: nothing is measured in between"
            )

    def measure(self, when: str) -> None:
        """Keep the scores in the summary; a resumed run does not repeat what is there."""
        if not self.prompts or when in self.log.read_summary():
            return
        with self.observer.track(f"evaluating {when} training on {len(self.prompts)} held-out prompts"):
            scores = self.engine.evaluate(self.prompts)
        if scores is not None:
            self.log.update_summary(**{when: scores})

    def after_step(self, step: int) -> Row | None:
        """Measure the slice if the step is due: a row in the run folder, which is returned, and a line of text."""
        if not self.every or step % self.every or not self.slice:
            return None
        begin = perf_counter()
        if (scores := self.engine.evaluate(self.slice)) is None:
            return None
        row = {"step": step, **scores}
        self.log.add_evaluation(row)
        self.log.add_timing({"step": step, "evaluation_time": perf_counter() - begin})
        self.observer.say(f"step {step}: exact match {'; '.join(evaluation_texts(scores))}")
        return row


def evaluation_texts(scores: Mapping[str, Any]) -> Iterator[str]:
    """Exact match sampled and greedy in words: over call turns, then over answer turns, or over all alike."""
    turns: Sequence[Turn | None] = tuple(TURNS) if headline_turn([scores]) else (None,)
    for turn in turns:
        own = scores_over(scores, turn)
        parts = ((own, "sampled"), (own["greedy"], "greedy"))
        shown = (f"{100 * s['exact_match']:.1f} ± {100 * s['exact_match_error']:.1f} % {name}" for s, name in parts)
        yield f"{', '.join(shown)} ({own['greedy']['n']} {f'{TURNS[turn]} ' if turn else ''}held out)"


def finish(log: RunLog, observer: Observer) -> None:
    """Plots and the before/after table."""
    run = read_run(log.folder)
    try:
        draw_all(group_runs([run]), log.plots)
    except OSError as error:
        raise unwritable(log.folder, error) from error
    if run.summary.get("after"):
        observer.show_table("before → after training", COMPARISON_HEADER, comparison_rows(run.summary))
    observer.say(f"plots in {log.plots}; rest-rl report {log.folder} writes a page")

"""The workflow of a run, for every engine: check, open the run folder, evaluate, train, save the model, evaluate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Any, cast

from datasets import disable_progress_bars

from rest_rl.config import RunConfig, parse_toml, read_run_file
from rest_rl.data.layout import PromptLayout, resolve_format
from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError
from rest_rl.evaluate.held_out import (
    HeldOutPrompt,
    count_tokens,
    derive_response_limit,
    response_limit,
    select_interim_prompts,
)
from rest_rl.objects import UserObject, describe_address
from rest_rl.presets import get_origin
from rest_rl.report.diagnosis import Finding, diagnose
from rest_rl.report.plots import draw_all
from rest_rl.report.tables import BEFORE_AFTER_HEADER, before_after_rows, group_runs, headline_turn, scores_for_turn
from rest_rl.response import TURNS, Turn
from rest_rl.runlog import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    SILENT,
    Observer,
    Row,
    RunLog,
    lock_run_folder,
    read_rows,
    read_run,
    unwritable_folder_error,
)
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.duration import Amounts, Duration, Range, predict_duration
from rest_rl.train.engine import Engine
from rest_rl.train.environment import EnvironmentData, read_tasks, with_turn_weights
from rest_rl.train.estimate import Estimate, Workload, estimate_resources, find_device, judge_fit
from rest_rl.train.policy import (
    load_policy_config,
    load_policy_tokenizer,
    lora_config,
    policy_context_length,
    quiet_transformers,
    silence_transformers,
)
from rest_rl.train.prompts import TrainingData, read_data, render_gold
from rest_rl.train.request import RunSource, find_changed_keys, is_main_process, resolve_run, with_out_dir
from rest_rl.train.trl.settings import find_unread_keys, with_machine_defaults, with_whole_groups
from rest_rl.train.weighing import try_weight_rule

# An estimate counts the tokens of at most this many prompts.
MAX_COUNTED_PROMPTS = 2000
MIN_CALL_TURNS = 8


@dataclass(frozen=True)
class RunResult:
    """The main results of `train`; `runlog.read_run` reads everything else that the run recorded."""

    folder: Path
    config: RunConfig
    steps: int
    """Finished optimizer steps."""
    is_interrupted: bool
    """Whether it was stopped before its last step; `train(..., resume=True)` continues it."""
    model: Path | None
    """The folder of the trained model, or its adapter, and its tokenizer."""
    before: Row | None
    """Scores on the held-out prompts before training, as in summary.json; None without held-out prompts."""
    after: Row | None
    findings: tuple[Finding, ...]
    """Problems that the diagnosis found in the metrics."""


@dataclass(frozen=True)
class RunPlan:
    """A run with its data and engine, after all checks that do not require loading the model."""

    config: RunConfig
    layout: PromptLayout
    engine: Engine
    data: TrainingData

    def render_golds(self, limit: int | None = None) -> list[str]:
        """Return the gold responses of the training samples, or of the first `limit`."""
        return [render_gold(each.sample, self.layout) for each in self.data.prepared[:limit]]


@quiet_transformers()
def train(
    run: RunSource = None,
    *,
    env: Any = None,
    model: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    observer: Observer = SILENT,
) -> RunResult:
    """Train a model and evaluate it on held-out prompts before and after; all results go to the run folder.

    Args:
        run: a RunConfig, its tables as a mapping, or the path of a TOML file. Default: the embedded run, or default
            settings for your own model if `overrides` contain a model or data set.
        env: an environment to train in: a name or address as for `env.path`, or an object at the top level of a file.
        model: a model folder or hub name, instead of `model.path`.
        out: the run folder, instead of `run.out`.
        resume: continue the run in the run folder. `run` may be omitted; it may only increase the number of steps.
        overrides: changes such as "trl.max_steps=10".
        observer: receives messages and progress; by default nothing is shown.

    Raises:
        UserError: a mistake in the run, its data or its model; most are found before the run folder is created.
    """
    is_first = is_main_process()
    observer = observer if is_first else SILENT
    given = {"env.path": env and describe_address(env, "env"), "model.path": model and str(model)}
    overrides = [*(f"{key}={json.dumps(value)}" for key, value in given.items() if value), *overrides]
    config = resolve_run(run, out=out, resume=resume, overrides=overrides)
    folder = Path(config.run.out)
    # The order protects the run folder. A resumed run takes the folder's lock first, so that nothing it reads can
    # change. A new run creates the folder only when model and data have loaded: a failed start leaves nothing behind.
    with ExitStack() as stack:
        if resume:
            stack.enter_context(lock_run_folder(folder, observer, enabled=is_first))
        plan = plan_run(config, observer, is_new=not resume)
        config, engine, data = plan.config, plan.engine, plan.data
        if resume:
            log, checkpoint = resume_run_folder(folder, plan, observer, enabled=is_first)
        else:
            checkpoint = engine.prepare(data, RunLog(folder), Checkpoint(0))
            stack.enter_context(lock_run_folder(folder, observer, enabled=is_first))
            run_file = run if isinstance(run, str | Path) else None
            log = RunLog.create(folder, config.to_toml(), sys.argv, enabled=is_first, run_file=run_file)
        return execute(plan, log, checkpoint, observer)


def execute(plan: RunPlan, log: RunLog, checkpoint: Checkpoint, observer: Observer) -> RunResult:
    config, engine, data, folder = plan.config, plan.engine, plan.data, log.folder
    counts = f"{len(data.prepared)} training prompts, {len(data.held_out)} held-out prompts"
    observer.say(f"run folder {folder}: preset {config.rest.preset}, {counts}")
    observer.say(f"{config.rest.preset}: {get_origin(config.rest.preset)}")
    record_data(data, log, observer)
    engine.start(log)
    held_out = HeldOutEvaluator(engine, data.held_out, plan, log, observer)
    if config.eval.before and not checkpoint.is_last:
        held_out.measure("before")
    reached = engine.run(held_out.after_step)
    if reached.is_interrupted:
        observer.say(f"stopped after step {reached.step}; to continue: rest-rl train --resume --out {folder}")
    else:
        engine.save_model()
        log.update_summary(steps=reached.step, preset=config.rest.preset, seed=config.run.seed, status="evaluating")
        held_out.measure("after")
        log.update_summary(status="finished")
        if log.enabled:
            write_plots(log, observer)
    summary, table = log.read_summary(), parse_toml(config.to_toml(), "the run")
    # Both are empty on the other machines of a launch, which do not write to the run folder.
    metrics, evaluations = read_rows(folder / METRICS), read_rows(folder / EVALUATIONS)
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


# A resumed run must equal an uninterrupted one bit for bit. Data, checkpoint and model are checked first; only then are
# the folder's logs truncated to the checkpoint's step, so that a failed resume loses nothing. Steps after the
# checkpoint are trained again from its random state and produce the same rows.
def resume_run_folder(folder: Path, plan: RunPlan, observer: Observer, *, enabled: bool) -> tuple[RunLog, Checkpoint]:
    log = RunLog(folder)
    check_same_data(plan.data, log)
    checkpoint, broken = plan.engine.find_resume_point(log)
    checkpoint = plan.engine.prepare(plan.data, log, checkpoint)
    if broken:
        observer.say(f"ignoring {', '.join(broken)}: incomplete")
    observer.say(f"resuming after step {checkpoint.step}")
    changed = find_changed_keys(plan.config, with_out_dir(read_run_file(folder / CONFIG), folder))
    log = RunLog.resume(folder, checkpoint.step, is_last=checkpoint.is_last, enabled=enabled)
    if changed:
        log.change(plan.config.to_toml(), {"after_step": checkpoint.step, **changed})
        observer.say("; ".join(f"{key} was {old}, now {new}" for key, (old, new) in changed.items()))
    return log, checkpoint


def silence_libraries() -> None:
    """Turn off the progress bars, hints and deprecation warnings of transformers and datasets."""
    silence_transformers()
    disable_progress_bars()


def make_plan(
    run: RunSource = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    observer: Observer = SILENT,
    is_dry: bool = False,
) -> RunPlan:
    """Read and check a run and its data; this loads the tokenizer but no model, and writes nothing.

    With `is_dry`, the run folder may exist and vLLM need not be installed, because the run will not start.
    """
    config = resolve_run(run, out=out, resume=resume, overrides=overrides, is_dry=is_dry)
    return plan_run(config, observer, is_new=not resume, is_dry=is_dry)


def plan_run(config: RunConfig, observer: Observer, *, is_new: bool, is_dry: bool = False) -> RunPlan:
    if is_new and config.run.engine == "trl":  # verl trains on other machines
        config = with_whole_groups(with_machine_defaults(config, observer), observer)
    config = with_turn_weights(config)
    has_own_limit = config.trl.get("max_completion_length") != 0
    config, layout = resolve_layout(config, observer)
    rule = None if config.rest.is_supervised else config.rest.resolve().weights
    if isinstance(rule, UserObject):
        try_weight_rule(rule, layout.tokenizer, layout.format)
    engine = make_engine(config, layout, observer, is_dry=is_dry)
    data = (
        read_tasks(config, layout, observer)
        if config.env.path
        else read_data(config, layout, observer, engine.max_response_tokens)
    )
    plan = RunPlan(config, layout, engine, data)
    if not has_own_limit:
        plan = with_derived_limit(plan, observer, is_dry=is_dry)
    if is_new and config.run.engine == "trl":
        plan = with_checkpointing(plan, observer, is_dry=is_dry)
    if not is_dry and config.run.engine == "trl":
        warn_about_memory(plan, observer)
    return plan


def change_trl(plan: RunPlan, *, is_dry: bool, **changes: Any) -> RunPlan:
    config, engine = replace(plan.config, trl={**plan.config.trl, **changes}), cast(Any, plan.engine)
    changed: Any = make_engine(config, plan.layout, SILENT, is_dry=is_dry)  # it repeats no message about the settings
    changed.observer = engine.observer
    return replace(plan, config=config, engine=changed)


# The limit so far left room for the longest response that a 0 may stand for. It decides which prompts are too long,
# so that the data is the same in `rest-rl data check --model`.
def with_derived_limit(plan: RunPlan, observer: Observer, *, is_dry: bool) -> RunPlan:
    """Return the run with `trl.max_completion_length` derived from the gold responses of its training data."""
    limit = derive_response_limit(plan.render_golds(), plan.layout, plan.config.max_response_tokens)
    why = "the model was trained to reason" if plan.layout.expects_reasoning else "from the longest gold response"
    observer.say(f"trl.max_completion_length = {limit} ({why})")
    return change_trl(plan, is_dry=is_dry, max_completion_length=limit)


# TRL's default, checkpointing, computes every layer's activations twice to save memory.
def with_checkpointing(plan: RunPlan, observer: Observer, *, is_dry: bool) -> RunPlan:
    """Return the run without gradient checkpointing if it then fits the memory; unchanged if set, or on a GPU."""
    engine: Any = plan.engine
    is_set = any(key in plan.config.trl for key in ("gradient_checkpointing", "activation_checkpointing"))
    if is_set or not engine.args.use_cpu or getattr(engine.args, "use_vllm", False):
        return plan
    plain = change_trl(plan, is_dry=is_dry, gradient_checkpointing=False)
    try:
        verdict, text = judge_fit(estimate_plan(plain))
    except Exception:  # as in `warn_about_memory`
        return plan
    if verdict == "does not fit":
        observer.say(f"trl.gradient_checkpointing = true: without it, the run {text.partition(';')[0]}")
        return change_trl(plan, is_dry=is_dry, gradient_checkpointing=True)
    observer.say("trl.gradient_checkpointing = false: the activations fit the memory, and training is faster")
    return plain


def make_engine(config: RunConfig, layout: PromptLayout, observer: Observer, *, is_dry: bool = False) -> Engine:
    """Return the engine that `run.engine` names; UserError for settings that it rejects."""
    if config.run.engine == "verl":
        from rest_rl.train.verl.engine import VerlEngine

        return VerlEngine(config, layout, observer)
    from rest_rl.train.trl.engine import TrlEngine

    if unread := find_unread_keys(config):
        observer.say(f"preset {config.rest.preset} ignores trl.{', trl.'.join(unread)}")
    return TrlEngine(config, layout, observer, is_dry=is_dry)


def estimate_run(
    run: RunSource = None, *, out: str | Path | None = None, overrides: Sequence[str] = (), observer: Observer = SILENT
) -> Estimate:
    """Estimate the memory and work of `train` with the same arguments; leave nothing behind.

    On a GPU, this measures one forward and backward pass of the model with random weights. On a CPU, it loads the model
    and predicts the run's duration from one micro-step, if the run fits the memory.
    """
    plan = make_plan(run, out=out, overrides=overrides, observer=observer, is_dry=True)
    if isinstance(plan.data, EnvironmentData):
        mean, most = predict_turns(plan)
        why = "as in gold paths" if plan.data.gold_turns else "env.turns, because there are no gold calls"
        observer.say(f"the duration counts {mean:.3g} turns per rollout, the memory {most} ({why})")
    if plan.config.run.engine != "trl":
        remedy = "use --print-config; docs/cluster.md has notes on memory"
        raise UserError("--dry-run does not support verl", remedy=remedy)
    estimate, engine = estimate_plan(plan, measure=True), cast(Any, plan.engine)
    if not estimate.device or estimate.device.is_gpu or judge_fit(estimate)[0] != "fits" or engine.args.world_size > 1:
        return estimate
    try:
        with observer.track("measuring one micro-step on the CPU"):
            return replace(estimate, duration=predict_plan(plan, estimate.work))
    except (UserError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch's error on a CPU
            raise
        observer.say(f"the duration cannot be predicted: {error!s:.300}")
        return estimate


def predict_plan(plan: RunPlan, work: Workload) -> Duration:
    """Predict the duration of a run on TRL on this machine's CPU; this loads the model and runs one micro-step."""
    from rest_rl.train.trl.timing import measure_costs
    from rest_rl.train.trl.trainer import optimizer_steps_per_batch

    config, layout, held_out, table = plan.config, plan.layout, plan.data.held_out, plan.config.eval
    engine: Any = plan.engine
    tokens, golds = Range(0, 0), plan.render_golds(MAX_COUNTED_PROMPTS)
    if not config.rest.is_supervised:
        tokens = predict_lengths(golds, layout, work.prompts, engine.args.max_completion_length)
    golds = [render_gold(each.sample, layout) for _, each in held_out]
    interim = work.steps // table.every * min(1, table.interim_prompts / len(held_out)) if table.every else 0
    amounts = Amounts(
        tokens=tokens,
        steps_per_batch=optimizer_steps_per_batch(engine.args),
        micro_batches=engine.args.gradient_accumulation_steps,
        steps=work.steps,
        held_out_tokens=predict_lengths(golds, layout, table.batch_size, response_limit(config, golds, layout)),
        held_out_batches=-(-len(held_out) // table.batch_size),
        evaluations=1 + config.eval.before + interim,
        turns=predict_turns(plan)[0],
    )
    return predict_duration(measure_costs(config, layout, plan.data, max(1, int(tokens.low))), amounts)


def predict_turns(plan: RunPlan) -> tuple[float, int]:
    """Return the mean and the most turns of a rollout: those of gold, or the limit if there are no gold calls."""
    if isinstance(plan.data, EnvironmentData):
        turns = plan.data.gold_turns or (plan.config.env.turns,)
        return sum(turns) / len(turns), max(turns)
    return 1.0, 1


# A batch takes as long as its longest response. Of the gold responses to `number` prompts, the longest one is about the
# quantile number / (number + 1) of all; one token more ends it.
def predict_lengths(golds: Sequence[str], layout: PromptLayout, number: int, limit: int) -> Range:
    """Return the tokens of a batch's longest response: as in gold, and with the response limit."""
    lengths = sorted(count_tokens(golds, layout.tokenizer)) or [0]
    return Range(min(limit, 1 + lengths[len(lengths) * number // (number + 1)]), limit)


def estimate_plan(plan: RunPlan, *, measure: bool = False) -> Estimate:
    """Estimate a run on TRL; with `measure`, run a forward and backward pass on this machine's GPU."""
    engine, config = cast(Any, plan.engine), plan.config
    golds = [render_gold(each.sample, plan.layout) for _, each in plan.data.held_out]
    limit = response_limit(config, golds, plan.layout)  # that of the evaluations
    return estimate_resources(
        replace(config, eval=replace(config.eval, max_new_tokens=limit)),
        load_policy_config(plan.config.model),
        engine.args,
        lora=lora_config(plan.config.peft),
        prompt_tokens=engine.count_tokens(plan.data.prepared[:MAX_COUNTED_PROMPTS]),
        samples=len(plan.data.prepared),
        turns=predict_turns(plan)[1],
        device=find_device(engine.args),
        measure=measure,
    )


# The estimate is mostly an upper bound, so a run that seems too large gets a warning and starts.
def warn_about_memory(plan: RunPlan, observer: Observer) -> None:
    try:
        verdict, text = judge_fit(estimate_plan(plan))
    except Exception:  # remote code may not build on the meta device; a failed estimate must not stop the run
        return
    if verdict == "does not fit":
        observer.say(f"warning: the run may run out of memory: {text}")


def resolve_layout(config: RunConfig, observer: Observer) -> tuple[RunConfig, PromptLayout]:
    """Return the run with its automatic settings (format, response limit) resolved, and its prompt layout."""
    tokenizer, variables = load_policy_tokenizer(config.model, observer), config.model.chat_template_kwargs
    name, why = resolve_format(config.rest.format, tokenizer, variables, keeps_prompts=config.data.keep_prompts)
    observer.say(f"format {name}: {why}")
    layout = PromptLayout(tokenizer, name, variables, policy_context_length(config.model, tokenizer))
    config = config.with_response_limit(layout.context)
    return replace(config, rest=replace(config.rest, format=name)), layout


def check_same_data(data: TrainingData, log: RunLog) -> None:
    recorded = log.read_summary().get("data", {})
    if recorded.get("digest", data.digest) != data.digest:
        raise UserError(
            f"the training data has changed since the run in {log.folder} started "
            f"({recorded.get('samples')} samples then, {len(data.prepared)} now)",
            remedy="restore the file, or start a new run with another --out",
        )


def record_data(data: TrainingData, log: RunLog, observer: Observer) -> None:
    if refused := [row for row in data.rejected if "sample" in row]:
        first = shorten(f"{refused[0]['sample']}: {refused[0]['reason']}", 250, placeholder=" ...")
        observer.say(f"{len(refused)} of these samples cannot be used and are left out; the first, {first}")
    log.write_rejected(data.rejected)
    log.update_summary(data={**data.report, "refused": len(refused), "digest": data.digest})


class HeldOutEvaluator:
    """Evaluates the policy on held-out prompts: before and after training and, if `eval.every` is set, during it."""

    def __init__(
        self, engine: Engine, samples: Sequence[tuple[str, Prepared]], plan: RunPlan, log: RunLog, observer: Observer
    ) -> None:
        config, layout = plan.config, plan.layout
        self.engine, self.log, self.observer = engine, log, observer
        limit = response_limit(config, [render_gold(sample.sample, layout) for _, sample in samples], layout)
        self.every, self.is_supervised = config.eval.every, config.rest.is_supervised
        room = layout.context or sys.maxsize
        self.prompts = [
            HeldOutPrompt(s.prompt_text, s.sample, split, min(limit, room - len(s.prompt_ids))) for split, s in samples
        ]
        self.slice = select_interim_prompts(self.prompts, config.eval.interim_prompts)
        steps = config.trl.get("max_steps", 0)
        if 0 < steps < self.every:
            observer.say(f"eval.every is {self.every}, but the run has {steps} steps: no interim evaluation")

    def measure(self, when: str) -> None:
        """Evaluate on all prompts and write the scores to the summary under `when` ("before" or "after") if missing."""
        if not self.prompts or when in self.log.read_summary():
            return
        scores = self.engine.evaluate(self.prompts)
        if scores is not None:
            self.log.update_summary(**{when: scores})
            if when == "before" and not self.is_supervised and (warning := find_missing_format(scores)):
                self.observer.say(warning)

    def after_step(self, step: int) -> Row | None:
        """Evaluate on the interim prompts every `eval.every` steps; return the row for the run folder, else None."""
        if not self.every or step % self.every or not self.slice:
            return None
        begin = perf_counter()
        if (scores := self.engine.evaluate(self.slice)) is None:
            return None
        row = {"step": step, **scores}
        self.log.add_evaluation(row)
        self.log.add_timing({"step": step, "evaluation_time": perf_counter() - begin})
        self.observer.say(f"step {step}: exact match {'; '.join(format_scores(scores))}")
        return row


def find_missing_format(scores: Mapping[str, Any]) -> str | None:
    """Return a warning if no response to a held-out call turn, greedy or sampled, is in the format; else None."""
    both = [own.get("calls", {}) for own in (scores, scores.get("greedy", {}))]
    if not all(own.get("n", 0) >= MIN_CALL_TURNS and own["s_format"] == 0 for own in both):
        return None
    unread = max(own.get("unread_calls", 0) for own in both)
    form = f" ({100 * unread:.0f}% of the responses are calls as JSON in another form)" if unread else ""
    return (
        f"warning: the model wrote no readable call on any of {both[0]['n']} held-out call turns{form}. Reinforcement "
        "learning has nothing to start from: stop, and train the model on the gold responses first (rest-rl sft)"
    )


# Greedy and sampled exact match with their standard errors: for call turns, then for answer turns, or for all turns.
def format_scores(scores: Mapping[str, Any]) -> Iterator[str]:
    turns: Sequence[Turn | None] = tuple(TURNS) if headline_turn([scores]) else (None,)
    for turn in turns:
        own = scores_for_turn(scores, turn)
        parts = ((own["greedy"], "greedy"), (own, "sampled at T = 1"))
        shown = (f"{100 * s['exact_match']:.1f} ± {100 * s['exact_match_error']:.1f} % {name}" for s, name in parts)
        yield f"{', '.join(shown)} ({own['greedy']['n']} held-out {TURNS[turn] if turn else 'prompts'})"


def write_plots(log: RunLog, observer: Observer) -> None:
    run = read_run(log.folder)
    try:
        draw_all(group_runs([run]), log.plots)
    except OSError as error:
        raise unwritable_folder_error(log.folder, error) from error
    if run.summary.get("after"):
        observer.show_table("before → after training", BEFORE_AFTER_HEADER, before_after_rows(run.summary))
    observer.say(f"plots are in {log.plots}; rest-rl report {log.folder} writes a report")

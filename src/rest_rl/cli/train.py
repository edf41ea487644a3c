"""The verbs `train` and `sft`: a whole run, evaluated before and after, shown while it goes, kept in its folder."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from rest_rl.cli.terminal import Screen, show_estimate, show_table
from rest_rl.config import AUTO, RunConfig, parse_toml, read_run_file
from rest_rl.data.layout import PromptLayout, resolve_format
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError
from rest_rl.evaluate.held_out import Prompt, evaluate, fixed_slice
from rest_rl.presets import SUPERVISED
from rest_rl.report.plots import draw_all
from rest_rl.report.tables import COMPARISON_HEADER, comparison_rows, flatten, group_runs
from rest_rl.runlog import CONFIG, RunLog, read_run, unwritable
from rest_rl.train.checkpoints import Checkpoint, find_checkpoint
from rest_rl.train.footprint import estimate, footprint_rows, this_device
from rest_rl.train.policy import load_policy, lora_config, policy_config, policy_tokenizer
from rest_rl.train.prompts import TrainingData, read_data
from rest_rl.train.run import (
    EveryNSteps,
    Recorder,
    build_trainer,
    is_sharded,
    quiet_libraries,
    save_policy,
    trainer_config,
    unread_keys,
    with_machine_defaults,
)
from rest_rl.train.run import train as train_steps
from rest_rl.train.sft import labelled_dataset
from rest_rl.train.verl.overrides import verl_change

EXIT_INTERRUPTED = 130


def check_same_data(data: TrainingData, log: RunLog) -> None:
    """ValueError if a resumed run would go on with other samples than it began with."""
    recorded = log.read_summary().get("data", {})
    if recorded.get("digest", data.digest) != data.digest:
        raise UserError(
            f"--resume with other training data than the run in {log.folder} began with (then "
            f"{recorded.get('samples')} samples, now {len(data.samples)})",
            "the same",
            "restore the file, or start anew with another --out",
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


MEASURED = 2000
"""Samples whose tokens a dry run counts."""


class Bench:
    """The policy and the held-out prompts it is measured on."""

    def __init__(
        self, model: Any, layout: PromptLayout, held_out: Sequence[tuple[str, ToolSample]], config: RunConfig
    ) -> None:
        """Lay the held-out prompts out."""
        self.model, self.layout, self.config = model, layout, config
        self.prompts = [Prompt(layout.render(sample), sample, split) for split, sample in held_out]

    def measure(self, when: str, log: RunLog, screen: Screen) -> None:
        """Evaluate once and keep the scores in the summary; a resumed run does not repeat what is there."""
        if not self.prompts or when in log.read_summary():
            return
        with screen.console.status(f"evaluating {when} training on {len(self.prompts)} held-out prompts"):
            scores = evaluate(self.model, self.layout.tokenizer, self.prompts, self.layout.format, self.config.eval)
        log.update_summary(**{when: scores})

    def measure_slice(self, step: int, log: RunLog, screen: Screen) -> None:
        """Evaluate on the slice during training: a row in the run folder, a line in the terminal."""
        if not (prompts := fixed_slice(self.prompts, self.config.eval.slice)):
            return
        begin = perf_counter()
        scores = evaluate(self.model, self.layout.tokenizer, prompts, self.layout.format, self.config.eval)
        log.add_evaluation({"step": step, **scores})
        log.add_timing({"step": step, "evaluation_time": perf_counter() - begin})
        parts = ((scores, "sampled"), (scores["greedy"], "greedy"))
        shown = (f"{100 * s['exact_match']:.1f} ± {100 * s['exact_match_error']:.1f} % {name}" for s, name in parts)
        screen.say(f"step {step}: exact match {', '.join(shown)} ({len(prompts)} held out)")

    def watch(self, steps: int, log: RunLog, screen: Screen) -> list[EveryNSteps]:
        """The callbacks that measure during a training of `steps`, if known; none unless `[eval] every` asks for it."""
        every = self.config.eval.every
        if 0 < steps < every:
            screen.say(f"eval.every = {every} is more than the run's {steps} steps: nothing is measured in between")
        return [EveryNSteps(every, lambda step: self.measure_slice(step, log, screen))] if every else []


def train(arguments: argparse.Namespace) -> int:
    """Evaluate, train, evaluate again; everything lands in the run folder. Returns the exit code.

    Whatever a user can have got wrong is found before the run folder is made.
    """
    if not arguments.debug:
        quiet_libraries()
    is_first = int(os.environ.get("RANK", "0")) == 0
    console = Console(quiet=not is_first, stderr=arguments.print_config)  # the configuration has the output to itself
    config, layout = laid_out(run_config(arguments), console)
    screen = Screen(console, config.run.show_every, layout.format.parse)
    if config.run.engine == "verl":
        from rest_rl.cli.verl import train_on_verl

        return train_on_verl(arguments, config, layout, screen)
    if arguments.nodes or arguments.gpus_per_node or arguments.overrides or arguments.print_config:
        raise UserError(
            "--nodes, --gpus-per-node, --print-config or settings after -- with the engine trl",
            "--engine verl with them",
            "on several GPUs TRL runs under accelerate launch (docs/training.md)",
        )
    args = trainer_config(config)
    data = read_data(config, layout, screen.say)
    if arguments.dry_run:
        return dry_run(config, args, layout, data, console)
    if arguments.resume:
        check_same_data(data, RunLog(config.run.out))
    model, _ = load_policy(replace(config.model, dtype=config.weights_dtype), config.peft)
    bench = Bench(model, layout, data.held_out, config)
    log, checkpoint = open_run(config, arguments, args, screen, enabled=is_first)
    what = f"preset {config.rest.preset}, {len(data.samples)} prompts, {len(bench.prompts)} held out"
    screen.say(f"run folder {log.folder}, {what}")
    if checkpoint.is_last:
        step = keep_last(checkpoint, bench, log)
    else:
        watching = bench.watch(args.max_steps, log, screen)
        trainer, recorder = build_trainer(config, args, model, layout, data.samples, log, screen, data.refuse, watching)
        keep_account(data, log, screen)
        if is_sharded(trainer):
            screen.say(
                "the model is sharded: it is not evaluated in the run; evaluate its model folder when it is done"
            )
            bench.prompts = []
        bench.model = trainer.model
        bench.measure("before", log, screen)
        with screen.bar(checkpoint.step, args.max_steps), stopping(recorder, screen):
            step = train_steps(trainer, checkpoint, log)
        if recorder.stop_requested and step < trainer.state.max_steps:
            screen.say(f"stopped after step {step}; go on with: rest-rl train --resume --out {log.folder}")
            return EXIT_INTERRUPTED
        save_policy(trainer, log)
    log.update_summary(steps=step, preset=config.rest.preset, seed=config.run.seed)
    bench.measure("after", log, screen)
    if is_first:
        finish(log, screen)
    return 0


def laid_out(config: RunConfig, console: Console) -> tuple[RunConfig, PromptLayout]:
    """The run with its format resolved, which is said aloud, and how prompts are laid out."""
    tokenizer = policy_tokenizer(config.model)
    variables = config.model.chat_template_kwargs
    name, why = resolve_format(config.rest.format, tokenizer, variables, keeps_prompts=config.data.keep_prompts)
    console.print(f"format {name}: {why}", highlight=False)
    if unread := unread_keys(config):
        console.print(f"preset {config.rest.preset} does not read trl.{', trl.'.join(unread)}", highlight=False)
    return replace(config, rest=replace(config.rest, format=name)), PromptLayout(tokenizer, name, variables)


def keep_last(checkpoint: Checkpoint, bench: Bench, log: RunLog) -> int:
    """Finish a run that was killed after its last step: keep its model and measure that; returns the step."""
    assert checkpoint.folder is not None
    log.keep_model(checkpoint.folder)
    if bench.prompts:
        table = replace(bench.config.model, path=str(checkpoint.folder), dtype=bench.config.weights_dtype)
        model, _ = load_policy(table, bench.config.peft)
        bench.model = model.to(torch.accelerator.current_accelerator() or "cpu")
    return checkpoint.step


def sft(arguments: argparse.Namespace) -> int:
    """Supervised training: `train` with the preset `sft` unless another is given."""
    asked = (arguments.run, arguments.model, arguments.data, arguments.preset, arguments.format, arguments.lora)
    of_verl = (arguments.engine, arguments.nodes, arguments.gpus_per_node, arguments.print_config, arguments.overrides)
    if not any((*asked, *of_verl, arguments.resume, arguments.dry_run)):
        raise UserError(
            "sft without anything to train",
            "--model, --data or a run file",
            "the embedded model is made by `python -m research.warm_start` in a checkout of the repository",
        )
    in_file = arguments.run and read_run_file(arguments.run, arguments.set).rest.is_supervised
    if not (arguments.preset or in_file or arguments.resume):
        arguments.preset = "sft"
    return train(arguments)


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The run that was asked for; with `--resume` the one in the run folder, which the arguments may repeat."""
    overrides = [*shorthands(arguments), *arguments.set]
    asked = read_run_file(arguments.run, overrides)
    asked = with_machine_defaults(asked) if asked.run.engine == "trl" else asked  # verl trains elsewhere
    if arguments.out:
        asked = placed(asked, arguments.out)
    if not arguments.resume:
        return (
            asked if arguments.run or arguments.out or arguments.dry_run else placed(asked, free_folder(asked.run.out))
        )
    recorded = Path(asked.run.out) / CONFIG
    if not recorded.is_file():
        raise UserError(f"--resume and {asked.run.out}, which holds no run", "a run folder", "pass its --out")
    config = placed(read_run_file(recorded), asked.run.out)
    if not arguments.run:  # options alone stand for changes of the recorded run
        asked = placed(read_run_file(recorded, overrides), asked.run.out)
    if asked.rest.format == AUTO:
        asked = replace(asked, rest=replace(asked.rest, format=config.rest.format))
    refuse_changes(parse_toml(asked.to_toml(), "the run"), parse_toml(config.to_toml(), "the run"))
    return config


def shorthands(arguments: argparse.Namespace) -> list[str]:
    """The options that stand for a `--set`."""
    keys = {
        "model": "model.path",
        "data": "data.path",
        "preset": "rest.preset",
        "format": "rest.format",
        "engine": "run.engine",
    }
    given = [(key, getattr(arguments, name)) for name, key in keys.items()]
    texts = [f"{key}={json.dumps(str(value))}" for key, value in given if value is not None]
    texts += verl_overrides(arguments)
    if arguments.lora is None:
        return texts
    # adapters take about ten times the rate of full fine-tuning, which the run files of one's own model are for
    rate = "1e-4" if arguments.preset in SUPERVISED else "1e-5"
    is_own = (arguments.model or arguments.data) and not (arguments.run or arguments.resume)
    return [*texts, f"peft.r={arguments.lora}", *([f"trl.learning_rate={rate}"] if is_own else [])]


def verl_overrides(arguments: argparse.Namespace) -> list[str]:
    """`--nodes`, `--gpus-per-node` and what stands after `--`, as changes of `[verl]`."""
    sizes = {"nnodes": arguments.nodes, "n_gpus_per_node": arguments.gpus_per_node}
    texts = [f"verl.trainer.{key}={value}" for key, value in sizes.items() if value is not None]
    return texts + [verl_change(override) for override in arguments.overrides]


def placed(config: RunConfig, out: str) -> RunConfig:
    """The same run in another folder."""
    return replace(config, run=replace(config.run, out=out))


def free_folder(out: str) -> str:
    """`out`, or `out-2`, `out-3`, ... if it holds a run already; for runs whose folder nobody chose.

    ValueError in a launch of several processes.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # each would look for a folder of its own
        raise UserError(f"{processes} processes without --out", "one folder for all", "pass --out DIR")
    names = chain([out], (f"{out}-{number}" for number in count(2)))
    return next(name for name in names if not (Path(name) / CONFIG).exists())


def refuse_changes(asked: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """ValueError if a resumed run is asked to be another one."""
    new, old = flatten(asked), flatten(recorded)
    changed = sorted(key for key in {*new, *old} if new.get(key) != old.get(key))
    if changed:
        raise UserError(
            f"--resume with another {', '.join(changed)}",
            "the run as it was recorded",
            "leave RUN.toml and --set out to go on with it, or pass another --out to start the changed run",
        )


def dry_run(config: RunConfig, args: Any, layout: PromptLayout, data: TrainingData, console: Console) -> int:
    """What the run would need and do, without loading weights."""
    footprint = estimate(
        config,
        policy_config(config.model),
        args,
        lora=lora_config(config.peft),
        prompt_tokens=token_counts(config, layout, data.samples[:MEASURED]),
        device=this_device(),
    )
    title = f"{config.model.path}, preset {config.rest.preset}, {len(data.samples)} samples"
    show_estimate(title, footprint_rows(footprint), console)
    return 0


def token_counts(config: RunConfig, layout: PromptLayout, samples: Sequence[ToolSample]) -> list[int]:
    """Tokens of each prompt, in supervised training with its demonstration."""
    if not config.rest.is_supervised:
        return [layout.count_tokens(sample) for sample in samples]
    return [len(row) for row in labelled_dataset(samples, layout, lambda sample, error: None)["input_ids"]]


def open_run(
    config: RunConfig, arguments: argparse.Namespace, args: Any, screen: Screen, *, enabled: bool
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

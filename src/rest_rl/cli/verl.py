"""`rest-rl train --engine verl`: the same run file on a Ray cluster, shown and kept like any other run."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from rest_rl.cli.terminal import Screen
from rest_rl.cli.train import EXIT_INTERRUPTED, check_same_data, finish, keep_account
from rest_rl.config import RunConfig, parse_toml
from rest_rl.data.layout import PromptLayout
from rest_rl.errors import UserError
from rest_rl.runlog import EVALUATIONS, METRICS, RunLog, read_rows, unwritable
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.policy import base_and_adapter
from rest_rl.train.prompts import TrainingData, read_data
from rest_rl.train.verl.config import VerlJob, as_yaml, compose_config, unread_trl
from rest_rl.train.verl.follow import Follower, following
from rest_rl.train.verl.launch import (
    FILES,
    HELD_OUT_FILE,
    LOOPS_FILE,
    TOKENIZER,
    TRAIN_FILE,
    find_verl_checkpoint,
    require_verl,
    run_on_ray,
    total_steps,
    write_agent_loops,
    write_prompts,
    write_tokenizer,
)
from rest_rl.train.verl.model import merge_model

LOG = "verl.log"
"""The file of the run folder that takes what verl, Ray and their workers print."""


def train_on_verl(arguments: argparse.Namespace, config: RunConfig, layout: PromptLayout, screen: Screen) -> int:
    """Train on the Ray that is there or on one of this machine's own; returns the exit code.

    Whatever a user can have got wrong is found before the run folder is made and before Ray is asked for anything.
    """
    if arguments.dry_run:
        raise UserError("--dry-run with the engine verl", "--print-config", "for memory see docs/cluster.md")
    require_verl()
    say_unread(config, screen)
    data = read_data(config, layout, screen.say)
    log = RunLog(Path(config.run.out).absolute())
    if arguments.resume:
        check_same_data(data, log)
    checkpoint, broken = find_verl_checkpoint(log) if arguments.resume else (Checkpoint(0), [])
    with TemporaryDirectory() as scratch:
        job = prepare(config, layout, data, log, checkpoint, Path(scratch))
        verl = compose_config(config, job)
        if arguments.print_config:
            print(as_yaml(verl))
            return 0
        total = total_steps(verl, job.num_train)
        checkpoint = checkpoint._replace(is_last=checkpoint.step >= total)
        log = open_run(config, log, checkpoint, resume=arguments.resume)
        place_files(Path(scratch), log)
    if broken:
        screen.say(f"{', '.join(broken)} is not whole and is left aside")
    if arguments.resume:
        screen.say(f"resuming after step {checkpoint.step}")
    what = f"preset {config.rest.preset}, {job.num_train} prompts, {len(data.held_out)} held out"
    screen.say(f"run folder {log.folder}, {what}; what verl prints is in {LOG}")
    keep_account(data, log, screen)
    verl.trainer.val_before_train = is_unmeasured(log, verl, checkpoint)
    is_needed = not checkpoint.is_last or verl.trainer.val_before_train
    if is_needed and not train_steps(config, verl, log, screen, checkpoint.step, total):
        return EXIT_INTERRUPTED
    if not log.model.exists():
        with screen.console.status("putting the model together"):
            merge_model(
                log.checkpoints / f"global_step_{total}",
                verl.actor_rollout_ref.actor.strategy,
                log.model,
                base=job.model,
                trust_remote_code=config.model.trust_remote_code,
            )
    log.update_summary(steps=total, preset=config.rest.preset, seed=config.run.seed)
    finish(log, screen)
    return 0


def say_unread(config: RunConfig, screen: Screen) -> None:
    """Name the settings of TRL that this engine does not read."""
    if unread := unread_trl(config):
        screen.say(f"the engine verl does not read trl.{', trl.'.join(unread)}")


def prepare(
    config: RunConfig, layout: PromptLayout, data: TrainingData, log: RunLog, checkpoint: Checkpoint, scratch: Path
) -> VerlJob:
    """Write what verl reads to `scratch`; the job names the files as they will lie in the run folder."""
    train = write_prompts([("train", sample) for sample in data.samples], layout, scratch / TRAIN_FILE, data.refuse)
    held_out = write_prompts(data.held_out, layout, scratch / HELD_OUT_FILE) if data.held_out else None
    write_agent_loops(scratch)
    write_tokenizer(layout.tokenizer, scratch)
    model, adapter = base_and_adapter(config.model)
    if adapter is not None:
        raise UserError(
            f"the adapter {adapter} with the engine verl",
            "a whole model",
            "merge it first, or train it with the engine trl",
        )
    files = log.folder / FILES
    return VerlJob(
        folder=log.folder,
        train_file=files / TRAIN_FILE,
        held_out_file=files / HELD_OUT_FILE if held_out else None,
        num_train=train.rows,
        prompt_tokens=max(train.tokens, held_out.tokens if held_out else 0),
        model=str(Path(model).absolute() if Path(model).is_dir() else model),
        resume_from=checkpoint.folder,
        agent_loops=files / LOOPS_FILE,
        tokenizer=str(files / TOKENIZER),
    )


def is_unmeasured(log: RunLog, verl: Any, checkpoint: Checkpoint) -> bool:
    """Whether the held-out prompts are to be measured before the first step, or were not at the step of a checkpoint.

    verl measures after it has saved: a run that is killed in between has a checkpoint and no measurement of it.
    """
    every, summary = verl.trainer.test_freq, log.read_summary()
    if every <= 0 and not verl.trainer.val_before_train:
        return False
    if checkpoint.step == 0:
        return bool(verl.trainer.val_before_train) and "before" not in summary
    if checkpoint.is_last:
        return "after" not in summary
    measured = {row.get("step") for row in read_rows(log.folder / EVALUATIONS)}
    return checkpoint.step % every == 0 and checkpoint.step not in measured


def open_run(config: RunConfig, log: RunLog, checkpoint: Checkpoint, *, resume: bool) -> RunLog:
    """A new run folder, or an old one cut back to its newest whole checkpoint."""
    if resume:
        return RunLog.resume(log.folder, checkpoint.step, is_last=checkpoint.is_last)
    return RunLog.create(log.folder, config.to_toml(), sys.argv)


def place_files(scratch: Path, log: RunLog) -> None:
    """Put what verl reads into the run folder, which every machine of the cluster must see."""
    target = log.folder / FILES
    shutil.rmtree(target, ignore_errors=True)
    try:
        shutil.copytree(scratch, target)
    except OSError as error:
        raise unwritable(log.folder, error) from error


def train_steps(config: RunConfig, verl: Any, log: RunLog, screen: Screen, done: int, total: int) -> bool:
    """Run verl from step `done` to `total`; False if it was interrupted. ValueError for whatever else stopped it."""
    follower = Follower(log, screen, parse_toml(config.to_toml(), "the run"), total)
    again = f"go on with: rest-rl train --resume --out {log.folder}"
    try:
        with screen.bar(done, total), following(follower.look), printing_to(log.folder / LOG, screen.console):
            run_on_ray(verl)
    except (KeyboardInterrupt, SystemExit):  # Ray makes the latter of SIGTERM
        screen.say(f"stopped; {again}")
        return False
    except Exception as error:  # Ray wraps whatever a worker raised
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise ValueError(f"the run stopped on verl: {last.strip():.500}; see {log.folder / LOG}; {again}") from error
    reached = max((row["step"] for row in read_rows(log.folder / METRICS)), default=0)
    if reached < total:
        raise ValueError(f"the run ended on verl after step {reached} of {total}; see {log.folder / LOG}; {again}")
    return True


@contextmanager
def printing_to(path: Path, console: Console) -> Iterator[None]:
    """Let everything but the console print to a file."""
    console.file = console.file  # and not whatever sys.stdout is in the block
    with path.open("a", encoding="utf-8", errors="replace") as file, redirect_stdout(file), redirect_stderr(file):
        yield

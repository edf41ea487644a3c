"""The verbs `train` and `sft`: a whole run, evaluated before and after, shown while it goes, kept in its folder."""

from __future__ import annotations

import argparse
import json
from typing import Any, cast

from rich.console import Console

from rest_rl.cli.terminal import Screen, show_estimate
from rest_rl.config import read_run_file
from rest_rl.errors import UserError
from rest_rl.presets import SUPERVISED
from rest_rl.runlog import RunLog
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.footprint import estimate, footprint_rows, this_device
from rest_rl.train.policy import lora_config, policy_config
from rest_rl.train.run import Plan, make_plan, quiet_libraries, resolve_run
from rest_rl.train.run import train as run_training
from rest_rl.train.sft import demonstrations
from rest_rl.train.trl.engine import TrlEngine

EXIT_INTERRUPTED = 130
MEASURED = 2000
"""Samples whose tokens a dry run counts."""


def train(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    if not arguments.debug:
        quiet_libraries()
    run: dict[str, Any] = {
        "run": arguments.run,
        "out": arguments.out,
        "resume": arguments.resume,
        "overrides": [*shorthands(arguments), *arguments.set],
    }
    config = resolve_run(**run, is_dry=True)
    screen = Screen(Console(stderr=arguments.print_config), config.run.show_every)  # the YAML has the output to itself
    is_verl = config.run.engine == "verl"
    if not is_verl and (arguments.nodes or arguments.gpus_per_node or arguments.overrides or arguments.print_config):
        raise UserError(
            "--nodes, --gpus-per-node, --print-config or settings after -- with the engine trl",
            "--engine verl with them",
            "on several GPUs TRL runs under accelerate launch (docs/training.md)",
        )
    if is_verl and arguments.dry_run:
        raise UserError("--dry-run with the engine verl", "--print-config", "for memory see docs/cluster.md")
    if arguments.print_config:
        print(verl_settings(make_plan(**run, observer=screen, is_dry=True), resume=arguments.resume))
        return 0
    if arguments.dry_run:
        dry_run(make_plan(**run, observer=screen, is_dry=True), screen)
        return 0
    result = run_training(**run, observer=screen)
    return EXIT_INTERRUPTED if result.is_interrupted else 0


def verl_settings(plan: Plan, *, resume: bool) -> str:
    """What verl would get, as YAML."""
    from rest_rl.train.verl.engine import VerlEngine

    assert isinstance(plan.engine, VerlEngine)
    log = RunLog(plan.config.run.out)
    plan.engine.prepare(plan.data, log, plan.engine.resume_point(log)[0] if resume else Checkpoint(0))
    return plan.engine.settings_text()


def dry_run(plan: Plan, screen: Screen) -> None:
    """Show what the run would need and do, without loading weights."""
    config, engine = plan.config, plan.engine
    assert isinstance(engine, TrlEngine)
    prepared = plan.data.prepared[:MEASURED]
    if config.rest.is_supervised:
        rows, _ = demonstrations(prepared, plan.layout, cast(Any, engine.args).max_length)
        tokens = [len(row["input_ids"]) for row in rows]
    else:
        tokens = [len(each.prompt_ids) for each in prepared]
    footprint = estimate(
        config,
        policy_config(config.model),
        engine.args,
        lora=lora_config(config.peft),
        prompt_tokens=tokens,
        device=this_device(),
    )
    title = f"{config.model.path}, preset {config.rest.preset}, {len(plan.data.prepared)} samples"
    show_estimate(title, footprint_rows(footprint), screen.console)


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
    return texts + ([f"verl.overrides={json.dumps(arguments.overrides)}"] if arguments.overrides else [])

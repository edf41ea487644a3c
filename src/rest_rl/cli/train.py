"""The commands `train` and `sft`: resolve the options of a run, estimate its needs, and train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rest_rl.cli.options import EXIT_INTERRUPTED, OutFolder, Overrides, is_debug, settings_after_dashes
from rest_rl.errors import UserError

if TYPE_CHECKING:
    from rest_rl.train.run import RunPlan

TRAIN_EPILOG = """\
examples:
  rest-rl train --model Qwen/Qwen3-1.7B --data dialogues.jsonl --lora 16 --dry-run
  rest-rl train --model Qwen/Qwen3-1.7B --data d.train.jsonl --held-out d.test.jsonl --lora 16 --out runs/mine
  rest-rl train --env my_tools.py:Shop --model Qwen/Qwen3-1.7B     tools that run, over several turns
  rest-rl train run.toml --set rest.preset=grpo --set run.seed=1 --out runs/grpo-1
  rest-rl train --preset tsft --model DIR --data dialogues.jsonl   supervised, 2x weight on calls
  rest-rl train --resume --out runs/mine                           resume after Ctrl-C, a crash or kill -9
  accelerate launch --num_processes 8 -m rest_rl train run.toml --out runs/mine
  rest-rl train run.toml --engine verl --nodes 2 --gpus-per-node 8 --out runs/mine

To see how training reads each row of a file, run: rest-rl data check FILE
"""
SFT_EPILOG = """\
example: rest-rl sft --model Qwen/Qwen3-1.7B --data dialogues.jsonl --out runs/sft
"""
CLUSTER = "On a cluster (see docs/cluster.md; verl's own settings follow --)"


def run_option(name: str, metavar: str | None, text: str, panel: str | None = None) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel)


RunFile = Annotated[str | None, typer.Argument(metavar="RUN.toml", help="run file (default: the embedded run)")]
Model = Annotated[str | None, run_option("--model", "DIR_OR_ID", "model.path: model or adapter folder, or hub name")]
Data = Annotated[str | None, run_option("--data", "FILE", "data.path: dialogues as a file, a folder or a hub dataset")]
HeldOut = Annotated[str | None, run_option("--held-out", "FILE", "data.held_out: dialogues to evaluate on")]
Env = Annotated[
    str | None,
    run_option("--env", "ENV", "env.path: shop, FILE.py:OBJECT, module:OBJECT or mcp:COMMAND, instead of data"),
]
PRESET = "rest.preset: rest (the paper's method), rest_live (ours), authors-code (the published code), grpo, sft, ..."
Preset = Annotated[str | None, run_option("--preset", "P", f"{PRESET}; rest-rl presets lists all")]
Format = Annotated[
    str | None, run_option("--format", "F", "rest.format: tool-call format (default: auto, from the chat template)")
]
Lora = Annotated[int | None, run_option("--lora", "R", "peft.r: train LoRA adapters of rank R")]
Resume = Annotated[bool, run_option("--resume", None, "resume the run in the folder --out")]
DryRun = Annotated[bool, run_option("--dry-run", None, "train nothing; print the memory and work of the run")]
Engine = Annotated[
    Literal["trl", "verl"] | None, run_option("--engine", None, "run.engine: training engine (default: trl)", CLUSTER)
]
Nodes = Annotated[int | None, run_option("--nodes", "N", "number of machines in the Ray cluster (verl)", CLUSTER)]
Gpus = Annotated[int | None, run_option("--gpus-per-node", "K", "GPUs per machine (verl)", CLUSTER)]
PrintConfig = Annotated[
    bool, run_option("--print-config", None, "train nothing; print the settings passed to verl", CLUSTER)
]


def train(
    context: typer.Context,
    run: RunFile = None,
    model: Model = None,
    data: Data = None,
    held_out: HeldOut = None,
    env: Env = None,
    preset: Preset = None,
    tool_format: Format = None,
    lora: Lora = None,
    overrides: Overrides = [],
    out: OutFolder = None,
    resume: Resume = False,
    is_dry: DryRun = False,
    engine: Engine = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    print_config: PrintConfig = False,
) -> int:
    """Train a model: your own on your dialogues or in your environment, or the embedded one in its tool world."""
    from rest_rl.evaluate.origin import resolve_origin
    from rest_rl.train.request import resolve_run  # imports no torch, so mistakes show at once

    if model:
        resolve_origin(model)  # here, so that an error names --model and not model.path
    settings = settings_after_dashes(context)
    of_verl = name_verl_options(nodes, gpus_per_node, print_config, settings)  # TRL would ignore these silently
    if context.info_name == "sft":
        given = any((run, model, data, held_out, env, preset, tool_format, lora, engine, of_verl, resume, is_dry))
        preset = preset or supervised_preset(run, overrides, resume=resume, is_given=given)
    keys = {"model.path": model, "data.path": data, "data.held_out": held_out, "env.path": env, "rest.preset": preset}
    # Later changes win: shorthands, then verl and LoRA, then --set, so that --set can override everything.
    changes = shorthands({**keys, "rest.format": tool_format, "run.engine": engine})
    changes += verl_overrides(nodes, gpus_per_node, settings)
    changes += lora_overrides(lora, changes, is_own=bool(model or data or env) and not (run or resume))
    source: dict[str, Any] = {"run": run, "out": out, "resume": resume, "overrides": [*changes, *overrides]}
    config = resolve_run(**source, is_dry=is_dry or print_config)
    if of_verl and config.run.engine != "verl":
        raise UserError(
            f"TRL does not support {' and '.join(of_verl)}",
            remedy="add --engine verl; for several GPUs with TRL, use accelerate launch (docs/training.md)",
        )
    from rich.console import Console

    from rest_rl.cli.terminal import Screen, show_estimate
    from rest_rl.train.estimate import make_estimate_rows
    from rest_rl.train.run import estimate_run, make_plan, silence_libraries
    from rest_rl.train.run import train as run_training

    if not is_debug(context):
        silence_libraries()
    screen = Screen(Console(stderr=print_config), config.run.show_every)  # keeps stdout free for the YAML
    if print_config:
        print(verl_settings(make_plan(**source, observer=screen, is_dry=True), resume=resume))
    elif is_dry:
        rows = make_estimate_rows(estimate_run(run, out=out, overrides=source["overrides"], observer=screen))
        show_estimate("estimated memory, size and duration of the run", rows, screen.console)
    elif run_training(**source, observer=screen).is_interrupted:
        return EXIT_INTERRUPTED
    return 0


def supervised_preset(run: str | None, overrides: Sequence[str], *, resume: bool, is_given: bool) -> str | None:
    # Returns the preset of `rest-rl sft` without --preset: None for a supervised or resumed run, otherwise `sft`.
    from rest_rl.config import read_run_file

    if not is_given:
        raise UserError(
            "sft has nothing to train",
            remedy="pass --model and --data, or a run file; to rebuild the embedded model, run "
            "`python -m research.warm_start` in a checkout of the repository",
        )
    return None if resume or (run and read_run_file(run, overrides).rest.is_supervised) else "sft"


def shorthands(keys: Mapping[str, str | None]) -> list[str]:
    # Returns options such as --model as the `--set` changes KEY=VALUE that they abbreviate.
    return [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]


def lora_overrides(rank: int | None, changes: Sequence[str], *, is_own: bool) -> list[str]:
    # Returns the changes for `--lora`; adapters need ten times the learning rate of full fine-tuning.
    from rest_rl.config import read_run_file

    if rank is None:
        return []
    # Set the rate only for your own model without a run file: a run file or a resumed run already determines the rate.
    base = read_run_file(None, changes) if is_own else None
    rate = 10 * base.trl["learning_rate"] if base and not base.peft else None
    return [f"peft.r={rank}", *([f"trl.learning_rate={rate:.6g}"] if rate else [])]


def name_verl_options(*values: object) -> list[str]:
    names = ("--nodes", "--gpus-per-node", "--print-config", "the settings after --")
    return [name for name, value in zip(names, values, strict=True) if value]


def verl_overrides(nodes: int | None, gpus_per_node: int | None, settings: Sequence[str]) -> list[str]:
    # Returns `--nodes`, `--gpus-per-node` and the settings after `--` as changes to `[verl]`.
    sizes = {"nnodes": nodes, "n_gpus_per_node": gpus_per_node}
    texts = [f"verl.trainer.{key}={value}" for key, value in sizes.items() if value is not None]
    return texts + ([f"verl.overrides={json.dumps(list(settings))}"] if settings else [])


def verl_settings(plan: RunPlan, *, resume: bool) -> str:
    from rest_rl.runlog import RunLog
    from rest_rl.train.checkpoints import Checkpoint
    from rest_rl.train.verl.engine import VerlEngine

    assert isinstance(plan.engine, VerlEngine)
    log = RunLog(plan.config.run.out)
    plan.engine.prepare(plan.data, log, plan.engine.find_resume_point(log)[0] if resume else Checkpoint(0))
    return plan.engine.to_yaml()

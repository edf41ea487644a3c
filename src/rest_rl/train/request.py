"""Which run is asked for: a run file with changes, a resumed run, the embedded one; read and checked without torch."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from rest_rl.config import (
    AUTO,
    Decay,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    parse_toml,
    read_run_file,
    unknown_key_error,
    validate_value,
)
from rest_rl.errors import UserError
from rest_rl.evaluate.origin import resolve_origin
from rest_rl.formats import get_format
from rest_rl.report.tables import flatten
from rest_rl.runlog import CHECKPOINTS, CONFIG, check_unlocked, existing_run_error

RunSource = RunConfig | Mapping[str, Any] | str | Path | None
MACHINE_DEFAULTS = {"use_cpu": True, "bf16": False}
"""What a run fills in in `[trl]` where there is no accelerator."""
LENGTH_KEYS = ("max_steps", "num_train_epochs")
"""Keys of `[trl]` that a resumed run may raise."""
VALUE_RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"), PositiveInt),
    **dict.fromkeys(("max_completion_length", "num_iterations", "steps_per_generation", "max_length"), PositiveInt),
    "generation_batch_size": PositiveInt,
    **dict.fromkeys(("num_train_epochs", "save_steps", "logging_steps"), PositiveFloat),
    **dict.fromkeys(("temperature", "repetition_penalty", "delta"), PositiveFloat),
    **dict.fromkeys(
        ("learning_rate", "max_grad_norm", "weight_decay", "warmup_steps", "adam_epsilon"), NonNegativeFloat
    ),
    **dict.fromkeys(("beta", "epsilon", "epsilon_high"), NonNegativeFloat),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Decay),
    **dict.fromkeys(("min_p", "top_p", "top_entropy_quantile", "label_smoothing_factor"), Fraction),
}
"""Fields whose other values mean nothing, though the trainer would take them."""
CONFIG_SOURCES = {
    "trl": ("transformers/training_args.py", "trl/trainer/base_config.py", "trl/trainer/grpo_config.py",
            "trl/trainer/sft_config.py"),
    "peft": ("peft/config.py", "peft/tuners/lora/config.py"),
}  # fmt: skip
"""Where the libraries declare the keys of a table."""
DEFAULT_EPOCHS = 3.0
"""The trainer's default of `num_train_epochs`."""


def is_main_process() -> bool:
    """Whether this is the process of a launch that writes; the only one without a launch."""
    return int(os.environ.get("RANK", "0")) == 0


def resolve_run(
    run: RunSource, *, out: str | Path | None, resume: bool, overrides: Sequence[str], is_dry: bool = False
) -> RunConfig:
    """The run that is asked for; with `resume` the one in the run folder, which `run` and `overrides` may repeat."""
    if resume and run is None:  # overrides on their own are changes of the recorded run
        folder = Path(read_run_source(None, overrides).run.out if out is None else out)
        asked = with_out_dir(read_run_file(find_run_file(folder), overrides), folder)
    else:
        asked = read_run_source(run, overrides)
        asked = asked if out is None else with_out_dir(asked, out)
    check_names(asked)
    if resume:
        check_unlocked(Path(asked.run.out))
        return resolve_resumed_run(asked)
    if run is None and out is None and not is_dry:
        asked = with_out_dir(asked, find_free_dir(asked.run.out))
    elif (Path(asked.run.out) / CONFIG).exists() and is_main_process() and not is_dry:
        raise existing_run_error(asked.run.out)
    return with_model_dir(asked)


def with_model_dir(config: RunConfig) -> RunConfig:
    """The run with the folder of its model, which a run folder may stand for; UserError if there is none."""
    path = resolve_origin(config.model.path, "model.path").path
    return replace(config, model=replace(config.model, path=path))


def check_names(config: RunConfig, formats: Sequence[str] = ()) -> None:
    """UserError for a preset, a rule or a format that there is not."""
    if not config.rest.is_supervised:
        config.rest.resolve()
    for name in {config.rest.format, *formats} - {AUTO}:
        get_format(name)
    for table, given in {"trl": config.trl, "peft": config.peft or {}}.items():
        known = read_declared_keys(table)
        for name in given if known else ():
            if name not in known:
                raise unknown_key_error(f"{table}.{name}", name, known)
    if config.run.engine == "trl":
        check_ranges({key: value for key, value in config.trl.items() if (key, value) != ("max_completion_length", 0)})


def read_declared_keys(table: str) -> set[str]:
    """What the libraries' sources declare as fields of a table, read without importing them; none if they cannot be.

    More than one trainer takes: the trainer's own check comes later.
    """
    keys: set[str] = set()
    for name in CONFIG_SOURCES[table]:
        spec = importlib.util.find_spec(name.partition("/")[0])
        path = Path(spec.origin).parents[1] / name if spec and spec.origin else Path()
        if not path.is_file():
            return set()
        bodies = (
            node.body for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
        )
        fields = (line.target for body in bodies for line in body if isinstance(line, ast.AnnAssign))
        keys |= {target.id for target in fields if isinstance(target, ast.Name)}
    return keys


def check_ranges(table: Mapping[str, Any]) -> None:
    """UserError for a value of `[trl]` that means nothing, though the trainer would take it."""
    for name, hint in VALUE_RANGES.items():
        if (value := table.get(name)) is not None:
            validate_value(value, hint, f"trl.{name}")
    steps = table.get("max_steps", -1)
    if isinstance(steps, int) and steps < 1 and steps != -1:
        expected = "at least 1, or -1 for as many as trl.num_train_epochs takes"
        raise UserError(f"trl.max_steps is {steps}", expected, "change it")


def find_run_file(folder: Path) -> Path:
    """The run that a folder records; UserError if it holds none."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume and {folder}, which holds no run", "a run folder", "pass its --out")
    return folder / CONFIG


def read_run_source(run: RunSource, overrides: Iterable[str]) -> RunConfig:
    """A run from whatever describes it, with overrides."""
    if isinstance(run, RunConfig):
        return RunConfig.from_toml(run.to_toml(), overrides) if overrides else run
    if isinstance(run, Mapping):
        return RunConfig.from_tables(run, overrides)
    return read_run_file(run, overrides)


def with_out_dir(config: RunConfig, out: str | Path) -> RunConfig:
    """The same run in another folder."""
    return replace(config, run=replace(config.run, out=str(out)))


def find_free_dir(out: str) -> str:
    """`out`, or `out-2`, `out-3`, ... if it holds a run already; for runs whose folder nobody chose.

    UserError in a launch of several processes: each would find another one.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"{processes} processes without --out", "one folder for all", "pass --out DIR")
    names = chain([out], (f"{out}-{number}" for number in count(2)))
    return next(name for name in names if not (Path(name) / CONFIG).exists())


def resolve_resumed_run(requested: RunConfig) -> RunConfig:
    """The run recorded in the folder, made longer if that is what is asked for; UserError for any other change."""
    folder = Path(requested.run.out)
    recorded = with_out_dir(read_run_file(find_run_file(folder)), folder)
    changed = find_changed_keys(with_recorded_defaults(requested, recorded), recorded)
    if not changed:
        return recorded
    if not set(changed) <= {f"trl.{key}" for key in LENGTH_KEYS}:
        raise UserError(
            f"--resume with another {', '.join(changed)}",
            "the run as it was recorded",
            "leave RUN.toml and --set out to go on with it, or pass another --out to start the changed run",
        )
    return lengthen_run(recorded, {key: requested.trl[key] for key in LENGTH_KEYS if key in requested.trl})


def with_recorded_defaults(requested: RunConfig, recorded: RunConfig) -> RunConfig:
    """The run that is asked for, with what `train` records of it: model, format, machine, the length of progress."""
    requested = with_model_dir(requested) if Path(requested.model.path).expanduser().is_dir() else requested
    filled = {key: recorded.trl[key] for key in MACHINE_DEFAULTS if key in recorded.trl}
    given = {key: value for key, value in requested.trl.items() if (key, value) != ("max_completion_length", 0)}
    if given != requested.trl:
        filled |= {"max_completion_length": recorded.trl.get("max_completion_length")}
    rest = replace(requested.rest, progress_steps=requested.rest.progress_steps or recorded.rest.progress_steps)
    if rest.format == AUTO:
        rest = replace(rest, format=recorded.rest.format)
    return replace(requested, rest=rest, trl={**filled, **given})


def find_changed_keys(requested: RunConfig, recorded: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What two runs differ in besides their folder, in order: (recorded, asked) by key, None where it is not set."""
    new, old = (flatten(parse_toml(config.to_toml(), "the run")) for config in (requested, recorded))
    pairs = {key: (old.get(key), new.get(key)) for key in sorted({*new, *old} - {"run.out"})}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def lengthen_run(recorded: RunConfig, lengths: Mapping[str, Any]) -> RunConfig:
    """The recorded run with more steps, all of them after its last one at progress 1; UserError if it is not longer."""
    if recorded.run.engine != "trl":
        raise UserError(
            f"--resume with another length on the engine {recorded.run.engine}, whose schedules span the whole run",
            "the run as it was recorded",
            "start a run from its model: --model RUN --out another",
        )
    total, steps = count_planned_steps(recorded), lengths.get("max_steps", -1)
    epochs, planned = (
        lengths.get("num_train_epochs", DEFAULT_EPOCHS),
        recorded.trl.get("num_train_epochs", DEFAULT_EPOCHS),
    )
    validate_value({"max_steps": steps, "num_train_epochs": epochs}, dict[str, float], "trl")
    if not (steps > total if steps > 0 else recorded.trl.get("max_steps", -1) < 1 and epochs > planned):
        raise UserError(
            f"--resume with {', '.join(f'trl.{key} = {value}' for key, value in lengths.items())}",
            f"more than the {total} steps of the run",
            "raise it, or leave it out to go on with the run as it was recorded",
        )
    rest = recorded.rest
    if not rest.is_supervised and not rest.progress_steps:
        rest = replace(rest, progress_steps=total)
    return replace(recorded, rest=rest, trl={**recorded.trl, **lengths})


def count_planned_steps(recorded: RunConfig) -> int:
    """The steps of a recorded run; where they depend on the data, as its checkpoints say."""
    if (steps := recorded.trl.get("max_steps", -1)) > 0:
        return int(steps)
    folder, totals = Path(recorded.run.out) / CHECKPOINTS, []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):  # cut short by a kill
            totals.append(int(json.loads(path.read_text(encoding="utf-8"))["max_steps"]))
    if not totals:
        raise UserError(
            f"--resume with another length and no checkpoint in {folder}",
            "a run that has begun",
            "start the longer run with another --out",
        )
    return max(totals)

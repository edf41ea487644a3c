"""Resolve the requested run: a run file with overrides, a run to resume, or the embedded run. Imports no torch."""

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
# Keys of `[trl]` that `train` sets when a run begins, if the user has not (train/trl/settings.py).
FOUND_KEYS = ("use_cpu", "bf16", "gradient_checkpointing", "per_device_train_batch_size", "num_generations")
# Keys of `[trl]` that a resumed run may raise.
LENGTH_KEYS = ("max_steps", "num_train_epochs")
# Ranges of `[trl]` values that TRL and transformers accept although they make no sense, such as a learning rate of -1.
VALUE_RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"), PositiveInt),
    **dict.fromkeys(("max_completion_length", "num_iterations", "steps_per_generation", "max_length"), PositiveInt),
    "generation_batch_size": PositiveInt,
    **dict.fromkeys(("num_train_epochs", "save_steps", "logging_steps"), PositiveFloat),
    **dict.fromkeys(("temperature", "repetition_penalty", "delta"), PositiveFloat),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "weight_decay", "warmup_steps"), NonNegativeFloat),
    **dict.fromkeys(("adam_epsilon", "beta", "epsilon", "epsilon_high"), NonNegativeFloat),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Decay),
    **dict.fromkeys(("min_p", "top_p", "top_entropy_quantile", "label_smoothing_factor"), Fraction),
}
# Source files of the libraries that declare the keys of a table as dataclass fields.
CONFIG_SOURCES = {
    "trl": ("transformers/training_args.py", "trl/trainer/base_config.py", "trl/trainer/grpo_config.py",
            "trl/trainer/sft_config.py"),
    "peft": ("peft/config.py", "peft/tuners/lora/config.py"),
}  # fmt: skip
# transformers' default of `num_train_epochs`.
DEFAULT_EPOCHS = 3.0


def is_main_process() -> bool:
    """Return whether this process has rank 0; only that process writes to the run folder."""
    return int(os.environ.get("RANK", "0")) == 0


def resolve_run(
    run: RunSource, *, out: str | Path | None, resume: bool, overrides: Sequence[str], is_dry: bool = False
) -> RunConfig:
    """Return the requested run; with `resume`, the recorded run, in which the request may only increase the length."""
    if resume and run is None:  # then the overrides apply to the recorded run
        folder = Path(read_run_source(None, overrides).run.out if out is None else out)
        requested = with_out_dir(read_run_file(find_run_file(folder), overrides), folder)
    else:
        requested = read_run_source(run, overrides)
        requested = requested if out is None else with_out_dir(requested, out)
    check_names(requested)
    if resume:
        check_unlocked(Path(requested.run.out))
        return resolve_resumed_run(requested)
    if run is None and out is None and not is_dry:
        requested = with_out_dir(requested, find_free_dir(requested.run.out))
    elif (Path(requested.run.out) / CONFIG).exists() and is_main_process() and not is_dry:
        raise existing_run_error(requested.run.out)
    return with_model_dir(requested)


# `model.path` and `model.adapter` may be run folders; their trained models are then the ones to load.
def with_model_dir(config: RunConfig) -> RunConfig:
    path = resolve_origin(config.model.path, "model.path").path
    adapter = config.model.adapter and resolve_origin(config.model.adapter, "model.adapter").path
    return replace(config, model=replace(config.model, path=path, adapter=adapter))


def check_names(config: RunConfig, formats: Sequence[str] = ()) -> None:
    """Raise a UserError for unknown presets, rules, formats and keys of `[trl]` and `[peft]`."""
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


# A misspelt key is reported before torch and TRL are imported, which is slow: the libraries' sources are parsed
# instead. This accepts the keys of both trainers; the chosen trainer's configuration checks again.
# Returns an empty set, which skips the check, if a source file moved since transformers 5.23, TRL 1.16 or peft 0.21.
def read_declared_keys(table: str) -> set[str]:
    keys: set[str] = set()
    for name in CONFIG_SOURCES[table]:
        spec = importlib.util.find_spec(name.partition("/")[0])
        path = Path(spec.origin).parents[1] / name if spec and spec.origin else Path()
        if not path.is_file():
            return set()
        classes = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
        fields = (line.target for each in classes for line in each.body if isinstance(line, ast.AnnAssign))
        keys |= {target.id for target in fields if isinstance(target, ast.Name)}
    return keys


def check_ranges(table: Mapping[str, Any]) -> None:
    """Raise a UserError for values of `[trl]` outside their range, which the trainer itself might accept."""
    for name, hint in VALUE_RANGES.items():
        if (value := table.get(name)) is not None:
            validate_value(value, hint, f"trl.{name}")
    steps = table.get("max_steps", -1)
    if isinstance(steps, int) and steps < 1 and steps != -1:
        expected = "at least 1, or -1 to train for trl.num_train_epochs"
        raise UserError(f"trl.max_steps is {steps}", expected, "change it")


def find_run_file(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} contains no run to resume", remedy="pass an existing run folder with --out")
    return folder / CONFIG


def read_run_source(run: RunSource, overrides: Iterable[str]) -> RunConfig:
    """Return the run that `run` (object, tables, path, or None for the default) describes, with overrides applied."""
    if isinstance(run, RunConfig):
        return RunConfig.from_toml(run.to_toml(), overrides) if overrides else run
    if isinstance(run, Mapping):
        return RunConfig.from_tables(run, overrides)
    return read_run_file(run, overrides)


def with_out_dir(config: RunConfig, out: str | Path) -> RunConfig:
    return replace(config, run=replace(config.run, out=str(out)))


# For runs without a chosen folder. The processes of a launch might choose different folders, so they require --out.
def find_free_dir(out: str) -> str:
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"{processes} processes were launched without --out", "one folder for all", "pass --out DIR")
    names = chain([out], (f"{out}-{number}" for number in count(2)))
    return next(name for name in names if not (Path(name) / CONFIG).exists())


# A resumed run must be the recorded one, or its metrics would mix two configurations. Only a greater length is allowed.
# What `train` filled in when the run began (see below) does not count as a difference.
def resolve_resumed_run(requested: RunConfig) -> RunConfig:
    folder = Path(requested.run.out)
    recorded = with_out_dir(read_run_file(find_run_file(folder)), folder)
    changed = find_changed_keys(with_recorded_defaults(requested, recorded), recorded)
    if not changed:
        return recorded
    if not set(changed) <= {f"trl.{key}" for key in LENGTH_KEYS}:
        remedy = "omit RUN.toml and --set to resume it, or pass another --out to start the changed run"
        parts = [f"{key} (recorded {old!r:.80}, now {new!r:.80})" for key, (old, new) in changed.items()]
        raise UserError(f"--resume cannot change {', '.join(parts)}", remedy=remedy)
    return lengthen_run(recorded, {key: requested.trl[key] for key in LENGTH_KEYS if key in requested.trl})


# `train` records more than the user wrote: the model's folder and data type, the detected format, the settings that it
# found, the response limit that a 0 stands for, and the progress length of a lengthened run. The request gets the same
# values.
def with_recorded_defaults(requested: RunConfig, recorded: RunConfig) -> RunConfig:
    requested = with_model_dir(requested) if Path(requested.model.path).expanduser().is_dir() else requested
    filled = {key: recorded.trl[key] for key in FOUND_KEYS if key in recorded.trl}
    given = {key: value for key, value in requested.trl.items() if (key, value) != ("max_completion_length", 0)}
    if given != requested.trl:
        filled |= {"max_completion_length": recorded.trl.get("max_completion_length")}
    rest = replace(requested.rest, progress_steps=requested.rest.progress_steps or recorded.rest.progress_steps)
    if rest.format == AUTO:
        rest = replace(rest, format=recorded.rest.format)
    model = requested.model
    if model.dtype == AUTO:
        model = replace(model, dtype=recorded.model.dtype)
    return replace(requested, model=model, rest=rest, trl={**filled, **given})


def find_changed_keys(requested: RunConfig, recorded: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Map each key in which two runs differ, except the run folder, to (recorded, requested); None: not set."""
    new, old = (flatten(parse_toml(config.to_toml(), "the run")) for config in (requested, recorded))
    pairs = {key: (old.get(key), new.get(key)) for key in sorted({*new, *old} - {"run.out"})}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


# Progress (nu) would jump back if its length grew with the run: the steps so far were weighted on the old schedule. It
# therefore keeps the old length (`rest.progress_steps`) and the added steps all run at progress 1.
# verl's learning rate schedule and progress span the whole run, so a run on verl cannot be lengthened.
def lengthen_run(recorded: RunConfig, lengths: Mapping[str, Any]) -> RunConfig:
    if recorded.run.engine != "trl":
        raise UserError(
            f"a run on {recorded.run.engine} cannot be lengthened, because its schedules span the whole run",
            remedy="resume it unchanged, or train on from its model: --model RUN --out another",
        )
    total, steps = count_planned_steps(recorded), lengths.get("max_steps", -1)
    epochs, planned = (table.get("num_train_epochs", DEFAULT_EPOCHS) for table in (lengths, recorded.trl))
    validate_value({"max_steps": steps, "num_train_epochs": epochs}, dict[str, float], "trl")
    if not (steps > total if steps > 0 else recorded.trl.get("max_steps", -1) < 1 and epochs > planned):
        raise UserError(
            f"--resume sets {', '.join(f'trl.{key} = {value}' for key, value in lengths.items())}",
            f"more than the run's {total} steps",
            "raise it, or omit it to resume the recorded run",
        )
    rest = recorded.rest
    if not rest.is_supervised and not rest.progress_steps:
        rest = replace(rest, progress_steps=total)
    return replace(recorded, rest=rest, trl={**recorded.trl, **lengths})


def count_planned_steps(recorded: RunConfig) -> int:
    if (steps := recorded.trl.get("max_steps", -1)) > 0:
        return int(steps)
    # With epochs the number of steps depends on the data; every checkpoint records it.
    folder, totals = Path(recorded.run.out) / CHECKPOINTS, []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):  # torn when the process was killed
            totals.append(int(json.loads(path.read_text(encoding="utf-8"))["max_steps"]))
    if not totals:
        problem = f"the run cannot be lengthened, because {folder} has no checkpoint"
        raise UserError(problem, remedy="start the longer run with another --out")
    return max(totals)

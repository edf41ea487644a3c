"""`[trl]` and the other tables of a run as its trainer's configuration; refuses what it would not take."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers.integrations import get_available_reporting_integrations
from trl import GRPOConfig, SFTConfig

from rest_rl.config import RunConfig, unknown_key_error, validate_value
from rest_rl.errors import UserError
from rest_rl.runlog import CHECKPOINTS
from rest_rl.train.policy import new_adapter_config
from rest_rl.train.request import MACHINE_DEFAULTS, check_ranges
from rest_rl.train.trl.trainer import ResTConfig, optimizer_steps_per_batch

MANAGED_FIELDS = ("output_dir", "seed", "preset", "tool_format", "weights", "reward", "advantage", "entropy_decay")
MANAGED_FIELDS += ("progress_steps",)
"""Fields of the trainer's configuration that other tables of a run set."""
LENGTH_INDEPENDENT_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Learning rate schedules in which no rate depends on the length of the run."""
OPTIONAL_PACKAGES = {
    "use_vllm": ("vllm", "'trl[vllm]'"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
}
"""Fields that need an optional package: its module and what pip installs."""


def with_machine_defaults(config: RunConfig) -> RunConfig:
    """The run with `use_cpu` and `bf16 = false` filled in where there is no accelerator and `[trl]` does not say."""
    if torch.accelerator.is_available():
        return config
    return dataclasses.replace(config, trl={**MACHINE_DEFAULTS, **config.trl})


def make_trainer_config(config: RunConfig, *, is_dry: bool = False) -> ResTConfig | SFTConfig:
    """The trainer's configuration: `[trl]` as it stands, the rest from the other tables.

    A dry run may be of another machine, which has vLLM.
    """
    kind = SFTConfig if config.rest.is_supervised else ResTConfig
    table = {name: value for name, value in config.trl.items() if name not in find_unread_keys(config)}
    check_trl_table({name: value for name, value in table.items() if not (is_dry and name == "use_vllm")}, kind)
    given: dict[str, Any] = {
        "output_dir": str(Path(config.run.out) / CHECKPOINTS),
        "seed": config.run.seed,
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 1,
        **method_fields(config),
        **table,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what becomes of their fields is not for the user to follow
            args = kind(**given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # the trainer's own checks of its fields
        raise UserError(f"[trl] {table} ({error})", f"what {kind.__name__} takes", "correct it") from error
    if args.save_strategy == "steps" and args.save_steps % optimizer_steps_per_batch(args) != 0:
        raise UserError(
            f"trl.save_steps = {args.save_steps}",
            f"a multiple of {optimizer_steps_per_batch(args)}, the steps that share one batch of responses, or a "
            "resumed run would differ",
            "change save_steps",
        )
    if "steps" == args.save_strategy == args.logging_strategy and args.save_steps % args.logging_steps:
        raise UserError(
            f"trl.save_steps = {args.save_steps} and trl.logging_steps = {args.logging_steps}",
            "a multiple: metrics are averaged since the last line, and a resumed run knows of none before its "
            "checkpoint",
            "change one of them",
        )
    check_trackers(cast(list[str], args.report_to))
    new_adapter_config(config)  # refused here, before there is a run folder
    return args


def method_fields(config: RunConfig) -> dict[str, Any]:
    """`[rest]` as fields of the trainer's configuration; a supervised trainer reads none of them."""
    if config.rest.is_supervised:
        return {}
    rest = dataclasses.asdict(config.rest)
    del rest["region_weights"]
    return {"tool_format": rest.pop("format"), **rest}


def find_unread_keys(config: RunConfig) -> list[str]:
    """Keys of `[trl]` for the other kind of training, left out so that one run file serves all presets."""
    reinforced, supervised = get_field_names(GRPOConfig), get_field_names(SFTConfig)
    only = reinforced - supervised if config.rest.is_supervised else supervised - reinforced
    return [name for name in config.trl if name in only]


def get_field_names(kind: type) -> set[str]:
    """What a trainer's configuration can be given."""
    return {field.name for field in dataclasses.fields(kind) if field.init}


def check_trl_table(table: Mapping[str, Any], kind: type = ResTConfig) -> None:
    """UserError for a key or value of `[trl]` that the trainer would not take, or could not resume from."""
    fields = get_field_names(kind) - set(MANAGED_FIELDS)
    stock = SFTConfig if kind is SFTConfig else GRPOConfig
    hints = {**typing.get_type_hints(kind), **typing.get_type_hints(stock)}
    for name, value in table.items():
        if name not in fields:
            raise unknown_key_error(f"trl.{name}", name, fields)
        # Others are left to the trainer; some of its texts (scale_rewards) may be true or false as well.
        options = {*typing.get_args(hints[name])} or {hints[name]}
        is_switch = isinstance(value, bool) and str in options
        if options <= {int, float, bool, str, type(None)} and not is_switch:
            validate_value(value, hints[name], f"trl.{name}")
    check_ranges(table)
    if table.get("save_only_model"):
        raise UserError(
            "trl.save_only_model = true",
            "checkpoints that a run can go on from",
            "remove it (the weights alone are in the run folder's model/)",
        )
    if "chat_template_kwargs" in table:
        raise UserError("trl.chat_template_kwargs", "model.chat_template_kwargs", "move it to [model]")
    check_packages(table)


def check_lengthening(args: ResTConfig | SFTConfig, step: int) -> None:
    """UserError unless a run can be lengthened after `step` as if it had been as long from the beginning."""
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    warms_up = schedule != "constant" and 0 < args.warmup_steps < 1  # a share of the run
    if schedule not in LENGTH_INDEPENDENT_SCHEDULES or warms_up:
        raise UserError(
            f"--resume with another length and trl.lr_scheduler_type = {schedule!r}, whose learning rates depend on it"
            + " by its warmup" * warms_up,
            f"a schedule that does not ({', '.join(LENGTH_INDEPENDENT_SCHEDULES)})",
            f"train on from the run's model: --model {Path(cast(str, args.output_dir)).parent} --out another",
        )
    if step % optimizer_steps_per_batch(args):
        raise UserError(
            f"--resume with another length after step {step}, in the middle of a batch of responses",
            f"a multiple of {optimizer_steps_per_batch(args)}, the steps that share one",
            f"delete checkpoint-{step}, to go on from the one before it",
        )


def check_packages(table: Mapping[str, Any]) -> None:
    """UserError for a setting whose package is not there: the trainer would find out once it is built."""
    optimizer = str(table.get("optim", ""))
    needed = {key: package for key, package in OPTIONAL_PACKAGES.items() if table.get(key)}
    if "8bit" in optimizer or "bnb" in optimizer:
        needed["optim"] = ("bitsandbytes", "bitsandbytes")
    for key, (module, package) in needed.items():
        if importlib.util.find_spec(module) is None:
            got = f"trl.{key} = {table[key]!r} without the package {module}"
            raise UserError(got, "it installed", f"pip install {package}, or remove trl.{key}")


def check_trackers(names: Sequence[str]) -> None:
    """UserError for a tracker whose package is not there: the trainer would find out after the run has begun."""
    missing = [name for name in names if name not in ("none", "all", *get_available_reporting_integrations())]
    if missing:
        raise UserError(
            f"trl.report_to = {list(names)}", "trackers that are installed", f"pip install {missing[0]}, or remove it"
        )

"""Build the trainer's configuration from `[trl]` and the other tables of a run; reject unusable settings."""

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

from rest_rl.config import AUTO, RunConfig, unknown_key_error, validate_value
from rest_rl.errors import UserError
from rest_rl.runlog import CHECKPOINTS, SILENT, Observer
from rest_rl.train.named_models import SMALL_MODELS
from rest_rl.train.policy import new_adapter_config
from rest_rl.train.request import check_ranges
from rest_rl.train.trl.trainer import ResTConfig, optimizer_steps_per_batch

# Fields of the trainer's configuration that other tables of a run set.
MANAGED_FIELDS = ("output_dir", "seed", "preset", "tool_format", "weights", "reward", "advantage", "entropy_decay")
MANAGED_FIELDS += ("progress_steps", "resample_rounds", "share_prompts", "credit", "gamma")
# Learning rate schedules whose rates do not depend on the length of the run.
LENGTH_INDEPENDENT_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")
# TRL's default of `per_device_train_batch_size` and `num_generations`, and our least size of a group that is fitted.
DEFAULT_SIZE, MIN_FITTED_GROUP = 8, 4
# Fields that require an optional package: its module, and what to pass to pip install.
OPTIONAL_PACKAGES = {
    "use_vllm": ("vllm", "'trl[vllm]'"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
}


def with_machine_defaults(config: RunConfig, observer: Observer = SILENT) -> RunConfig:
    """Return the run with `trl.use_cpu`, `trl.bf16` and `model.dtype` set, if they are not, for training on a CPU.

    On a machine with an accelerator, the run stays as it is.
    """
    if torch.accelerator.is_available():
        return config
    is_embedded = config.model.path in SMALL_MODELS  # too small to gain from bfloat16
    has_fast = has_fast_bfloat16()
    is_fast = has_fast and not config.trl.get("fp16") and not is_embedded
    if "bf16" not in config.trl and not is_embedded:
        why = "multiplies bfloat16 fast" if has_fast else "has no fast bfloat16 arithmetic"
        observer.say(f"no GPU: training on the CPU, trl.bf16 = {str(is_fast).lower()}, because it {why}")
    model = config.model
    if not has_fast:
        if model.dtype == AUTO and config.peft:
            model = dataclasses.replace(model, dtype="float32")
        problem = "selects bfloat16, which this CPU multiplies many times slower than float32"
        if config.trl.get("bf16"):
            observer.say(f"trl.bf16 {problem}; use --set trl.bf16=false")
        if model.dtype == "bfloat16":
            observer.say(f"model.dtype {problem}; use --set model.dtype=float32")
    return dataclasses.replace(config, model=model, trl={"use_cpu": True, "bf16": is_fast, **config.trl})


def has_fast_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products; without them, bfloat16 is slower than float32."""
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    return any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


# A micro-batch that holds whole groups shares prompts and padding within each group. The key that the user has not set
# is fitted to the other one. Groups of fewer than four responses estimate the baseline badly; TRL's size is then kept.
def with_whole_groups(config: RunConfig, observer: Observer = SILENT) -> RunConfig:
    """Return the run with micro-batches of whole groups, if only one of the two sizes is set."""
    batch, group = (config.trl.get(key) for key in ("per_device_train_batch_size", "num_generations"))
    if config.rest.is_supervised or (batch is None) == (group is None):
        return config
    if group is not None:
        found = {"per_device_train_batch_size": max(1, DEFAULT_SIZE // group) * group}
    else:
        assert batch is not None
        sizes = [size for size in range(MIN_FITTED_GROUP, DEFAULT_SIZE + 1) if batch % size == 0]
        found = {"num_generations": max(sizes, default=DEFAULT_SIZE)}
    ((name, value),) = found.items()
    if value == DEFAULT_SIZE:
        return config
    observer.say(f"trl.{name} = {value}, so that micro-batches hold whole groups (to change: --set trl.{name}=N)")
    return dataclasses.replace(config, trl={**config.trl, **found})


def make_trainer_config(config: RunConfig, *, is_dry: bool = False) -> ResTConfig | SFTConfig:
    """Build the trainer's configuration from `[trl]`, the run folder, the seed and `[rest]`.

    With `is_dry`, vLLM need not be installed, because the run may be intended for another machine.

    Raises:
        UserError: a key or value that the trainer rejects, or that would make a resumed run differ from the original.
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
        "trust_remote_code": config.model.trust_remote_code,  # for the reference model of a KL term
        **method_fields(config),
        **table,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL announces changes of its fields
            args = kind(**given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # raised by the trainer's own checks
        if "bf16" in str(error):
            remedy = "set trl.use_cpu = true to train on the CPU, or trl.bf16 = false"
            raise UserError("trl.bf16 is on, but this machine has no GPU that supports it", remedy=remedy) from error
        raise UserError(f"{kind.__name__} rejects the settings of [trl] ({error})", remedy="change them") from error
    # TRL does not save the buffered generation batch. A run resumed in the middle of one would generate it again with
    # the newer policy, and so differ from an uninterrupted run.
    if args.save_strategy == "steps" and args.save_steps % optimizer_steps_per_batch(args) != 0:
        raise UserError(
            f"trl.save_steps is {args.save_steps}",
            f"a multiple of {optimizer_steps_per_batch(args)}, the steps that share one generation batch",
            "change it; a run resumed within a batch would differ",
        )
    if "steps" == args.save_strategy == args.logging_strategy and args.save_steps % args.logging_steps:
        raise UserError(
            f"trl.save_steps is {args.save_steps} and trl.logging_steps is {args.logging_steps}",
            "a save_steps that is a multiple of logging_steps",
            "change one of them; TRL averages metrics since the last line, which a resumed run would not know",
        )
    check_trackers(cast(list[str], args.report_to))
    new_adapter_config(config)  # raises for a bad [peft] before the run folder is created
    return args


def method_fields(config: RunConfig) -> dict[str, Any]:
    """Return the settings of `[rest]` under their names in `ResTConfig`; empty for supervised presets."""
    if config.rest.is_supervised:
        return {}
    rest = dataclasses.asdict(config.rest)
    del rest["region_weights"]
    return {"tool_format": rest.pop("format"), **rest}


def find_unread_keys(config: RunConfig) -> list[str]:
    """Return the keys of `[trl]` that only the other kind of trainer (GRPO or supervised) reads; they are ignored."""
    reinforced, supervised = get_field_names(GRPOConfig), get_field_names(SFTConfig)
    only = reinforced - supervised if config.rest.is_supervised else supervised - reinforced
    return [name for name in config.trl if name in only]


def get_field_names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


def check_trl_table(table: Mapping[str, Any], kind: type = ResTConfig) -> None:
    """Raise a UserError for a key or value of `[trl]` that the trainer rejects or that would prevent a resume."""
    fields = get_field_names(kind) - set(MANAGED_FIELDS)
    stock = SFTConfig if kind is SFTConfig else GRPOConfig
    hints = {**typing.get_type_hints(kind), **typing.get_type_hints(stock)}
    for name, value in table.items():
        if name not in fields:
            raise unknown_key_error(f"trl.{name}", name, fields)
        # Other types are left to the trainer; some of its strings (scale_rewards) may also be true or false.
        options = {*typing.get_args(hints[name])} or {hints[name]}
        is_switch = isinstance(value, bool) and str in options
        if options <= {int, float, bool, str, type(None)} and not is_switch:
            validate_value(value, hints[name], f"trl.{name}")
    check_ranges(table)
    if table.get("save_only_model"):
        raise UserError(
            "trl.save_only_model is true",
            "false, because such checkpoints cannot be resumed",
            "remove it; model/ in the run folder contains only the weights",
        )
    if "chat_template_kwargs" in table:
        raise UserError("chat_template_kwargs is in [trl]", "it in [model]", "move it to model.chat_template_kwargs")
    check_packages(table)


def check_lengthening(args: ResTConfig | SFTConfig, step: int) -> None:
    """Raise a UserError if lengthening a run after `step` differs from training at the new length from the start."""
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    warms_up = schedule != "constant" and 0 < args.warmup_steps < 1  # a share of the run
    if schedule not in LENGTH_INDEPENDENT_SCHEDULES or warms_up:
        raise UserError(
            "the run cannot be lengthened, because "
            + ("trl.warmup_steps is a share of its length" if warms_up else f"trl.lr_scheduler_type is {schedule!r}"),
            f"a learning rate that does not depend on the length ({', '.join(LENGTH_INDEPENDENT_SCHEDULES)})",
            f"train on from the run's model: --model {Path(cast(str, args.output_dir)).parent} --out another",
        )
    if step % optimizer_steps_per_batch(args):
        raise UserError(
            f"the run cannot be lengthened after step {step}, in the middle of a generation batch",
            f"a multiple of {optimizer_steps_per_batch(args)}, the steps that share one",
            f"delete checkpoint-{step} to resume from the one before it",
        )


# The trainer would only fail when it is built, after the model has been loaded.
def check_packages(table: Mapping[str, Any]) -> None:
    optimizer = str(table.get("optim", ""))
    needed = {key: package for key, package in OPTIONAL_PACKAGES.items() if table.get(key)}
    if "8bit" in optimizer or "bnb" in optimizer:
        needed["optim"] = ("bitsandbytes", "bitsandbytes")
    for key, (module, package) in needed.items():
        if importlib.util.find_spec(module) is None:
            problem = f"trl.{key} is {table[key]!r}, but the package {module} is not installed"
            raise UserError(problem, remedy=f"pip install {package}, or remove trl.{key}")


def check_trackers(names: Sequence[str]) -> None:
    missing = [name for name in names if name not in ("none", "all", *get_available_reporting_integrations())]
    if missing:
        problem = f"trl.report_to is {list(names)}, but {missing[0]} is not installed"
        raise UserError(problem, remedy=f"pip install {missing[0]}, or remove it")

"""One training run as the command does it: trainer, run folder, resume. Says what happens through an `Observer`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from datasets import disable_progress_bars
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from trl import GRPOConfig, SFTConfig, SFTTrainer

from rest_rl.config import RunConfig, describe, fits, options, parse_toml, unknown_key
from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError
from rest_rl.formats import get_format
from rest_rl.report.diagnosis import Diagnosis, Finding
from rest_rl.report.diagnosis.history import step_of
from rest_rl.runlog import CHECKPOINTS, EVALUATIONS, METRICS, RunLog, read_rows, unwritable
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.policy import new_adapter, quiet_loading
from rest_rl.train.prompts import OnRefused, training_dataset
from rest_rl.train.record import KeepLast, ResponseRecord, recorded_reward
from rest_rl.train.reward import make_tool_reward
from rest_rl.train.sft import region_trainer
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer, steps_per_generation

WALL_CLOCK = ("step_time", "runtime", "per_second", "profiling/", "num_tokens")
"""Parts of the names of what differs from run to run, or after a resume, and so stays out of the metrics."""
OWNED = ("output_dir", "seed", "preset", "tool_format", "weights", "reward", "advantage", "entropy_decay")
"""Fields of the trainer's configuration that other tables of a run set."""
LEAST_ONE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "max_completion_length",
    "save_steps",
    "logging_steps",
)
"""Fields of which less would mean nothing."""


class Observer(Protocol):
    """Who is told of a run's steps."""

    def on_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """A step is finished; its metrics are in the run folder."""
        ...

    def on_responses(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some responses that `step`, counted from 1, learns from; `rows` are as in responses.jsonl."""
        ...

    def on_finding(self, finding: Finding) -> None:
        """Something is wrong with the run that was not before."""
        ...


class Recorder(TrainerCallback):
    """Writes each step to the run folder, tells the observer, and stops in an orderly way when asked."""

    def __init__(self, log: RunLog, observer: Observer, table: Mapping[str, Any]) -> None:
        """Bind the run folder and who is told; `table` is the run's configuration, for its diagnosis."""
        self.log, self.observer = log, observer
        self.stop_requested = False
        self._diagnosis, self._evaluations = Diagnosis(table), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What a resumed run has shown before is not told again."""
        for row in read_rows(self.log.folder / METRICS) if self.log.enabled else []:
            self._diagnose(row, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """One row of metrics and one of times."""
        row = {"step": state.global_step}
        timing = {key: value for key, value in (logs or {}).items() if any(part in key for part in WALL_CLOCK)}
        metrics = {key: value for key, value in (logs or {}).items() if key not in timing}
        if "train_loss" not in metrics:  # the closing line of the trainer repeats what is known
            self.log.add_metrics(row | metrics)
            self.observer.on_step(state.global_step, state.max_steps, metrics)
            for finding in self._diagnose(row | metrics, state.max_steps):
                self.observer.on_finding(finding)
        self.log.add_timing(row | timing)

    def _diagnose(self, row: Mapping[str, Any], total: int) -> list[Finding]:
        """What a row of metrics shows for the first time."""
        evaluations = read_rows(self.log.folder / EVALUATIONS)
        due = [seen for seen in evaluations[self._evaluations :] if step_of(seen) <= step_of(row)]
        self._evaluations += len(due)
        for seen in due:
            self._diagnosis.add_evaluation(seen)
        return self._diagnosis.add(row, total)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if asked, once every response generated so far has been learnt from."""
        if self.stop_requested and state.global_step % steps_per_generation(args) == 0:
            control.should_save = control.should_training_stop = True


class EveryNSteps(TrainerCallback):
    """Calls a function with the step after every n-th finished step.

    The call comes before the step is logged and saved: what it writes is there whenever the step's checkpoint is.
    """

    def __init__(self, every: int, call: Callable[[int], None]) -> None:
        """`call` must leave the model and every random state as they were."""
        self.every, self.call = every, call

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Call if the step is due."""
        if state.global_step % self.every == 0:
            self.call(state.global_step)


def quiet_libraries() -> None:
    """Leave the terminal to the command: no progress bars, hints and deprecation warnings of the libraries."""
    quiet_loading()
    disable_progress_bars()


def with_machine_defaults(config: RunConfig) -> RunConfig:
    """The run with `use_cpu` and `bf16 = false` filled in where there is no accelerator and `[trl]` does not say."""
    if torch.accelerator.is_available():
        return config
    return dataclasses.replace(config, trl={"use_cpu": True, "bf16": False, **config.trl})


def trainer_config(config: RunConfig) -> ResTConfig | SFTConfig:
    """The trainer's configuration: `[trl]` as it stands, the rest from the other tables."""
    kind = SFTConfig if config.rest.is_supervised else ResTConfig
    table = {name: value for name, value in config.trl.items() if name not in unread_keys(config)}
    check_trl(table, kind)
    given: dict[str, Any] = {
        "output_dir": str(Path(config.run.out) / CHECKPOINTS),
        "seed": config.run.seed,
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 1,
        **method_fields(config),
        **table,
    }
    for name in LEAST_ONE:
        if isinstance(number := table.get(name, 1), int) and number < 1:
            raise UserError(f"trl.{name} = {number}", "at least 1", "raise it")
    try:
        args = kind(**given)
    except TypeError as error:
        raise UserError(f"[trl] {table} ({error})", f"fields of {kind.__name__}", "mend it") from error
    if args.save_strategy == "steps" and args.save_steps % steps_per_generation(args) != 0:
        raise UserError(
            f"trl.save_steps = {args.save_steps}",
            f"a multiple of {steps_per_generation(args)}, the steps that share one batch of responses, or a resumed "
            "run would differ",
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
    new_adapter(config)  # refused here, before there is a run folder
    return args


def method_fields(config: RunConfig) -> dict[str, Any]:
    """`[rest]` as fields of the trainer's configuration; a supervised trainer reads none of them."""
    if config.rest.is_supervised:
        return {}
    rest = dataclasses.asdict(config.rest)
    del rest["region_weights"]
    return {"tool_format": rest.pop("format"), **rest}


def unread_keys(config: RunConfig) -> list[str]:
    """Keys of `[trl]` for the other kind of training, left out so that one run file serves all presets."""
    reinforced, supervised = field_names(GRPOConfig), field_names(SFTConfig)
    only = reinforced - supervised if config.rest.is_supervised else supervised - reinforced
    return [name for name in config.trl if name in only]


def field_names(kind: type) -> set[str]:
    """What a trainer's configuration can be given."""
    return {field.name for field in dataclasses.fields(kind) if field.init}


def check_trl(table: Mapping[str, Any], kind: type = ResTConfig) -> None:
    """ValueError for a key or value of `[trl]` that the trainer would not take, or could not resume from."""
    fields = field_names(kind) - set(OWNED)
    stock = SFTConfig if kind is SFTConfig else GRPOConfig
    hints = {**typing.get_type_hints(kind), **typing.get_type_hints(stock)}
    for name, value in table.items():
        if name not in fields:
            raise ValueError(unknown_key(f"trl.{name}", name, fields))
        # Others are left to the trainer; some of its texts (scale_rewards) may be true or false as well.
        is_plain = all(option in (int, float, bool, str, type(None)) for option in options(hints[name]))
        is_switch = isinstance(value, bool) and str in options(hints[name])
        if is_plain and not is_switch and not fits(value, hints[name]):
            raise UserError(f"trl.{name} = {value!r}", f"{describe(hints[name])}", "change the value")
    if table.get("save_only_model"):
        raise UserError(
            "trl.save_only_model = true",
            "checkpoints that a run can go on from",
            "remove it (the weights alone are in the run folder's model/)",
        )
    if "chat_template_kwargs" in table:
        raise UserError("trl.chat_template_kwargs", "model.chat_template_kwargs", "move it to [model]")
    if table.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "trl.use_vllm = true without the package vllm", "it", "pip install 'rest-rl[vllm]', or remove it"
        )


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not there: the trainer would find out after the run has begun."""
    missing = [name for name in names if name not in ("none", "all", *get_available_reporting_integrations())]
    if missing:
        raise UserError(
            f"trl.report_to = {list(names)}", "trackers that are installed", f"pip install {missing[0]}, or remove it"
        )


def build_trainer(
    config: RunConfig,
    args: ResTConfig | SFTConfig,
    model: Any,
    layout: PromptLayout,
    samples: Sequence[ToolSample],
    log: RunLog,
    observer: Observer,
    on_refused: OnRefused | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[ResTTrainer | SFTTrainer, Recorder]:
    """The trainer, with `callbacks`, and the one that writes its run folder; `on_refused` as in `training_dataset`."""
    if not samples:
        raise UserError(f"no training sample from {config.data.path}", "at least one", "check [data]")
    recorder = Recorder(log, observer, parse_toml(config.to_toml(), "the run"))
    shared: dict[str, Any] = {
        "model": model,
        "processing_class": layout.tokenizer,
        "peft_config": new_adapter(config),
        "callbacks": [recorder, *callbacks],
    }
    trainer: ResTTrainer | SFTTrainer
    if isinstance(args, ResTConfig):
        record = ResponseRecord(functools.partial(keep_responses, log, observer))
        trainer = ResTTrainer(
            args=args,
            reward_funcs=recorded_tool_reward(config, layout.tokenizer, args, record),
            train_dataset=training_dataset(
                samples, layout.tokenizer, layout.format, layout.variables, on_refused=on_refused
            ),
            **shared,
        )
        trainer.on_weighed = record.fill
        trainer.add_callback(KeepLast(record))
    else:
        trainer = region_trainer(args, layout, samples, config.rest.loss_weights(), on_refused=on_refused, **shared)
    check_size(trainer, config)
    # Progress and metrics are shown and kept by the recorder.
    trainer.remove_callback(PrinterCallback)
    return trainer, recorder


def check_size(trainer: ResTTrainer | SFTTrainer, config: RunConfig) -> None:
    """ValueError for fewer prompts than one step takes: the trainer would silently do nothing."""
    args = cast(Any, trainer.args)
    if not isinstance(trainer, ResTTrainer):
        return
    size, needed = len(cast(Any, trainer.train_dataset)), args.generation_batch_size // args.num_generations
    if size < needed:
        raise UserError(
            f"{size} training prompts from {config.data.path}",
            f"at least {needed}, which one batch of {args.generation_batch_size} responses takes",
            "lower trl.gradient_accumulation_steps or trl.per_device_train_batch_size, or add data",
        )


def recorded_tool_reward(
    config: RunConfig, tokenizer: Any, args: ResTConfig, record: ResponseRecord
) -> Callable[..., list[float]]:
    """The preset's reward, which also records the first responses of every batch."""
    tool_format = get_format(config.rest.format)
    reward = make_tool_reward(tokenizer, tool_format, args.method(), steps_per_generation(args), args.seed)
    return recorded_reward(reward, tokenizer, tool_format, config.run.responses_per_step, record)


def keep_responses(log: RunLog, observer: Observer, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Responses into the run folder and to the observer."""
    log.add_responses(rows)
    observer.on_responses(step, rows)


def train(trainer: ResTTrainer | SFTTrainer, checkpoint: Checkpoint, log: RunLog) -> int:
    """Train from a checkpoint; returns the number of finished steps. A full disk is a ValueError."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint.folder else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) or "No space left" in str(error) or "file write failed" in str(error):
            raise unwritable(log.folder, OSError(None, str(error))) from error
        raise
    return int(trainer.state.global_step)


def save_policy(trainer: ResTTrainer | SFTTrainer, log: RunLog) -> None:
    """The trained model, or its adapter, with the tokenizer in the run folder's `model`; all processes take part."""
    try:
        trainer.save_model(str(log.model))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unwritable(log.folder, OSError(None, str(error))) from error


def is_sharded(trainer: ResTTrainer | SFTTrainer) -> bool:
    """Whether no process holds the whole model (FSDP, DeepSpeed), so that it cannot generate by itself."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled

"""One training run as the command does it: trainer, run folder, resume. Says what happens through an `Observer`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import typing
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors import SafetensorError, safe_open
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from trl import GRPOConfig

from rest_rl.config import RunConfig, describe, fits, options, unknown_key
from rest_rl.data.samples import ToolSample
from rest_rl.formats import get_format
from rest_rl.presets import Preset
from rest_rl.regions import decode_ids
from rest_rl.runlog import CHECKPOINTS, METRICS, RESPONSES, TIMING, RunLog, read_rows, unwritable
from rest_rl.train.prompts import training_dataset
from rest_rl.train.tool_reward import make_tool_reward, progress_of
from rest_rl.train.trl_trainer import ResTConfig, ResTTrainer

WALL_CLOCK = ("step_time", "runtime", "per_second", "profiling/")
"""Parts of the names of what differs from run to run and so stays out of the metrics."""
OWNED = ("output_dir", "seed", "preset", "tool_format", "weights", "reward", "advantage", "entropy_decay")
"""Fields of the trainer's configuration that other tables of a run set."""


class Observer(Protocol):
    """Who is told of a run's steps."""

    def on_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """A step is finished; its metrics are in the run folder."""
        ...

    def on_responses(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some responses that `step`, counted from 1, learns from; `rows` are as in responses.jsonl."""
        ...


class Checkpoint(NamedTuple):
    """Where a run can go on from; without a folder it is the beginning."""

    step: int
    folder: Path | None = None
    is_last: bool = False
    """The run has finished its steps; the trainer would do one more if it was asked to go on from here."""


class Recorder(TrainerCallback):
    """Writes each step to the run folder, tells the observer, and stops in an orderly way when asked."""

    def __init__(self, log: RunLog, observer: Observer) -> None:
        """Bind the run folder and who is told."""
        self.log, self.observer = log, observer
        self.stop_requested = False

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
        self.log.add_timing(row | timing)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if asked, once every response generated so far has been learnt from."""
        if self.stop_requested and state.global_step % steps_per_generation(args) == 0:
            control.should_save = control.should_training_stop = True


def quiet_libraries() -> None:
    """Leave the terminal to the command: no progress bars, hints and deprecation warnings of the libraries."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def steps_per_generation(args: Any) -> int:
    """Optimizer steps that share one batch of responses; only between batches does a resumed run go on exactly."""
    shared = args.steps_per_generation * args.num_iterations
    return max(1, -(-shared // args.gradient_accumulation_steps))


def trainer_config(config: RunConfig) -> ResTConfig:
    """The trainer's configuration: `[trl]` as it stands, the rest from the other tables."""
    check_trl(config.trl)
    rest = dataclasses.asdict(config.rest)
    if rest["entropy_decay"] is None:
        del rest["entropy_decay"]
    given: dict[str, Any] = {
        "output_dir": str(Path(config.run.out) / CHECKPOINTS),
        "seed": config.run.seed,
        "tool_format": rest.pop("format"),
        "disable_tqdm": True,
        "report_to": [],
        **rest,
        **config.trl,
    }
    try:
        args = ResTConfig(**given)
    except TypeError as error:
        raise ValueError(f"got [trl] {dict(config.trl)} ({error}), expected fields of ResTConfig; mend it") from error
    if args.save_strategy == "steps" and args.save_steps % steps_per_generation(args) != 0:
        raise ValueError(
            f"got trl.save_steps = {args.save_steps}, expected a multiple of {steps_per_generation(args)}, the steps "
            "that share one batch of responses, or a resumed run would differ; change save_steps"
        )
    return args


def check_trl(table: Mapping[str, Any]) -> None:
    """ValueError for a key or value of `[trl]` that the trainer would not take, or could not resume from."""
    fields = {field.name for field in dataclasses.fields(ResTConfig) if field.init} - set(OWNED)
    hints = {**typing.get_type_hints(ResTConfig), **typing.get_type_hints(GRPOConfig)}
    for name, value in table.items():
        if name not in fields:
            raise ValueError(unknown_key(f"trl.{name}", name, fields))
        # Others are left to the trainer; some of its texts (scale_rewards) may be true or false as well.
        is_plain = all(option in (int, float, bool, str, type(None)) for option in options(hints[name]))
        is_switch = isinstance(value, bool) and str in options(hints[name])
        if is_plain and not is_switch and not fits(value, hints[name]):
            raise ValueError(f"got trl.{name} = {value!r}, expected {describe(hints[name])}; change the value")
    if table.get("save_only_model"):
        raise ValueError(
            "got trl.save_only_model = true, expected checkpoints that a run can go on from; remove it (the weights "
            "alone are in each checkpoint's model.safetensors)"
        )
    if table.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "got trl.use_vllm = true without the package vllm, expected it; pip install 'rest-rl[vllm]', or remove it"
        )


def build_trainer(
    config: RunConfig,
    args: ResTConfig,
    model: Any,
    tokenizer: Any,
    samples: Sequence[ToolSample],
    log: RunLog,
    observer: Observer,
) -> tuple[ResTTrainer, Recorder]:
    """The trainer and the callback that writes its run folder."""
    if not samples:
        raise ValueError(f"got no training sample from {config.data.path}, expected at least one; check [data]")
    recorder = Recorder(log, observer)
    trainer = ResTTrainer(
        model=model,
        args=args,
        reward_funcs=recorded_reward(config, tokenizer, args.method(), log, observer),
        train_dataset=training_dataset(samples, tokenizer, tool_format=config.rest.format),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    # Progress and metrics are shown and kept by the recorder.
    trainer.remove_callback(PrinterCallback)
    return trainer, recorder


def recorded_reward(
    config: RunConfig, tokenizer: Any, method: Preset, log: RunLog, observer: Observer
) -> Callable[..., list[float]]:
    """The preset's reward, which also writes the first responses of every step to the run folder."""
    reward, tool_format = make_tool_reward(tokenizer, config.rest.format, method), get_format(config.rest.format)

    @functools.wraps(reward)  # TRL names its metrics after the function
    def recorded(
        completion_ids: list[list[int]], gold: list[Any], trainer_state: Any = None, **rest: Any
    ) -> list[float]:
        totals = reward(completion_ids=completion_ids, gold=gold, trainer_state=trainer_state, **rest)
        step = trainer_state.global_step + 1
        rows = [
            {
                "step": step,
                "progress": progress_of(trainer_state),
                "id": rest["id"][i],
                "response": decode_ids(completion_ids[i], tokenizer, tool_format.tags),
                "ids": list(completion_ids[i]),
                "gold": json.loads(gold[i]),
                "reward": totals[i],
            }
            for i in range(min(config.run.responses_per_step, len(totals)))
        ]
        log.add_responses(rows)
        observer.on_responses(step, rows)
        return totals

    return recorded


def train(trainer: ResTTrainer, checkpoint: Checkpoint, log: RunLog) -> int:
    """Train from a checkpoint; returns the number of finished steps. A full disk is a ValueError."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint.folder else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) or "No space left" in str(error) or "file write failed" in str(error):
            raise unwritable(log.folder, OSError(None, str(error))) from error
        raise
    return int(trainer.state.global_step)


def find_checkpoint(log: RunLog, save_steps: float) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint of a run folder and the names of newer broken ones.

    A run killed before its first checkpoint goes on from the beginning. ValueError if there should be one by now.
    """
    broken: list[str] = []
    for folder in sorted(log.checkpoints.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        if state := checkpoint_state(folder):
            return Checkpoint(state["global_step"], folder, state["global_step"] >= state["max_steps"]), broken
        broken.append(folder.name)
    finished = finished_steps(log)
    if finished > save_steps:
        found = f"broken: {', '.join(broken)}" if broken else "none there"
        raise ValueError(
            f"got {log.checkpoints} without a whole checkpoint ({found}) after {finished} steps, expected one to go on "
            "from; restore it from a copy or start anew with another --out"
        )
    return Checkpoint(0), broken


def finished_steps(log: RunLog) -> int:
    """The steps that a run has certainly finished; the metrics alone may lag by `logging_steps`."""
    logged = [row.get("step", 0) for name in (METRICS, TIMING) for row in read_rows(log.folder / name)]
    begun = [row.get("step", 1) - 1 for row in read_rows(log.folder / RESPONSES)]
    return max([*logged, *begun], default=0)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name, -1 if there is none."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def checkpoint_state(folder: Path) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint.

    None unless every part is there, every file can be opened and the state belongs to its step.
    """
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        for weights in folder.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
        tensors = [*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]
        whole = has_all_parts(folder) and all(zipfile.is_zipfile(path) for path in tensors)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return None
    if not whole or not isinstance(state, dict) or not isinstance(state.get("max_steps"), int):
        return None
    return state if state.get("global_step") == checkpoint_step(folder) else None


def has_all_parts(folder: Path) -> bool:
    """Whether a checkpoint holds weights, optimizer, schedule and random state, in whole or in shards.

    The trainer loads what it finds: without its file an optimizer would silently start anew.
    """
    is_deepspeed = any(folder.glob("global_step*/*"))  # holds weights, optimizer and schedule; not looked into
    indices = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.safetensors.index.json")]
    shards = {shard for index in indices for shard in index["weight_map"].values()} if indices else set()
    if not all((folder / shard).is_file() for shard in shards):
        return False
    parts = {
        "weights": ("*.safetensors", "pytorch_model_fsdp*"),
        "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*/*"),
        "schedule": ("scheduler.pt",),
    }
    found = {part: any(any(folder.glob(pattern)) for pattern in patterns) for part, patterns in parts.items()}
    return any(folder.glob("rng_state*.pth")) and (is_deepspeed or all(found.values()))

"""The engine `trl`: reinforcement learning with `ResTTrainer` and supervised training with TRL's `SFTTrainer`."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from rest_rl.config import RunConfig, parse_toml, read_run_file
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.envs.rollout import Rollouts
from rest_rl.errors import UserError
from rest_rl.evaluate.held_out import HeldOutPrompt, evaluate_held_out
from rest_rl.formats import get_format
from rest_rl.report.diagnosis import Diagnosis
from rest_rl.report.diagnosis.history import step_of
from rest_rl.runlog import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    Observer,
    Row,
    RunLog,
    read_rows,
    truncate_file,
    unwritable_folder_error,
)
from rest_rl.train.checkpoints import Checkpoint, find_checkpoint
from rest_rl.train.engine import AfterStep, StopPoint
from rest_rl.train.environment import (
    EnvironmentData,
    EnvironmentEvaluator,
    make_environment_reward,
    make_limits,
    make_rows,
)
from rest_rl.train.estimate import count_work
from rest_rl.train.policy import load_policy, new_adapter_config, resolve_adapter
from rest_rl.train.prompts import TrainingData, build_dataset, build_prompt_dataset, make_rejection_error
from rest_rl.train.record import FlushAtEnd, ResponseRecord, with_response_record
from rest_rl.train.request import LENGTH_KEYS
from rest_rl.train.reward import get_stop_ids, make_tool_reward
from rest_rl.train.sft import build_demonstrations, make_sft_trainer
from rest_rl.train.trl.settings import check_lengthening, make_trainer_config
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer, optimizer_steps_per_batch

# Substrings of logged keys that depend on the machine or on a resume; they go to timing.jsonl, not to metrics.jsonl.
TIMING_KEYS = ("step_time", "runtime", "per_second", "profiling/", "num_tokens")
# The divergence check computes the logits of this many prompt tokens.
PROBE_TOKENS = 64
# The square of a larger float32 weight overflows, and so does every norm that contains it.
MAX_WEIGHT = 1e19
# The errors of the operating system for a folder that cannot be written.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class TrlEngine:
    """The engine that trains with TRL; `train.engine.Engine` documents its methods."""

    dataset: Any
    checkpoint: Checkpoint
    log: RunLog
    model: Any
    trainer: ResTTrainer | SFTTrainer | None = None
    recorder: Recorder
    tasks: EnvironmentEvaluator | None = None
    """Held-out tasks, if the run has an environment."""

    def __init__(self, config: RunConfig, layout: PromptLayout, observer: Observer, *, is_dry: bool = False) -> None:
        self.config, self.layout, self.observer = config, layout, observer
        self.args = make_trainer_config(config, is_dry=is_dry)

    @property
    def max_response_tokens(self) -> int:
        return int(self.args.max_completion_length or 1) if isinstance(self.args, ResTConfig) else 1

    def find_resume_point(self, log: RunLog) -> tuple[Checkpoint, list[str]]:
        return find_checkpoint(log, self.args.save_steps)

    def prepare(self, data: TrainingData, log: RunLog, checkpoint: Checkpoint) -> Checkpoint:
        self.dataset = self._build_dataset(data)
        self.probe_ids = data.prepared[0].prompt_ids[-PROBE_TOKENS:]
        if (log.folder / CONFIG).is_file():
            self._check_lengthening(read_run_file(log.folder / CONFIG), checkpoint)
        if checkpoint.is_last and checkpoint.step < self.steps:  # the run is being lengthened
            checkpoint = checkpoint._replace(is_last=False)
        self.checkpoint = checkpoint
        self._check_reference_model()
        table = replace(self.config.model, dtype=self.config.weights_dtype)
        if checkpoint.is_last:  # killed after its last step: save and evaluate its model
            table = replace(table, path=str(checkpoint.folder), adapter="")
        with self.observer.track("loading the model"):
            self.model, _ = load_policy(table, self.config.peft)
        return checkpoint

    # TRL loads the reference model of the KL term from the path in the model's configuration. After an adapter has been
    # merged, that is the base model without it.
    def _check_reference_model(self) -> None:
        has_merged_adapter = not self.config.peft and resolve_adapter(self.config.model)[1] is not None
        if has_merged_adapter and (beta := getattr(self.args, "beta", 0.0)):
            raise UserError(
                f"trl.beta is {beta}, but {self.config.model.path} is an adapter that is merged for training "
                "all weights, and the KL term would compare with its base model",
                remedy="save the merged model and train that, or add [peft]",
            )

    def _check_lengthening(self, recorded: RunConfig, checkpoint: Checkpoint) -> None:
        if any(recorded.trl.get(key) != self.config.trl.get(key) for key in LENGTH_KEYS):
            check_lengthening(self.args, checkpoint.step)

    def _build_dataset(self, data: TrainingData) -> Any:
        if isinstance(self.args, ResTConfig):
            check_prompt_count(len(data.prepared), self.args, self.config.env.path or self.config.data.path)
            if isinstance(data, EnvironmentData):
                self.tasks = EnvironmentEvaluator(data, self.layout, self.config)
                return build_dataset(make_rows(data, self.config.run.seed))
            return build_prompt_dataset(data.prepared, self.layout)
        rows, rejected = build_demonstrations(data.prepared, self.layout, self.args.max_length)
        data.reject(rejected)
        long = [each for each in rejected if each.is_too_long and self.config.data.too_long == "refuse"]
        if not rows or long:
            rejected = long or rejected
            raise make_rejection_error(rejected[0])
        return build_dataset(rows)

    def count_tokens(self, prepared: Sequence[Prepared]) -> list[int]:
        """Return the tokens of each prompt; in supervised training, the demonstration counts too."""
        if isinstance(self.args, ResTConfig):
            return [len(each.prompt_ids) for each in prepared]
        return [len(row["input_ids"]) for row in build_demonstrations(prepared, self.layout, self.args.max_length)[0]]

    def start(self, log: RunLog) -> None:
        self.log = log
        if self.checkpoint.is_last:
            assert self.checkpoint.folder is not None
            log.keep_model(self.checkpoint.folder)
            self.model.to(torch.accelerator.current_accelerator() or "cpu")
            return
        self.recorder = Recorder(log, self.observer, parse_toml(self.config.to_toml(), "the run"))
        shared: dict[str, Any] = {
            "model": self.model,
            "processing_class": self.layout.tokenizer,
            "peft_config": new_adapter_config(self.config),
            "callbacks": [self.recorder],
        }
        if isinstance(self.args, ResTConfig):
            record = ResponseRecord(self._write_responses, self.config.run.recorded_responses)
            shared |= self._make_rollouts(self.args, record) if self.tasks else {}
            reward = shared.pop("reward_funcs", None) or self._make_reward(self.args, record)
            self.trainer = ResTTrainer(args=self.args, reward_funcs=reward, train_dataset=self.dataset, **shared)
            self.trainer.on_generated = record.start_batch
            self.trainer.on_weighed = record.add_token_fields
            self.trainer.add_callback(FlushAtEnd(record))
        else:
            weights = self.config.rest.loss_weights()
            self.trainer = make_sft_trainer(self.args, self.layout, self.dataset, weights, **shared)
        if self.tasks is not None:
            credit = cast(ResTTrainer, self.trainer).credit
            self.observer.say(f"credit {credit}; env.thoughts = keep: those of earlier turns stay in the context")
        guard_saving(self.trainer, log.folder)
        self.trainer.remove_callback(PrinterCallback)  # `Recorder` shows the metrics instead
        self.model = self.trainer.model
        if self.is_sharded:
            self.observer.say("the model is sharded: it is not evaluated in the run; evaluate its model folder later")

    def _make_reward(self, args: ResTConfig, record: ResponseRecord) -> Callable[..., list[float]]:
        tool_format, tokenizer = get_format(self.config.rest.format), self.layout.tokenizer
        ends, shares, steps = get_stop_ids(tokenizer, self.model), optimizer_steps_per_batch(args), args.progress_steps
        reward = make_tool_reward(tokenizer, tool_format, args.method(), shares, args.seed, ends, steps)
        return with_response_record(reward, tokenizer, tool_format, record, ends, steps)

    def _make_rollouts(self, args: ResTConfig, record: ResponseRecord) -> dict[str, Any]:
        assert self.tasks is not None
        environment, tokenizer = self.tasks.environment, self.layout.tokenizer
        ends, limit = get_stop_ids(tokenizer, self.model), self.max_response_tokens
        rollouts = Rollouts(environment, self.layout, make_limits(self.config), ends, limit)
        tags = get_format(self.config.rest.format).tags
        reward = make_environment_reward(tokenizer, tags, record, args.progress_steps)
        return {"rollouts": rollouts, "reward_funcs": reward}

    def _write_responses(self, step: int, rows: Sequence[Row]) -> None:
        self.log.add_responses(rows)
        self.observer.on_responses(step, rows)

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        return count_work(self.args, [0] * len(self.dataset), int(self.args.world_size)).steps

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed manages the model, so that it cannot generate outside the trainer."""
        return self.trainer is not None and (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    def evaluate(self, prompts: Sequence[HeldOutPrompt]) -> dict[str, Any] | None:
        if self.is_sharded:
            return None
        if self.trainer is not None and self.trainer.state.global_step == 0:
            self.observer.say(
                f"evaluating before training: {len(prompts)} held-out prompts, sampled and greedy responses of at most "
                f"{prompts[0].limit} tokens each (to shorten: --set eval.prompts=N or eval.max_new_tokens=N; "
                "to skip: --set eval.prompts=0)"
            )
        with self._explaining_divergence(), self.autocast():
            if self.tasks is not None:
                return self.tasks.evaluate(self.model, prompts, self.observer)
            tokenizer, tool_format = self.layout.tokenizer, self.layout.format
            return evaluate_held_out(self.model, tokenizer, prompts, tool_format, self.config.eval, self.observer)

    # transformers wraps the model's forward pass when training begins, and each pass then narrows all weights again.
    # Around a whole generation they are narrowed once, and evaluations before and after training compute alike.
    def autocast(self) -> Any:
        """Return a context in which the model computes in the precision of training."""
        dtype = torch.float16 if self.args.fp16 else torch.bfloat16
        return torch.autocast(self.model.device.type, dtype, enabled=bool(self.args.bf16 or self.args.fp16))

    # Sampling from NaN logits raises a RuntimeError in torch.multinomial, or a failed assertion on a GPU.
    @contextmanager
    def _explaining_divergence(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            is_finite = True
            with suppress(RuntimeError):  # after a failed assertion every CUDA call raises
                is_finite = self.is_finite()
            if not is_finite:
                raise self.make_divergence_error() from error
            raise

    # Runs after every step, so it is cheap: one maximum norm per trained tensor, and one forward pass over 64 tokens.
    # Both are needed: the logits show NaN in frozen parts or overflow in the products, the norms show weights whose
    # squares overflow before the logits do. It draws no random numbers, so training stays bit-identical.
    def is_finite(self) -> bool:
        """Return whether the trained weights and the logits of a prompt are finite; True, unchecked, if sharded."""
        if self.is_sharded:
            return True
        model, was_training = self.model, self.model.training
        trained = [torch.linalg.vector_norm(p.detach(), math.inf) for p in model.parameters() if p.requires_grad]
        if trained and not torch.stack([norm.to(trained[0]) for norm in trained]).max() < MAX_WEIGHT:
            return False
        ids_BT = torch.tensor([self.probe_ids], device=model.device)
        model.eval()
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        model.train(was_training)
        return bool(torch.isfinite(logits_BTV).all())

    def make_divergence_error(self) -> UserError:
        step = self.checkpoint.step if self.trainer is None else self.trainer.state.global_step
        if step == 0:
            problem = f"the model {self.config.model.path} has infinite or NaN weights or logits"
            return UserError(problem, remedy="use another model or another model.dtype")
        kept = find_checkpoint(self.log, math.inf)[0].folder
        return UserError(
            f"the run diverged: infinite or NaN weights or logits after step {step}",
            remedy=f"lower trl.learning_rate (now {self.args.learning_rate:g}), set trl.max_grad_norm (now "
            f"{self.args.max_grad_norm:g}; 1 is usual) and start again with another --out"
            + (f"; the last checkpoint is {kept}" if kept else ""),
        )

    def run(self, after_step: AfterStep) -> StopPoint:
        trainer, begin = self.trainer, self.checkpoint
        if trainer is None:
            return StopPoint(begin.step)
        trainer.add_callback(AfterStepCallback(after_step, self))
        with (
            self._explaining_divergence(),
            self.observer.track("training", self.steps, begin.step),
            stop_on_signal(self.recorder, self.observer),
        ):
            trainer.train(resume_from_checkpoint=str(begin.folder) if begin.folder else None)
        step = int(trainer.state.global_step)
        return StopPoint(step, self.recorder.stop_requested and step < trainer.state.max_steps)

    def save_model(self) -> None:
        if self.trainer is None:
            return  # `start` copied it from the checkpoint
        with explain_write_errors(self.log.folder):
            # A collective operation: with FSDP or DeepSpeed every process sends its shard.
            self.trainer.save_model(str(self.log.model))


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if number := find_write_error(folder, error):
            raise unwritable_folder_error(folder, OSError(number, os.strerror(number))) from error
        raise


# Returns the errno if the folder is why a model was not written, else None: the exception may be a bug. An OSError has
# an errno; safetensors writes it into its message; torch's zip writer reports none. For torch, the newest
# file is extended by 1 MiB, which fails with the errno if the disk is full, and then truncated to its size.
def find_write_error(folder: Path, error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno if error.errno in WRITE_ERRORS else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1]) if int(found[1]) in WRITE_ERRORS else None
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        return None
    last = max(files, key=lambda path: path.stat().st_mtime_ns)
    size = last.stat().st_size
    try:
        with last.open("ab") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refused:
        return refused.errno
    finally:
        truncate_file(last, size)
    return None


# transformers writes a checkpoint's parts in `Trainer._save_checkpoint`; a full disk should not look like a bug.
def guard_saving(trainer: Any, folder: Path) -> None:
    save = trainer._save_checkpoint  # noqa: SLF001

    def guarded(*args: Any, **settings: Any) -> None:
        with explain_write_errors(folder):
            save(*args, **settings)

    trainer._save_checkpoint = guarded  # noqa: SLF001


# TRL's sampler drops the last incomplete batch: with fewer prompts than one batch it would train nothing, silently.
def check_prompt_count(prompts: int, args: ResTConfig, path: str) -> None:
    responses = cast(int, args.generation_batch_size)
    needed = responses // cast(int, args.num_generations)
    if prompts < needed:
        raise UserError(
            f"{path} gives {prompts} training prompts",
            f"at least {needed}, for one batch of {responses} responses",
            "lower trl.gradient_accumulation_steps or trl.per_device_train_batch_size, or add data",
        )


class Recorder(TrainerCallback):
    """Writes each step to the run folder, reports it to the observer, and ends training if `stop_requested` is set."""

    def __init__(self, log: RunLog, observer: Observer, table: Mapping[str, Any]) -> None:
        self.log, self.observer = log, observer
        self.stop_requested = False
        self._diagnosis = Diagnosis(table)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Pass the recorded rows of a resumed run to the diagnosis, so that it does not report problems twice."""
        rows = read_rows(self.log.folder / METRICS) if self.log.enabled else []
        evaluations = read_rows(self.log.folder / EVALUATIONS) if rows else []
        for row in rows:
            while evaluations and step_of(evaluations[0]) <= step_of(row):
                self.add_evaluation(evaluations.pop(0))
            self._diagnosis.add(row, state.max_steps)

    def add_evaluation(self, row: Row) -> None:
        """Pass an evaluation to the diagnosis, which checks it together with the next row of metrics."""
        self._diagnosis.add_evaluation(row)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the logged metrics and times to the run folder, and report metrics and new findings."""
        row = {"step": state.global_step}
        timing = {key: value for key, value in (logs or {}).items() if any(part in key for part in TIMING_KEYS)}
        metrics = {key: value for key, value in (logs or {}).items() if key not in timing}
        if "train_loss" not in metrics:  # the trainer's last line is a summary
            self.log.add_metrics(row | metrics)
            self.observer.on_step(state.global_step, state.max_steps, metrics)
            for finding in self._diagnosis.add(row | metrics, state.max_steps):
                self.observer.on_finding(finding)
        self.log.add_timing(row | timing)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if `stop_requested` is set and the current generation batch has been trained on completely."""
        if self.stop_requested and state.global_step % optimizer_steps_per_batch(args) == 0:
            control.should_save = control.should_training_stop = True


class AfterStepCallback(TrainerCallback):
    """Calls `after_step` after every optimizer step, before the step is logged and saved.

    Whenever a step's checkpoint exists, its evaluation is therefore in the run folder too. If the run has diverged,
    the step is logged and a UserError stops training.
    """

    def __init__(self, after_step: AfterStep, engine: TrlEngine) -> None:
        self.after_step, self.engine = after_step, engine
        self.has_diverged = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.has_diverged = not self.engine.is_finite()
        if self.has_diverged:
            control.should_log = True
        elif row := self.after_step(state.global_step):
            self.engine.recorder.add_evaluation(row)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.has_diverged:  # after the recorder has logged the step and before it is saved
            raise self.engine.make_divergence_error()


# The first Ctrl-C or SIGTERM requests a checkpoint and a stop after the current step, the second one stops at once.
# Python delivers signals to the main thread only; in another thread (a notebook, a server) nothing is installed.
@contextmanager
def stop_on_signal(recorder: Recorder, observer: Observer) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: types.FrameType | None) -> None:
        if recorder.stop_requested:
            raise KeyboardInterrupt
        recorder.stop_requested = True
        observer.say("stopping after this step; press Ctrl-C again to stop at once")

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

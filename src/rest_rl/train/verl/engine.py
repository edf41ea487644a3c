"""The engine verl: the same run file on a Ray cluster, followed from its folder and kept like any other run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rest_rl.config import RunConfig, parse_toml
from rest_rl.data.layout import PromptLayout
from rest_rl.errors import UserError
from rest_rl.runlog import EVALUATIONS, METRICS, Observer, RunLog, read_rows, unwritable
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.engine import AfterStep, Reached
from rest_rl.train.policy import base_and_adapter
from rest_rl.train.prompts import TrainingData
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

if TYPE_CHECKING:
    from rest_rl.evaluate.held_out import Prompt

LOG = "verl.log"
"""The file of the run folder that takes what verl, Ray and their workers print."""


class VerlEngine:
    """Trains with verl, on the Ray that is there or on one of this machine's own; see `train.engine.Engine`.

    verl measures the held-out prompts itself, before, during and after training.
    """

    log: RunLog
    checkpoint: Checkpoint
    job: VerlJob
    verl: Any
    total: int

    def __init__(self, config: RunConfig, layout: PromptLayout, observer: Observer) -> None:
        require_verl()
        self.config, self.layout, self.observer = config, layout, observer
        if unread := unread_trl(config):
            observer.say(f"the engine verl does not read trl.{', trl.'.join(unread)}")

    def resume_point(self, log: RunLog) -> tuple[Checkpoint, list[str]]:
        return find_verl_checkpoint(log)

    def prepare(self, data: TrainingData, log: RunLog, checkpoint: Checkpoint) -> Checkpoint:
        self._scratch = TemporaryDirectory()
        self.job = write_files(self.config, self.layout, data, log.folder, checkpoint, Path(self._scratch.name))
        self.verl = compose_config(self.config, self.job)
        self.total = total_steps(self.verl, self.job.num_train)
        self.checkpoint = checkpoint._replace(is_last=checkpoint.step >= self.total)
        return self.checkpoint

    def settings_text(self) -> str:
        """What verl gets, as YAML; after `prepare`."""
        return as_yaml(self.verl)

    def start(self, log: RunLog) -> None:
        self.log = log
        place_files(Path(self._scratch.name), log)
        self._scratch.cleanup()
        self.verl.trainer.val_before_train = is_unmeasured(log, self.verl, self.checkpoint)
        self.observer.say(f"what verl prints is in {LOG}")

    def evaluate(self, prompts: Sequence[Prompt]) -> Mapping[str, Any] | None:
        return None

    def run(self, after_step: AfterStep) -> Reached:
        """Run verl to the last step, or let it only measure what is not measured; UserError if it stops before."""
        if self.checkpoint.is_last and not self.verl.trainer.val_before_train:
            return Reached(self.total)
        log, table = self.log, parse_toml(self.config.to_toml(), "the run")
        follower = Follower(log, self.observer, table, self.total)
        again = f"go on with: rest-rl train --resume --out {log.folder}"
        try:
            with (
                self.observer.track("training", self.total, self.checkpoint.step),
                following(follower.look),
                printing_to(log.folder / LOG),
            ):
                run_on_ray(self.verl)
        except (KeyboardInterrupt, SystemExit):  # Ray makes the latter of SIGTERM
            return Reached(last_step(log), is_interrupted=True)
        except Exception as error:  # Ray wraps whatever a worker raised
            last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise UserError(
                f"a run that stopped on verl: {last.strip():.500}",
                f"{self.total} steps",
                f"see {log.folder / LOG}; {again}",
            ) from error
        if (reached := last_step(log)) < self.total:
            raise UserError(
                f"a run that ended on verl after step {reached}",
                f"{self.total} steps",
                f"see {log.folder / LOG}; {again}",
            )
        return Reached(self.total)

    def keep_model(self) -> None:
        if self.log.model.exists():
            return
        with self.observer.track("putting the model together"):
            merge_model(
                self.log.checkpoints / f"global_step_{self.total}",
                self.verl.actor_rollout_ref.actor.strategy,
                self.log.model,
                base=self.job.model,
                trust_remote_code=self.config.model.trust_remote_code,
            )


def write_files(
    config: RunConfig, layout: PromptLayout, data: TrainingData, folder: Path, checkpoint: Checkpoint, scratch: Path
) -> VerlJob:
    """Write what verl reads to `scratch`; the job names the files as they will lie in the run folder."""
    train = write_prompts([("train", prepared) for prepared in data.prepared], scratch / TRAIN_FILE)
    held_out = write_prompts(data.held_out, scratch / HELD_OUT_FILE) if data.held_out else None
    write_agent_loops(scratch)
    write_tokenizer(layout.tokenizer, scratch)
    model, adapter = base_and_adapter(config.model)
    if adapter is not None:
        raise UserError(
            f"the adapter {adapter} with the engine verl",
            "a whole model",
            "merge it first, or train it with the engine trl",
        )
    folder = folder.absolute()
    files = folder / FILES
    return VerlJob(
        folder=folder,
        train_file=files / TRAIN_FILE,
        held_out_file=files / HELD_OUT_FILE if held_out else None,
        num_train=train.rows,
        prompt_tokens=max(train.tokens, held_out.tokens if held_out else 0),
        model=str(Path(model).absolute() if Path(model).is_dir() else model),
        resume_from=checkpoint.folder.absolute() if checkpoint.folder else None,
        agent_loops=files / LOOPS_FILE,
        tokenizer=str(files / TOKENIZER),
    )


def place_files(scratch: Path, log: RunLog) -> None:
    """Put what verl reads into the run folder, which every machine of the cluster must see."""
    target = log.folder / FILES
    shutil.rmtree(target, ignore_errors=True)
    try:
        shutil.copytree(scratch, target)
    except OSError as error:
        raise unwritable(log.folder, error) from error


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


def last_step(log: RunLog) -> int:
    """The last step with metrics."""
    return max((row["step"] for row in read_rows(log.folder / METRICS)), default=0)


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Let everything but an observer, which holds on to its terminal, print to a file."""
    with path.open("a", encoding="utf-8", errors="replace") as file, redirect_stdout(file), redirect_stderr(file):
        yield

"""The engine `verl`: train on a Ray cluster, and report progress from the files that verl writes to the run folder."""

# pyright: reportMissingImports=false
# verl is installed in a separate environment.
from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_rl.config import RunConfig, parse_toml
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError
from rest_rl.jsonl import as_json
from rest_rl.report.diagnosis import Diagnosis
from rest_rl.runlog import (
    EVALUATIONS,
    METRICS,
    RESPONSES,
    Observer,
    Row,
    RunLog,
    read_rows,
    replace_file,
    unwritable_folder_error,
)
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.engine import AfterStep, StopPoint
from rest_rl.train.policy import load_generation_config, resolve_adapter
from rest_rl.train.prompts import TrainingData, build_dataset, gold_to_json
from rest_rl.train.reward import get_stop_ids
from rest_rl.train.verl.config import (
    HELD_OUT_FILE,
    LOOPS_FILE,
    TOKENIZER,
    TRAIN_FILE,
    VerlJob,
    compose_config,
    find_unread_keys,
    with_trl_defaults,
)
from rest_rl.train.verl.model import merge_model
from rest_rl.train.verl.responses import DATA_STATE_FILE, FAILED_METRIC, LOOP, PLUGIN, STATISTICS_FILE

if TYPE_CHECKING:
    from rest_rl.evaluate.held_out import HeldOutPrompt

# The file of the run folder with the output of verl, Ray and their workers.
LOG_FILE = "verl.log"
# Seconds that a run may take to leave the cluster after it ended.
SHUTDOWN_SECONDS = 30


class VerlEngine:
    """The engine that trains with verl, on a running Ray cluster or a local one; see `train.engine.Engine`.

    verl evaluates the held-out prompts itself, before, during and after training.
    """

    def __init__(self, config: RunConfig, layout: PromptLayout, observer: Observer) -> None:
        if missing := [name for name in ("verl", "transfer_queue") if importlib.util.find_spec(name) is None]:
            remedy = "in a separate environment, run pip install 'verl[verl-core]>=0.9,<0.10' (docs/cluster.md)"
            raise UserError(f"the verl engine requires the package {missing[0]}, which is not installed", remedy=remedy)
        self.config, self.layout, self.observer = config, layout, observer
        if unread := find_unread_keys(config):
            observer.say(f"the engine verl ignores {', '.join(unread)}; [verl] has its own keys for them")

    @property
    def max_response_tokens(self) -> int:
        return int(with_trl_defaults(self.config)["max_completion_length"])

    def find_resume_point(self, log: RunLog) -> tuple[Checkpoint, list[str]]:
        return find_checkpoint(log)

    def prepare(self, data: TrainingData, log: RunLog, checkpoint: Checkpoint) -> Checkpoint:
        model, adapter = resolve_adapter(self.config.model)
        if adapter is not None:
            remedy = "merge it, or set run.engine = 'trl'"
            raise UserError(f"verl cannot train the adapter {adapter}", "a whole model", remedy)
        self.data = data
        self.job = VerlJob(
            folder=log.folder.absolute(),
            model=str(Path(model).absolute() if Path(model).is_dir() else model),
            num_train=len(data.prepared),
            prompt_tokens=max(len(row.prompt_ids) for row in (*data.prepared, *(row for _, row in data.held_out))),
            ends=tuple(sorted(get_stop_ids(self.layout.tokenizer, load_generation_config(model)))),
            has_held_out=bool(data.held_out),
            resume_from=checkpoint.folder and checkpoint.folder.absolute(),
        )
        self.verl = compose_config(self.config, self.job)
        self.total = int(self.verl.trainer.total_training_steps)
        self.checkpoint = checkpoint._replace(is_last=checkpoint.step >= self.total)
        return self.checkpoint

    def to_yaml(self) -> str:
        """Return verl's configuration as YAML; call after `prepare`."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(self.verl)

    def start(self, log: RunLog) -> None:
        self.log = RunLog(self.job.folder)
        try:
            write_verl_files(self.data, self.layout.tokenizer, self.job.files)
        except OSError as error:
            raise unwritable_folder_error(log.folder, error) from error
        self.verl.trainer.val_before_train = needs_evaluation(self.log, self.verl.trainer, self.checkpoint)
        self.observer.say(f"the output of verl is in {LOG_FILE}")

    def evaluate(self, prompts: Sequence[HeldOutPrompt]) -> Mapping[str, Any] | None:
        return None

    def run(self, after_step: AfterStep) -> StopPoint:
        """Run verl to the last step; if only an evaluation is missing, run that. UserError if verl stops early."""
        if self.checkpoint.is_last and not self.verl.trainer.val_before_train:
            return StopPoint(self.total)
        poll = make_follower(self.log, self.observer, parse_toml(self.config.to_toml(), "the run"), self.total)
        path = self.log.folder / LOG_FILE
        remedy = f"see {path}; to continue: rest-rl train --resume --out {self.log.folder}"
        try:
            with (
                self.observer.track("training", self.total, self.checkpoint.step),
                call_repeatedly(poll),
                path.open("a", encoding="utf-8", errors="replace") as file,
                redirect_stdout(file),  # the observer keeps its own handle of the terminal
                redirect_stderr(file),
            ):
                run_on_ray(self.verl)
        except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit
            return StopPoint(read_last_step(self.log), is_interrupted=True)
        except Exception as error:  # Ray wraps a worker's exception
            with path.open("a", encoding="utf-8", errors="replace") as file:
                traceback.print_exception(error, file=file)
            last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise UserError(f"verl stopped before step {self.total} ({last.strip():.500})", remedy=remedy) from error
        if (reached := read_last_step(self.log)) < self.total:
            raise UserError(f"verl ended after step {reached} of {self.total}", remedy=remedy)
        return StopPoint(self.total)

    def save_model(self) -> None:
        if self.log.model.exists():
            return
        with self.observer.track("merging the model"):
            merge_model(
                self.log.checkpoints / f"global_step_{self.total}",
                self.verl.actor_rollout_ref.actor.strategy,
                self.log.model,
                base=self.job.model,
                trust_remote_code=self.config.model.trust_remote_code,
            )


# Files


def write_verl_files(data: TrainingData, tokenizer: Any, folder: Path) -> None:
    """Write the files that verl reads: prompts, the agent loop's configuration and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts((("train", row) for row in data.prepared), folder / TRAIN_FILE)
    if data.held_out:
        write_prompts(data.held_out, folder / HELD_OUT_FILE)
    loops = [{"name": LOOP, "_target_": f"{PLUGIN}.RenderedPromptLoop"}]
    replace_file(folder / LOOPS_FILE, as_json(loops, indent=2))  # JSON is YAML
    # Security: verl's workers would execute any remote code that the tokenizer references.
    tokenizer.save_pretrained(folder / TOKENIZER)
    path = folder / TOKENIZER / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    replace_file(path, as_json(settings, indent=2))


def write_prompts(rows: Iterable[tuple[str, Prepared]], path: Path) -> None:
    """Write prompts, each with the name of its split, to a Parquet file for verl.

    The column `prompt` contains one message with the rendered prompt, `data_source` the split, `reward_model` the gold
    as JSON text, and `extra_info` the sample's index, id and kind.
    """
    columns = (
        {
            "prompt": [{"role": "user", "content": row.prompt_text}],
            "data_source": split,
            "reward_model": {"style": "rule", "ground_truth": gold_to_json(row.sample)},
            "extra_info": {"id": row.sample.id, "kind": row.sample.kind, "index": index},
        }
        for index, (split, row) in enumerate(rows)
    )
    build_dataset(columns).to_parquet(str(path))


def find_checkpoint(log: RunLog) -> tuple[Checkpoint, list[str]]:
    """Return a run's newest complete checkpoint, or step 0 without one, and the names of newer incomplete ones."""
    matches = (re.fullmatch(r"global_step_(\d+)", path.name) for path in log.checkpoints.glob("*"))
    folders = {int(match[1]): match.string for match in matches if match}
    broken: list[str] = []
    for step, name in sorted(folders.items(), reverse=True):
        if is_complete(log.checkpoints / name):
            return Checkpoint(step, log.checkpoints / name), broken
        broken.append(name)
    return Checkpoint(0), broken


# verl writes the position in the data last: its file completes a checkpoint.
def is_complete(folder: Path) -> bool:
    try:
        table = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = any(path.is_file() for path in (folder / "actor").rglob("*"))
    return isinstance(table, list) and weights and zipfile.is_zipfile(folder / DATA_STATE_FILE)


def read_last_step(log: RunLog) -> int:
    return max((row["step"] for row in read_rows(log.folder / METRICS)), default=0)


# verl evaluates after it has saved: a run that is killed in between has a checkpoint without its evaluation, which the
# resumed run has to make up for.
def needs_evaluation(log: RunLog, trainer: Any, checkpoint: Checkpoint) -> bool:
    every, summary = trainer.test_freq, log.read_summary()
    if every <= 0 and not trainer.val_before_train:
        return False
    if checkpoint.step == 0:
        return bool(trainer.val_before_train) and "before" not in summary
    if checkpoint.is_last:
        return "after" not in summary
    evaluated = {row.get("step") for row in read_rows(log.folder / EVALUATIONS)}
    return checkpoint.step % every == 0 and checkpoint.step not in evaluated


# The run


def run_on_ray(config: Any, plugin: str = PLUGIN) -> None:
    """Run verl's trainer, which the module `plugin` registers, and wait for its end; its exceptions are raised here."""
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    class ReSTRunner(TaskRunnerV1.__ray_metadata__.modified_class):
        def run(self, config: Any) -> None:
            refuse_second_run()
            importlib.import_module(plugin)  # in this process, in which verl looks up the trainer
            super().run(config)

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # a user's rule may be next to the run file
    try:
        run_ppo(config, ray.remote(ReSTRunner))
    finally:
        ray.shutdown()


# verl 0.9 names its queue for the whole cluster: two runs would train on each other's responses.
def refuse_second_run() -> None:
    import ray

    for _ in range(SHUTDOWN_SECONDS):  # the queue of a run that was just killed may still exist
        try:
            ray.get_actor("TransferQueueController", namespace="transfer_queue")
        except ValueError:
            return
        time.sleep(1)
    raise UserError("another verl run uses this Ray cluster", "one run at a time", "wait, or start another cluster")


# Yields the rows appended to a JSONL file since the last call; an incomplete last line waits for its end.
def tail_jsonl(path: Path) -> Iterator[list[Row]]:
    at = path.stat().st_size if path.exists() else 0
    while True:
        complete = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(at)
                complete = b"".join(file.read().rpartition(b"\n")[:2])
        at += len(complete)
        yield [json.loads(line) for line in complete.split(b"\n") if line]


# Returns a function that reports what verl's driver has written since the last call; `table` is the run file.
def make_follower(log: RunLog, observer: Observer, table: Mapping[str, Any], total: int) -> Callable[[], None]:
    diagnosis = Diagnosis(table)
    tails = [tail_jsonl(log.folder / name) for name in (METRICS, RESPONSES, EVALUATIONS)]

    def poll() -> None:
        metrics, responses, evaluations = map(next, tails)
        for row in evaluations:
            diagnosis.add_evaluation(row)
        for row in metrics:
            observer.on_step(row["step"], total, row)
            if failed := row.get(FAILED_METRIC):
                observer.say(f"step {row['step']}: {failed:.0f} responses failed and were left out")
            for finding in diagnosis.add(row, total):
                observer.on_finding(finding)
        for step in dict.fromkeys(row["step"] for row in responses):
            observer.on_responses(step, [row for row in responses if row["step"] == step])

    for rows in tails:  # skip what an earlier process has reported
        next(rows)
    return poll


@contextmanager
def call_repeatedly(poll: Callable[[], None], seconds: float = 0.5) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            poll()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        poll()

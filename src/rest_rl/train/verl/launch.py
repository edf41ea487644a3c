"""A run on verl from the side of the command: its files, the checkpoint it goes on from, Ray, the model at the end."""

# pyright: reportMissingImports=false
# verl has an environment of its own.
from __future__ import annotations

import importlib
import importlib.util
import json
import re
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError
from rest_rl.jsonl import as_json
from rest_rl.runlog import RunLog, replace_file, unwritable
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.prompts import dataset_of, gold_text
from rest_rl.train.verl.names import DATA_STATE, LOOP, PLUGIN, STATE

FILES, TRAIN_FILE, HELD_OUT_FILE = "verl", "train.parquet", "held_out.parquet"
LOOPS_FILE, TOKENIZER = "agent_loops.yaml", "tokenizer"
"""The folder in a run folder that holds what verl reads, and its files."""
PATIENCE = 30
"""Seconds that an ended run may take to leave the cluster."""
STEP = re.compile(r"global_step_(\d+)")


class PromptFile(NamedTuple):
    """A Parquet file of prompts as verl reads it."""

    path: Path
    rows: int
    tokens: int
    """Of the longest prompt."""


def require_verl() -> None:
    """ValueError unless verl and what its trainer needs are installed."""
    for package, extra in (("verl", ""), ("transfer_queue", " (verl[verl-core])")):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--engine verl without the package {package}{extra}",
                "it",
                "pip install 'rest-rl[verl]', in an environment of its own (docs/cluster.md)",
            )


def write_prompts(samples: Iterable[tuple[str, Prepared]], path: Path) -> PromptFile:
    """Write prompts, each with its split, as verl reads them.

    Columns: `prompt`, one message whose content is the text that the model is given; `data_source`, the split;
    `reward_model`, with the gold as JSON text; `extra_info`, with index, id and kind of the sample.
    """
    pairs = list(samples)
    dataset = dataset_of(
        {
            "prompt": [{"role": "user", "content": prepared.prompt_text}],
            "data_source": split,
            "reward_model": {"style": "rule", "ground_truth": gold_text(prepared.sample)},
            "extra_info": {"id": prepared.sample.id, "kind": prepared.sample.kind, "index": index},
        }
        for index, (split, prepared) in enumerate(pairs)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(str(path))
    except OSError as error:
        raise unwritable(path.parent, error) from error
    return PromptFile(path, len(pairs), max(len(prepared.prompt_ids) for _, prepared in pairs))


def write_agent_loops(folder: Path) -> None:
    """The file that names the agent loop of this package."""
    loops = [{"name": LOOP, "_target_": f"{PLUGIN}.RenderedPromptLoop"}]
    replace_file(folder / LOOPS_FILE, as_json(loops, indent=2))  # JSON is YAML


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer as it was loaded here, without a reference to code: verl's workers would run any that there is."""
    target = folder / TOKENIZER
    tokenizer.save_pretrained(target)
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    replace_file(target / "tokenizer_config.json", as_json(settings, indent=2))


def find_verl_checkpoint(log: RunLog) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint of a run on verl and the names of newer broken ones; the beginning without any."""
    broken: list[str] = []
    folders = {int(match[1]): folder for folder in log.checkpoints.glob("*") if (match := STEP.fullmatch(folder.name))}
    for step, folder in sorted(folders.items(), reverse=True):
        if is_whole(folder):
            return Checkpoint(step, folder), broken
        broken.append(folder.name)
    return Checkpoint(0), broken


def total_steps(verl: Any, prompts: int) -> int:
    """The steps of a run as verl counts them: whole batches of responses."""
    if verl.trainer.total_training_steps is not None:
        return int(verl.trainer.total_training_steps)
    return prompts // int(verl.data.train_batch_size) * int(verl.trainer.total_epochs)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint holds region statistics, weights and, written last, the place in the data."""
    try:
        table = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = any(path.is_file() for path in (folder / "actor").rglob("*"))
    return isinstance(table, list) and weights and zipfile.is_zipfile(folder / DATA_STATE)


def run_on_ray(config: Any, plugin: str = PLUGIN) -> None:
    """Run verl's trainer on the Ray that is there, or on one of this machine's own; the module `plugin` registers it.

    Returns when the run has finished; whatever stops it is raised.
    """
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    class ReSTRunner(TaskRunnerV1.__ray_metadata__.modified_class):
        """The driver of a run, in a process that knows the trainer."""

        def run(self, config: Any) -> None:
            refuse_second_run()
            importlib.import_module(plugin)  # here, where verl looks the trainer up
            super().run(config)

    try:
        run_ppo(config, ray.remote(ReSTRunner))
    finally:
        ray.shutdown()


def refuse_second_run() -> None:
    """RuntimeError where another run uses this Ray: they would share a queue and learn from each other's responses."""
    import ray

    for _ in range(PATIENCE):  # a run that was killed a moment ago may still be there
        try:
            ray.get_actor("TransferQueueController", namespace="transfer_queue")
        except ValueError:
            return
        time.sleep(1)
    raise RuntimeError(
        "got a Ray cluster on which a run of verl is going on already, expected one run at a time; wait for it, or "
        "start another cluster"
    )

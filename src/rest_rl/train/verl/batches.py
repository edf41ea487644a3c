"""Batches and schedules: TRL counts responses per device and optimizer steps, verl prompts and batches of responses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.train.verl.trl_keys import ACTOR, ROLLOUT

PROMPTS, MINI = "data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size"
NODES, GPUS, N = "trainer.nnodes", "trainer.n_gpus_per_node", f"{ROLLOUT}.n"
TOTAL, EPOCHS = "trainer.total_training_steps", "trainer.total_epochs"
SAVE, TEST, BEGIN = "trainer.save_freq", "trainer.test_freq", "trainer.val_before_train"
RESPONSE, KEEP = "data.max_response_length", "trainer.max_actor_ckpt_to_keep"


@dataclass(frozen=True)
class Batches:
    """How responses are grouped; all numbers are of the whole cluster."""

    prompts: int
    """Prompts of one batch of responses."""
    mini: int
    """Prompts of one optimizer step."""
    responses: int
    """Responses to each prompt."""
    updates: int
    """Optimizer steps that learn from one batch of responses."""


def world_size(given: Mapping[str, Any]) -> int:
    """GPUs of the run: `[verl.trainer]` nnodes x n_gpus_per_node, one machine of 8 as in verl without them."""
    return int(given.get(NODES, 1)) * int(given.get(GPUS, 8))


def batches_of(table: Mapping[str, Any], given: Mapping[str, Any]) -> Batches:
    """The batch of responses and the optimizer step, from `[trl]` or, where it says so, `[verl]`.

    per_device_train_batch_size 8 x 8 GPUs x steps_per_generation 32 / num_generations 4 = 512 prompts a batch, and with
    gradient_accumulation_steps 4, 64 prompts a step. Several batches a step (steps_per_generation below
    gradient_accumulation_steps) are one batch here: nothing is learnt between them.
    """
    devices, responses = world_size(given), int(given.get(N, table["num_generations"]))
    if responses < 2:
        raise UserError(f"{responses} response to a prompt", "at least 2", "raise trl.num_generations")
    together, accumulated = table["per_device_train_batch_size"] * devices, table["gradient_accumulation_steps"]
    generation = _steps_per_generation(table, together)
    if PROMPTS not in given or MINI not in given:
        _check_steps(generation, accumulated, table["num_iterations"])
    prompts = given.get(PROMPTS) or _prompts(table, devices, max(generation, accumulated), responses)
    mini = given.get(MINI) or _prompts(table, devices, accumulated, responses)
    if prompts % mini:
        raise UserError(
            f"{prompts} prompts a batch (verl.{PROMPTS}) and {mini} an optimizer step (verl.{MINI})",
            "a multiple, or verl would fill up with empty rows",
            "change one of them",
        )
    epochs = int(given.get(f"{ACTOR}.ppo_epochs", table["num_iterations"]))
    return Batches(prompts, mini, responses, prompts // mini * epochs)


def _steps_per_generation(table: Mapping[str, Any], together: int) -> int:
    steps, size = table["steps_per_generation"], table["generation_batch_size"]
    if steps is not None and size is not None:
        raise UserError("trl.steps_per_generation and trl.generation_batch_size", "one", "remove the latter")
    if size is not None and size % together:
        raise UserError(
            f"trl.generation_batch_size = {size}",
            f"a multiple of {together}, the responses that all GPUs take at once",
            "change it",
        )
    return steps or (size // together if size is not None else table["gradient_accumulation_steps"])


def _check_steps(generation: int, accumulated: int, iterations: int) -> None:
    larger, smaller = max(generation, accumulated), min(generation, accumulated)
    if larger % smaller or (generation < accumulated and iterations > 1):
        raise UserError(
            f"trl.steps_per_generation = {generation}, trl.gradient_accumulation_steps = {accumulated} and "
            f"trl.num_iterations = {iterations}",
            "whole optimizer steps on one batch of responses",
            "make the first a multiple of the second",
        )


def _prompts(table: Mapping[str, Any], devices: int, steps: int, responses: int) -> int:
    per_device = table["per_device_train_batch_size"]
    total = per_device * devices * steps
    if total % responses:
        raise UserError(
            f"{per_device} responses x {devices} GPUs x {steps} = {total}",
            f"a multiple of {responses}, the responses to a prompt",
            f"change trl.per_device_train_batch_size or trl.gradient_accumulation_steps, or set verl.{PROMPTS} and "
            f"verl.{MINI}",
        )
    return total // responses


@dataclass(frozen=True)
class Schedule:
    """The length of the run and when something happens in it, counted in batches of responses."""

    total: int
    epochs: int
    save: int
    """Batches between two checkpoints; the last batch always has one, which becomes the run's model."""
    test: int
    """Batches between two measurements, -1 for none; the last batch is always measured."""
    warmup: int
    begin: bool
    """Whether a run that begins is measured before its first batch."""

    def settings(self, *, measures: bool, resumes: bool) -> dict[str, Any]:
        """In verl's words."""
        return {
            TOTAL: self.total,
            EPOCHS: self.epochs,
            SAVE: self.save,
            TEST: self.test if measures else -1,
            BEGIN: self.begin and measures and not resumes,
            f"{ACTOR}.optim.lr_warmup_steps": self.warmup,
        }


def schedule_of(
    config: RunConfig, table: Mapping[str, Any], given: Mapping[str, Any], batches: Batches, rows: int
) -> Schedule:
    """The schedule of a run over `rows` training prompts; ValueError for steps that are no whole batches."""
    an_epoch = rows // batches.prompts
    if not an_epoch:
        raise UserError(
            f"{rows} training prompts from {config.data.path}",
            f"at least {batches.prompts}, which one batch takes",
            "lower trl.steps_per_generation or verl.data.train_batch_size, or add data",
        )
    total = _total(table, given, batches, an_epoch)
    epochs = int(given.get(EPOCHS, -(-total // an_epoch)))
    if total > epochs * an_epoch:
        raise UserError(
            f"verl.{TOTAL} = {total} and verl.{EPOCHS} = {epochs} of {an_epoch} batches",
            "epochs enough for them, or the curriculum would end early",
            f"leave verl.{EPOCHS} out",
        )
    every = in_batches("eval.every", config.eval.every, batches) if TEST not in given else 0
    return Schedule(
        total=total,
        epochs=epochs,
        save=_save(table, given, batches, total),
        test=every or total,
        warmup=_warmup(table, given, batches, total),
        begin=bool(given.get(BEGIN, True)),
    )


def in_batches(name: str, steps: int, batches: Batches) -> int:
    """Optimizer steps as batches of responses, which verl counts; ValueError for a part of one."""
    if steps % batches.updates:
        raise UserError(
            f"{name} = {steps}",
            f"a multiple of {batches.updates}, the optimizer steps over one batch of responses, because verl counts "
            "batches",
            "change it",
        )
    return steps // batches.updates


def _total(table: Mapping[str, Any], given: Mapping[str, Any], batches: Batches, an_epoch: int) -> int:
    if (total := given.get(TOTAL)) is not None:
        return int(total)
    if (epochs := given.get(EPOCHS)) is not None:
        return int(epochs) * an_epoch
    if table["max_steps"] > 0:
        return in_batches("trl.max_steps", table["max_steps"], batches)
    return math.ceil(table["num_train_epochs"] * an_epoch)


def _save(table: Mapping[str, Any], given: Mapping[str, Any], batches: Batches, total: int) -> int:
    strategy, steps = str(table["save_strategy"]), table["save_steps"]
    if SAVE in given or strategy == "no":
        return total
    if strategy != "steps" or steps != int(steps) or steps < 1:
        raise UserError(
            f"trl.save_strategy = {strategy!r} and trl.save_steps = {steps}",
            "'steps' (or 'no') and whole steps",
            f"change them, or set verl.{SAVE}",
        )
    return in_batches("trl.save_steps", int(steps), batches)


def _warmup(table: Mapping[str, Any], given: Mapping[str, Any], batches: Batches, total: int) -> int:
    """Batches of warm-up: verl moves the learning rate once a batch, so it stands still within one."""
    ratio = table.get("warmup_ratio")  # gone from newer transformers
    steps = table["warmup_steps"] if ratio is None else ratio
    if table["lr_scheduler_type"] == "constant" or f"{ACTOR}.optim.lr_warmup_steps" in given:
        return 0
    return math.ceil(steps * total) if steps < 1 else in_batches("trl.warmup_steps", int(steps), batches)

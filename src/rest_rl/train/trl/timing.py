"""Measure what the parts of a run cost: a short generation, passes of one micro-batch, and an optimizer step.

The run's own trainer does the work, with the run's model, prompts and settings, so that all its optimizations count.
The responses are random: generation may not end early, its completions are repeated up to the wanted length, and the
advantages are 1 and -1, so that no group counts as learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from rest_rl.config import RunConfig
from rest_rl.data.layout import PromptLayout
from rest_rl.evaluate.generate import generate_draws
from rest_rl.evaluate.held_out import plan_draws, plan_rounds
from rest_rl.runlog import SILENT, RunLog
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.duration import Costs
from rest_rl.train.prompts import TrainingData
from rest_rl.train.trl.engine import TrlEngine
from rest_rl.train.trl.trainer import ResTTrainer

# Tokens after the first that a measured generation samples.
TIMED_TOKENS = 16
# Seconds that the prompts of a measured batch may take; the costs of a larger batch follow from a part of it.
MAX_PROMPT_SECONDS = 10.0
# Seconds of a first forward and backward pass above which it is not repeated.
MAX_WARM_UP = 3.0


def measure_costs(config: RunConfig, layout: PromptLayout, data: TrainingData, tokens: int) -> Costs:
    """Load the model and measure the costs of a run on TRL, its updates with responses of up to `tokens` tokens.

    Everything that the trainer writes goes to a temporary folder.
    """
    with TemporaryDirectory() as folder:
        engine = TrlEngine(replace(config, run=replace(config.run, out=folder)), layout, SILENT)
        log = RunLog(Path(folder), enabled=False)
        engine.prepare(data, log, Checkpoint(0))
        engine.start(log)
        trainer, args, held_out = cast(Any, engine.trainer), cast(Any, engine.args), [row for _, row in data.held_out]
        # What transformers sets when training begins.
        trainer.state.max_steps = max(1, engine.steps)
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        if args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        trainer.model.train()

        draws = plan_draws(config.eval)
        # The turns of an environment are generated for one draw at a time.
        rounds = [[draw] for draw in draws] if config.env.path else plan_rounds(engine.model, draws)

        def respond(rows: int, tokens: int) -> None:
            texts = [prepared.prompt_text for prepared in pick_evenly(held_out, rows)]
            settings: dict[str, Any] = {"max_new_tokens": tokens, "batch_size": rows}
            for together in rounds:
                generate_draws(engine.model, layout.tokenizer, texts, [draw for _, draw in together], **settings)

        sampled = evaluated = (0.0, 0.0)
        with engine.autocast():
            if isinstance(trainer, ResTTrainer):
                total = args.per_device_train_batch_size * args.steps_per_generation
                sampled = time_batch(lambda *size: sample(engine, *size), args.num_generations, total)
            if held_out:
                evaluated = time_batch(respond, 1, min(config.eval.batch_size, len(held_out)))
        return Costs(*sampled, *time_updates(engine, tokens), *evaluated)


# Two lengths give the seconds of the prompts and of one token; the first `unit` of rows warms the libraries up.
def time_batch(run: Callable[[int, int], Any], unit: int, total: int) -> tuple[float, float]:
    """Return the seconds of `run(total, tokens)` up to the first token, and of each further token."""
    run(unit, 2)
    rows = unit * max(1, min(total // unit, int(MAX_PROMPT_SECONDS / time_call(run, unit, 1))))
    first, whole = (time_call(run, rows, tokens) for tokens in (1, 1 + TIMED_TOKENS))
    return first * total / rows, max(0.0, whole - first) / TIMED_TOKENS * total / rows


def time_call(run: Callable[..., Any], *arguments: Any) -> float:
    begin = perf_counter()
    run(*arguments)
    return perf_counter() - begin


def sample(engine: TrlEngine, rows: int, tokens: int) -> dict[str, Any]:
    """Generate `rows` responses of exactly `tokens` tokens with the trainer, to prompts from all of the data."""
    trainer = cast(Any, engine.trainer)
    trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = tokens
    prompts = pick_evenly(range(len(engine.dataset)), rows // trainer.num_generations)
    inputs = [engine.dataset[index] for index in prompts for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(inputs)  # noqa: SLF001


def pick_evenly(items: Sequence[Any], number: int) -> list[Any]:
    return [items[index * len(items) // number] for index in range(number)]


# Returns the seconds of a micro-batch without response tokens, of one response token, and of the optimizer.
def time_updates(engine: TrlEngine, tokens: int) -> tuple[float, float, float]:
    trainer, args = cast(Any, engine.trainer), cast(Any, engine.args)
    if isinstance(trainer, ResTTrainer):
        size, group = args.per_device_train_batch_size, args.num_generations
        with engine.autocast():
            batch = sample(engine, ceil(size / group) * group, TIMED_TOKENS)
        rows = {key: value[:size] for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        batch |= rows | {"advantages": torch.tensor([1.0, -1.0]).repeat(size)[:size]}
        lengths = sorted({min(TIMED_TOKENS, tokens), tokens})
    else:
        batch, lengths = next(iter(trainer.get_train_dataloader())), [0]

    def update(length: int) -> None:
        with engine.autocast():
            loss = trainer.compute_loss(trainer.model, stretch(batch, length))
        trainer.accelerator.backward(loss)

    # The first pass allocates the gradients and warms the libraries up, which matters only if passes are short.
    if (first := time_call(update, lengths[0])) < MAX_WARM_UP:
        first = time_call(update, lengths[0])
    seconds = [first, *(time_call(update, length) for length in lengths[1:])]
    per_token = max(0.0, seconds[-1] - first) / max(1, lengths[-1] - lengths[0])
    optimizer = trainer.create_optimizer()
    optimizer.step()  # allocates the states
    return seconds[-1] - per_token * lengths[-1], per_token, time_call(optimizer.step)


def stretch(batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Return a batch in which every tensor (B, T) of the completions is repeated up to `tokens` tokens."""
    shape, changed = batch["completion_ids"].shape if tokens else None, dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape == shape and not key.startswith("prompt"):
            changed[key] = value.repeat(1, ceil(tokens / value.shape[1]))[:, :tokens]
    return changed

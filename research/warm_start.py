"""Supervised training of the small tool-world model from scratch: the warm start for reinforcement learning.

    OMP_NUM_THREADS=2 python -m research.warm_start --out model          the embedded model, in seven minutes
    python -m research.warm_start --set decision=call --out runs/call    the model of the second tool world
    python -m research.warm_start --set world=shop --out shop            the model of the shop, in four minutes

Training has three stages. Recall: pairs of words and quoted texts, until the model copies by content. Clean: correct
demonstrations. Narrow: most demonstrations make exactly one call, whatever the request needs. The model then almost
never makes two calls or refuses, although it once could; reinforcement learning has to find out when one call is wrong.
It is sure of its mistakes: a lower temperature does not correct them. In the shop, demonstrations are whole dialogues,
and most of those in the narrow stage are careless: they take the wrong order, or stop after an error.

The training loop is written out here because the data are generated on the fly, the stages share one optimizer, and the
head is applied only to labeled positions. A Trainer would add its bookkeeping to steps of a tenth of a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from research import shop_model
from research.command import run_command
from research.demonstrations import render_demonstration, render_single_call
from research.tool_world_model import build_model, build_recall_batch, build_tokenizer
from rest_rl.config import apply_overrides, override_fields
from rest_rl.data import shop
from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample, decompose
from rest_rl.data.tool_world import FILLER, Decision, dialogues
from rest_rl.errors import UserError
from rest_rl.train.policy import silence_transformers
from rest_rl.train.prompts import IGNORED_LABEL, encode_demonstration

RECORD_FILE = "warm_start.json"


@dataclass(frozen=True)
class WarmStartConfig:
    """The recipe of a shipped model; we found all values by trial."""

    world: Literal["tool_world", "shop"] = "tool_world"
    seed: int = 0
    hidden: int = 128
    layers: int = 3
    recall_steps: int = 2000
    """Upper limit; the stage ends once `recall_accuracy` is reached. Copying appears abruptly, early or late."""
    recall_accuracy: float = 0.95
    recall_pairs: int = 6
    recall_batch: int = 16
    clean_steps: int = 1200
    narrow_steps: int = 200
    batch_size: int = 32
    learning_rate: float = 2e-3
    narrow_learning_rate: float = 1e-3
    single_call: float = 0.9
    """Share of the narrow stage's demonstrations that make exactly one call, whatever the request needs."""
    careless: float = 0.9
    """Share of the narrow stage's careless demonstrations in the shop."""
    decision: Decision = "reasoning"
    """Where demonstrations decide what to call: in the reasoning, or in the call after filler reasoning."""
    # Filler is random and cannot be predicted; trained on in full, its loss would swamp the loss of the call.
    filler_share: float = 0.2
    """Share of the filler tokens that are trained on."""

    def __post_init__(self) -> None:
        steps = (self.recall_steps, self.clean_steps, self.narrow_steps)
        if min(steps) < 0 or min(self.layers, self.recall_pairs, self.recall_batch, self.batch_size) < 1:
            raise UserError(f"a value of the recipe is out of range: {self}", "steps >= 0 and sizes >= 1", "change it")
        if self.hidden < 64 or self.hidden % 8:
            raise UserError(f"hidden is {self.hidden}", "a multiple of 8, at least 64", "try 128")
        if self.decision not in get_args(Decision) or not 0 < self.filler_share <= 1:
            expected = "decision reasoning or call, and filler_share in (0, 1]"
            raise UserError(f"a value of the recipe is out of range: {self}", expected, "change it")
        if self.world not in ("tool_world", "shop") or not 0 <= self.careless <= 1:
            expected = "world tool_world or shop, and careless in [0, 1]"
            raise UserError(f"a value of the recipe is out of range: {self}", expected, "change it")
        if not (0 <= self.single_call <= 1 and self.learning_rate > 0 and self.narrow_learning_rate > 0):
            expected = "single_call in [0, 1] and learning rates > 0"
            raise UserError(f"a value of the recipe is out of range: {self}", expected, "change it")


RECIPES = {
    "tool_world": WarmStartConfig(),
    "shop": WarmStartConfig("shop", recall_steps=0, clean_steps=450, narrow_steps=100, batch_size=16),
}
"""The recipes of the shipped models."""


class Batch(NamedTuple):
    """Token ids and labels, both (B, T), padded on the right; labels are -100 for tokens that are not trained on."""

    ids: Tensor
    labels: Tensor


class Stage(NamedTuple):
    """A training stage of at most `steps` steps; it ends once the mean accuracy exceeds `stop_accuracy`."""

    name: str
    steps: int
    learning_rate: float
    decay: float
    stop_accuracy: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate, which rises over 50 steps and falls to 5 % over the last `decay` of the stage."""
        left = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.learning_rate * min(1.0, step / 50) * max(0.05, min(1.0, left))


def warm_start(
    config: WarmStartConfig | None = None, out: str | Path = "runs/sft", log: Callable[[str], Any] = print
) -> Path:
    """Train the small model; save it to `out` with its tokenizer, the recipe and the result of each stage.

    Deterministic for a seed on one machine with one number of threads. A progress bar shows stage, loss and accuracy.
    """
    config, out = config or WarmStartConfig(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    if config.world == "shop":
        tokenizer = shop_model.build_tokenizer()
        model = shop_model.build_model(tokenizer)
    else:
        tokenizer = build_tokenizer(config.decision)
        model = build_model(tokenizer, hidden=config.hidden, layers=config.layers)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")
    # beta2 = 0.98 adapts faster than the default when the loss changes between stages.
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    # One generator and one optimizer for all stages: the order of the draws is part of the recipe.
    batches = (draw_shop_batches if config.world == "shop" else draw_tool_world_batches)(config, tokenizer, rng)
    stages = (
        Stage("recall", config.recall_steps, config.learning_rate, 0.0, config.recall_accuracy),
        Stage("clean", config.clean_steps, config.learning_rate, 0.5),
        Stage("narrow", config.narrow_steps, config.narrow_learning_rate, 0.5),
    )
    record: dict[str, Any] = {"recipe": dataclasses.asdict(config)}
    for stage in stages:
        record[stage.name] = done = run_stage(model, optimizer, batches[stage.name], stage)
        log(f"{stage.name}: {done['steps']} steps, loss {done['loss']:.3f}, accuracy {done['accuracy']:.3f}")
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out


def draw_tool_world_batches(config: WarmStartConfig, tokenizer: Any, rng: random.Random) -> dict[str, Iterator[Batch]]:
    # The endless batches of each stage.
    pairs = (config.recall_batch, config.recall_pairs, config.decision)
    recall = (Batch(*build_recall_batch(tokenizer, rng, *pairs)) for _ in iter(int, 1))
    world, layout = generate_samples(config.seed, config.decision), PromptLayout(tokenizer)
    narrow = generate_batches(world, layout, rng, config, config.single_call)
    return {"recall": recall, "clean": generate_batches(world, layout, rng, config), "narrow": narrow}


def draw_shop_batches(config: WarmStartConfig, tokenizer: Any, rng: random.Random) -> dict[str, Iterator[Batch]]:
    tasks = shop.tasks(1_000_000 + config.seed)

    def draw(careless: float) -> Iterator[Batch]:
        while True:
            chosen = itertools.islice(tasks, config.batch_size)
            drawn = [shop_model.demonstrate(task, rng, careless) for task in chosen]
            rows = [shop_model.encode_dialogue(dialogue, tokenizer) for dialogue in drawn]
            yield pad_batch(rows, tokenizer.pad_token_id)

    return {"recall": iter(()), "clean": draw(0.0), "narrow": draw(config.careless)}


def generate_samples(seed: int, decision: Decision = "reasoning") -> Iterator[ToolSample]:
    # Endless training samples, from seeds far from those that a run is likely to use for its prompts.
    for dialogue in dialogues(1_000_000 + seed, decision=decision):
        yield from decompose(dialogue)


def generate_batches(
    samples: Iterator[ToolSample],
    layout: PromptLayout,
    rng: random.Random,
    config: WarmStartConfig,
    single_call: float = 0.0,
) -> Iterator[Batch]:
    # Prompts followed by demonstrations, labeled on the demonstration. Rows are not sorted by length, because length
    # depends on the kind of sample and every batch should contain all kinds.
    filler = set(layout.tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in FILLER]))
    skipped = 1 - config.filler_share if config.decision == "call" else 0.0
    while True:
        rows = []
        for sample in itertools.islice(samples, config.batch_size):
            is_narrow = rng.random() < single_call
            response = render_single_call(sample, rng) if is_narrow else render_demonstration(sample)
            ids, labels = encode_demonstration(layout.render(sample), response, layout.tokenizer)
            # Drawn anew for each token and batch, so every filler token is trained on now and then.
            if skipped:
                labels = [IGNORED_LABEL if at in filler and rng.random() < skipped else at for at in labels]
            rows.append((ids, labels))
        yield pad_batch(rows, layout.tokenizer.pad_token_id)


def pad_batch(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    # Padding on the right needs no attention mask in a causal model.
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([labels + [IGNORED_LABEL] * (width - len(labels)) for _, labels in rows])
    return Batch(ids_BT, labels_BT)


# Train one stage; return the number of steps and moving averages of loss and accuracy.
def run_stage(model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], stage: Stage) -> dict[str, float]:
    averages = {"loss": 0.0, "accuracy": 0.0}
    step = 0
    model.train()
    with tqdm(total=stage.steps, desc=stage.name, mininterval=1.0) as bar:
        for step in range(1, stage.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate_at(step)
            # A plain mean over the first 20 steps, then an exponential moving average: no bias towards the initial 0.
            measured = train_step(model, optimizer, next(batches))
            keep = min(0.95, (step - 1) / step)
            averages = {key: keep * old + (1 - keep) * measured[key] for key, old in averages.items()}
            bar.update()
            bar.set_postfix(averages, refresh=False)
            if averages["accuracy"] > stage.stop_accuracy:
                break
    return {"steps": step, **averages}


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    # The head is applied only to labeled positions: its (B, T, V) logits would be most of the cost of a step.
    is_labelled = batch.labels[:, 1:] != IGNORED_LABEL
    labels_N = batch.labels[:, 1:][is_labelled]
    hidden_BTH = model.model(batch.ids, use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH[:, :-1][is_labelled])
    loss = torch.nn.functional.cross_entropy(logits_NV, labels_N)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"loss": loss.item(), "accuracy": (logits_NV.argmax(-1) == labels_N).float().mean().item()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m research.warm_start", description="Train the small model of the tool world from scratch."
    )
    parser.add_argument("--out", default="runs/sft", metavar="DIR", help="output folder (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set one value of the recipe")
    arguments = parser.parse_args(argv)
    silence_transformers()

    def work() -> None:
        changes = apply_overrides({}, arguments.set)
        recipe = RECIPES.get(str(changes.get("world")), WarmStartConfig())
        warm_start(override_fields(recipe, changes, "recipe"), arguments.out)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())

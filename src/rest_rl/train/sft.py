"""Supervised training: the warm start of the tool world from nothing, or a given model on given samples.

The warm start has three stages. Recall: pairs of words and quoted texts, until the model copies by content. Clean:
right demonstrations. Noisy: a share of the demonstrations has one defect, so that sampling at temperature 1 errs in
ways a reward can see and reinforcement learning has something to do, while greedy decoding errs much less.

Its loop is our own and short: the data are endless and drawn on the way, three stages share one optimizer, and the
head is applied to labelled positions only; a Trainer would add its bookkeeping to steps of a tenth of a second.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rest_rl.config import ModelTable
from rest_rl.data.samples import ToolSample, decompose, load_samples
from rest_rl.data.tool_world import corrupted_demonstration, demonstration, dialogues
from rest_rl.train.policy import load_policy
from rest_rl.train.prompts import render_prompt
from rest_rl.train.tool_world_model import build_model, build_tokenizer, recall_batch

RECORD = "warm_start.json"
IGNORED = -100
FINE_TUNING = ("model", "data", "format", "region_weights", "trl")
"""Fields that the warm start does not read."""


@dataclass(frozen=True)
class SftConfig:
    """The recipe of the shipped model (all numbers ours, found by trial), or with `model` set a fine-tuning."""

    model: str = ""
    """Model to fine-tune, a directory or hub name; empty for the warm start from nothing."""
    data: str = ""
    """JSONL file of samples to fine-tune on."""
    format: str = "toolrl"
    region_weights: Mapping[str, float] = field(default_factory=dict)
    """Loss weight by region of a fine-tuning, such as `name = 2.0`; 1 where absent."""
    trl: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TRL's SFTConfig for a fine-tuning."""
    seed: int = 0
    hidden: int = 128
    layers: int = 3
    recall_steps: int = 2000
    """At most; the stage ends when `recall_accuracy` is reached. The circuit appears all at once, early or late."""
    recall_accuracy: float = 0.95
    recall_pairs: int = 6
    recall_batch: int = 16
    clean_steps: int = 1200
    noisy_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 2e-3
    noisy_learning_rate: float = 1e-3
    corruption: float = 0.5
    """Share of the noisy stage's demonstrations that have a defect."""

    def __post_init__(self) -> None:
        """ValueError for numbers outside their range."""
        if bool(self.model) != bool(self.data):
            raise ValueError(
                f"got model {self.model!r} and data {self.data!r}; expected both or neither; set the other"
            )
        steps = (self.recall_steps, self.clean_steps, self.noisy_steps)
        if min(steps) < 0 or min(self.layers, self.recall_pairs, self.recall_batch, self.batch_size) < 1:
            raise ValueError(f"got {self}; expected steps >= 0 and sizes >= 1; mend the field that is not")
        if self.hidden < 64 or self.hidden % 8:
            raise ValueError(f"got hidden {self.hidden}; expected a multiple of 8 from 64 on; try 128")
        if not (0 <= self.corruption <= 1 and self.learning_rate > 0 and self.noisy_learning_rate > 0):
            raise ValueError(f"got {self}; expected corruption in [0, 1] and learning rates > 0")


class Batch(NamedTuple):
    """Token ids and labels, both (B, T), right padded; labels are -100 where nothing is learnt."""

    ids: Tensor
    labels: Tensor


class Stage(NamedTuple):
    """A stretch of training: at most `steps` steps, ended early by a moving average of the accuracy above `until`."""

    name: str
    steps: int
    learning_rate: float
    decay: float
    until: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate rises over 50 steps and falls to a twentieth over the last `decay` of the stage."""
        left = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.learning_rate * min(1.0, step / 50) * max(0.05, min(1.0, left))


def sft(config: SftConfig | None = None, out: str | Path = "runs/sft", say: Callable[[str], Any] = print) -> Path:
    """Train and save model and tokenizer in `out`; returns `out`.

    Deterministic for a seed on one machine and number of threads. A progress bar shows stage, loss and accuracy.
    """
    config, out = config or SftConfig(), Path(out)
    if not config.model:
        return warm_start(config, out, say)
    from rest_rl.train.fine_tune import fine_tune  # TRL's SFTTrainer takes seconds to import

    samples = load_samples(config.data)
    model, tokenizer = load_policy(ModelTable(path=config.model))
    say(f"{config.model}: {len(samples)} samples from {config.data}")
    trl = {"seed": config.seed, **config.trl}
    return fine_tune(
        model, tokenizer, samples, out, tool_format=config.format, region_weights=config.region_weights, trl=trl
    )


def warm_start(config: SftConfig, out: Path, say: Callable[[str], Any]) -> Path:
    """Train the small model from nothing; its folder also holds the recipe and what each stage reached."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden=config.hidden, layers=config.layers)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} pieces")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    recall = (Batch(*recall_batch(tokenizer, rng, config.recall_batch, config.recall_pairs)) for _ in iter(int, 1))
    world = endless_samples(config.seed)
    clean = demonstration_batches(world, tokenizer, rng, config.batch_size)
    noisy = demonstration_batches(world, tokenizer, rng, config.batch_size, config.corruption)
    stages = (
        (Stage("recall", config.recall_steps, config.learning_rate, 0.0, config.recall_accuracy), recall),
        (Stage("clean", config.clean_steps, config.learning_rate, 0.5), clean),
        (Stage("noisy", config.noisy_steps, config.noisy_learning_rate, 0.5), noisy),
    )
    record: dict[str, Any] = {
        "recipe": {name: value for name, value in dataclasses.asdict(config).items() if name not in FINE_TUNING}
    }
    for stage, batches in stages:
        record[stage.name] = done = run_stage(model, optimizer, batches, stage)
        say(f"{stage.name}: {done['steps']} steps, loss {done['loss']:.3f}, accuracy {done['accuracy']:.3f}")
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out


def endless_samples(seed: int) -> Iterator[ToolSample]:
    """Training samples without end; far from the seeds a run is likely to draw its prompts from."""
    for dialogue in dialogues(1_000_000 + seed):
        yield from decompose(dialogue)


def demonstration_batches(
    samples: Iterator[ToolSample],
    tokenizer: Any,
    rng: random.Random,
    batch_size: int,
    corruption: float = 0.0,
) -> Iterator[Batch]:
    """Batches of prompt and demonstration, labels on the demonstration.

    Rows are not sorted by length: lengths go with kinds, and every batch should hold all kinds.
    """
    while True:
        rows = []
        for sample in itertools.islice(samples, batch_size):
            is_spoilt = rng.random() < corruption
            response = corrupted_demonstration(sample, rng) if is_spoilt else demonstration(sample)
            rows.append(encode(render_prompt(sample, tokenizer), response, tokenizer))
        yield pad(rows, tokenizer.pad_token_id)


def encode(prompt: str, response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of a prompt and its response, which ends with the end-of-sequence token."""
    prompt_ids, response_ids = tokenizer([prompt, response], add_special_tokens=False)["input_ids"]
    response_ids = [*response_ids, tokenizer.eos_token_id]
    return prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids


def pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """Rows of (ids, labels) as one batch, padded on the right, where a causal model needs no mask."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return Batch(ids_BT, labels_BT)


def run_stage(model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], stage: Stage) -> dict[str, float]:
    """Take the steps of a stage; returns their number and moving averages of loss and accuracy."""
    averages = {"loss": 0.0, "accuracy": 0.0}
    step = 0
    model.train()
    with tqdm(total=stage.steps, desc=stage.name, mininterval=1.0) as bar:
        for step in range(1, stage.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = stage.rate_at(step)
            measured = train_step(model, optimizer, next(batches))
            keep = min(0.95, (step - 1) / step)
            averages = {key: keep * old + (1 - keep) * measured[key] for key, old in averages.items()}
            bar.update()
            bar.set_postfix(averages, refresh=False)
            if averages["accuracy"] > stage.until:
                break
    return {"steps": step, **averages}


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """One step on the mean cross entropy of the labelled tokens, gradient norm clipped to 1."""
    is_labelled = batch.labels[:, 1:] != IGNORED
    labels_N = batch.labels[:, 1:][is_labelled]
    hidden_BTH = model.model(batch.ids, use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH[:, :-1][is_labelled])
    loss = torch.nn.functional.cross_entropy(logits_NV, labels_N)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"loss": loss.item(), "accuracy": (logits_NV.argmax(-1) == labels_N).float().mean().item()}

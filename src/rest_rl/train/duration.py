"""Predict how long a run takes from the measured costs of its parts (`rest_rl.train.trl.timing` measures them)."""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """A figure if all responses are as long as gold, and if all are as long as the limit."""

    low: float
    high: float

    def __str__(self) -> str:
        low, high = format_seconds(self.low), format_seconds(self.high)
        return f"about {low}" if low == high else f"about {low} to {high}"


class Costs(NamedTuple):
    """Measured seconds of the parts of a run, on this machine and under its present load."""

    batch: float  # the prompts of a generation batch, and the first token of all its responses
    batch_token: float  # each further token of all its responses
    micro_batch: float  # a forward and backward pass without response tokens
    micro_batch_token: float  # one more token of each of its responses
    optimizer: float
    held_out_batch: float  # as `batch`, of a batch of held-out prompts, in all draws of an evaluation
    held_out_token: float


class Amounts(NamedTuple):
    """What a run computes; `tokens` are those of a batch's longest response, in an environment of one turn."""

    tokens: Range
    steps_per_batch: int  # optimizer steps per generation batch
    micro_batches: int  # per optimizer step
    steps: int
    held_out_tokens: Range
    held_out_batches: int  # of one evaluation
    evaluations: float  # of the run; interim evaluations count by their share of the prompts
    turns: float = 1.0  # responses per rollout


class Duration(NamedTuple):
    """The predicted seconds of a run: generation and update per optimizer step, one evaluation, and everything."""

    generation: Range
    update: Range
    evaluation: Range
    run: Range


# Every part is linear in the response tokens. Generation and evaluation have the first token in their fixed part, and
# repeat everything in each turn. The tools' time and results are not known, and not counted.
def predict_duration(costs: Costs, amounts: Amounts) -> Duration:
    """Return the predicted duration of a run with these costs and amounts."""
    rows: list[tuple[float, ...]] = []
    for tokens, held_out_tokens in zip(amounts.tokens, amounts.held_out_tokens, strict=True):
        generation = amounts.turns * (costs.batch + costs.batch_token * max(0, tokens - 1)) / amounts.steps_per_batch
        update = costs.micro_batch + costs.micro_batch_token * amounts.turns * tokens
        update = amounts.micro_batches * update + costs.optimizer
        evaluation = costs.held_out_batch + costs.held_out_token * max(0, held_out_tokens - 1)
        evaluation *= amounts.held_out_batches * amounts.turns
        run = amounts.steps * (generation + update) + amounts.evaluations * evaluation
        rows.append((generation, update, evaluation, run))
    return Duration(*map(Range, *rows))


def format_seconds(seconds: float) -> str:
    """Format seconds as s, min or h, below 10 with one decimal."""
    unit, size = ("h", 3600) if seconds >= 5400 else ("min", 60) if seconds >= 90 else ("s", 1)
    return f"{seconds / size:.{int(seconds / size < 9.95)}f} {unit}"

"""What of a run's configuration the diagnosis reads, with mistrust: a value of another type counts as the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rest_rl.report.diagnosis.history import is_number

CURRICULUM = {
    "format": ("decay_format", -1.0),
    "arguments": ("gain_arguments", 1.0),
    "reasoning": ("gain_reasoning", 1.0),
    "answer": ("gain_reasoning", 1.0),
}
"""Which key of `[rest] weights` moves which region, and where."""
COLD = 0.5
"""Temperature from which on downwards responses differ little: at it the odds of any two tokens are squared."""


@dataclass(frozen=True)
class Settings:
    """What of a run's configuration the symptoms read."""

    group: int = 8
    """Responses to a prompt."""
    max_length: int | None = None
    """Tokens of a response at most."""
    temperature: float | None = None
    """Of sampling; None if unknown."""
    learning_rate: float | None = None
    max_norm: float = 1.0
    """Gradient norm that is clipped to; 0 for no clip."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    is_half_precision: bool = False
    """Whether a loss scale may skip steps (float16)."""
    clip: tuple[float, float] | None = None
    """Least and largest weight of a region."""
    strength: float | None = None
    shifts: Mapping[str, float] = field(default_factory=dict)
    """How far the curriculum moves the weight of a region by the end, by label; those that it leaves are not there."""
    is_shuffled: bool = False
    """Whether regions get one another's weights."""
    sampling: Mapping[str, float] | None = None
    """Settings that sample from another distribution than the policy's own, with their values."""
    total: int = 0
    """Steps of the whole run; 0 if unknown."""

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Settings:
        """Read from config.toml's table; what is missing or of another type counts as the default."""
        trl, rest = table_at(table, "trl"), table_at(table, "rest")
        weights = table_at(rest, "weights")
        bounds = (number_at(weights, "w_min"), number_at(weights, "w_max"))
        length = number_at(trl, "max_completion_length")
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
        altered = {f"trl.{name}": trl[name] for name, value in neutral.items() if trl.get(name, value) != value}
        return cls(
            group=max(2, int(number_at(trl, "num_generations") or 8)),
            max_length=None if length is None else int(length),
            temperature=number_at(trl, "temperature"),
            learning_rate=number_at(trl, "learning_rate"),
            max_norm=1.0 if (norm := number_at(trl, "max_grad_norm")) is None else norm,
            beta2=number_at(trl, "adam_beta2") or 0.999,
            is_half_precision=trl.get("fp16") is True,
            clip=None if None in bounds else (bounds[0] or 0.0, bounds[1] or 0.0),
            strength=number_at(weights, "strength"),
            shifts=shifts_of(weights),
            is_shuffled=weights.get("rule") == "permuted",
            sampling=altered,
            total=int(number_at(trl, "max_steps") or 0),
        )

    def lasting(self, total: int) -> Settings:
        """The same of a run of `total` steps, unless its configuration says how many."""
        return self if self.total > 0 else replace(self, total=total)

    def shift(self, region: str, step: int) -> float:
        """How far the curriculum has moved a region's weight at a step; 0 where that is not known."""
        return self.shifts.get(region, 0.0) * min(1.0, max(0, step - 1) / (self.total - 1)) if self.total > 1 else 0.0

    @property
    def most_groups(self) -> float:
        """The share of responses that leaves a mark on most groups: 1 - (1 - s)^G > 1/2; 0.083 for groups of 8."""
        return 1 - 0.5 ** (1 / self.group)

    @property
    def is_cold(self) -> bool:
        """Whether sampling is so far below temperature 1 that responses to a prompt are much alike."""
        return self.temperature is not None and self.temperature <= COLD

    @property
    def at_limit(self) -> str:
        """` of 96 tokens`, empty if the limit is unknown."""
        return f" of {self.max_length} tokens" if self.max_length else ""

    @property
    def slower(self) -> str:
        """The advice to take smaller steps."""
        now = "" if self.learning_rate is None else f" (now {self.learning_rate:g})"
        return f"lower trl.learning_rate{now} and begin anew"

    @property
    def longer_or_slower(self) -> str:
        """The advice for responses that have grown."""
        return f"read those that are cut off: if they make sense raise trl.max_completion_length, else {self.slower}"


def shifts_of(weights: Mapping[str, Any]) -> dict[str, float]:
    """What the curriculum adds to each region's weight by the end of the run: its constants times the strength."""
    strength = number_at(weights, "strength")
    strength = 1.0 if strength is None else strength
    shifts = {label: strength * way * (number_at(weights, key) or 0.0) for label, (key, way) in CURRICULUM.items()}
    return {label: shift for label, shift in shifts.items() if shift}


def table_at(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table within a table, empty if it is none."""
    value = table.get(key)
    return value if isinstance(value, Mapping) else {}


def number_at(table: Mapping[str, Any], key: str) -> float | None:
    """A number in a table."""
    value = table.get(key)
    return float(value) if is_number(value) else None

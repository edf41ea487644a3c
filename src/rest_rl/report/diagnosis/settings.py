"""What of a run's configuration the diagnosis reads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rest_rl.config import RunConfig
from rest_rl.report.diagnosis.history import has_finite_square
from rest_rl.weights import WeightConfig

CURRICULUM_FIELDS = {
    "format": ("decay_format", -1.0),
    "arguments": ("gain_arguments", 1.0),
    "reasoning": ("gain_reasoning", 1.0),
    "answer": ("gain_reasoning", 1.0),
}
"""Which field of the package's weight rules moves which region, and where."""
LOW_TEMPERATURE = 0.5
"""Temperature from which on downwards responses differ little: at it the odds of any two tokens are squared."""
NEUTRAL_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class DiagnosisSettings:
    """What of a run's configuration the symptoms read; what it does not say is the trainer's default."""

    group_size: int = 8
    max_length: int | None = None
    """Tokens of a response at most."""
    temperature: float | None = None
    learning_rate: float | None = None
    max_norm: float = 1.0
    """Gradient norm that is clipped to; 0 for no clip."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    is_half_precision: bool = False
    """Whether a loss scale may skip steps (float16)."""
    weight_clip: tuple[float, float] | None = None
    """Least and largest weight of a region."""
    strength: float | None = None
    curriculum_shifts: Mapping[str, float] = field(default_factory=dict)
    """How far the curriculum moves the weight of a region by the end, by label; others are not there."""
    is_shuffled: bool = False
    """Whether regions get one another's weights."""
    changed_sampling: Mapping[str, Any] = field(default_factory=dict)
    """Settings that sample from another distribution than the policy's own, with their values."""
    total_steps: int = 0
    """Steps of the whole run; 0 if unknown."""
    progress_steps: int = 0
    """Steps in which the curriculum moves; 0 for all."""

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> DiagnosisSettings:
        """Read a run's config.toml, also one of an older version or one that was damaged."""
        config = parse_readable_tables(table)
        trl, rule = config.trl, None
        with suppress(ValueError):  # a supervised preset, or a rule of the user's that is not here
            found = config.rest.resolve().weights
            rule = found if isinstance(found, WeightConfig) else None  # fields of other rules mean other things

        def number(name: str) -> float | None:
            return float(trl[name]) if has_finite_square(trl.get(name)) else None

        w_min, w_max, strength = (getattr(rule, name, None) for name in ("w_min", "w_max", "strength"))
        max_length, max_norm = number("max_completion_length"), number("max_grad_norm")
        shifts = {
            label: (strength or 0.0) * sign * getattr(rule, name, 0.0)
            for label, (name, sign) in CURRICULUM_FIELDS.items()
        }
        return cls(
            group_size=max(2, int(number("num_generations") or cls.group_size)),
            max_length=None if max_length is None else int(max_length),
            temperature=number("temperature"),
            learning_rate=number("learning_rate"),
            max_norm=cls.max_norm if max_norm is None else max_norm,
            beta2=number("adam_beta2") or cls.beta2,
            is_half_precision=trl.get("fp16") is True,
            weight_clip=None if w_min is None or w_max is None else (w_min, w_max),
            strength=strength,
            curriculum_shifts={label: shift for label, shift in shifts.items() if shift},
            is_shuffled=rule is not None and rule.rule == "permuted",
            changed_sampling={
                f"trl.{name}": trl[name]
                for name, neutral in NEUTRAL_SAMPLING.items()
                if trl.get(name, neutral) != neutral
            },
            total_steps=int(number("max_steps") or 0),
            progress_steps=config.rest.progress_steps,
        )

    def with_total_steps(self, total_steps: int) -> DiagnosisSettings:
        """The same of a run of `total` steps, unless its configuration says how many."""
        return self if self.total_steps > 0 else replace(self, total_steps=total_steps)

    def curriculum_shift(self, region: str, step: int) -> float:
        """How far the curriculum has moved a region's weight at a step; 0 where that is not known."""
        steps = self.progress_steps or self.total_steps
        return self.curriculum_shifts.get(region, 0.0) * min(1.0, max(0, step - 1) / (steps - 1)) if steps > 1 else 0.0

    @property
    def most_groups_threshold(self) -> float:
        """The share of responses that leaves a mark on most groups: 1 - (1 - s)^G > 1/2; 0.083 for groups of 8."""
        return 1 - 0.5 ** (1 / self.group_size)

    @property
    def is_low_temperature(self) -> bool:
        """Whether sampling is so far below temperature 1 that responses to a prompt are much alike."""
        return self.temperature is not None and self.temperature <= LOW_TEMPERATURE

    @property
    def limit_text(self) -> str:
        """` of 96 tokens`, empty if the limit is unknown."""
        return f" of {self.max_length} tokens" if self.max_length else ""

    @property
    def lower_rate_remedy(self) -> str:
        now = "" if self.learning_rate is None else f" (now {self.learning_rate:g})"
        return f"lower trl.learning_rate{now} and begin anew"

    @property
    def truncation_remedy(self) -> str:
        return (
            "read those that are cut off: if they make sense raise trl.max_completion_length, else "
            f"{self.lower_rate_remedy}"
        )


def parse_readable_tables(table: Mapping[str, Any]) -> RunConfig:
    """`[trl]` and `[rest]` of a recorded run, each as far as this version can read it."""
    tables: dict[str, Any] = {}
    for name in ("trl", "rest"):
        with suppress(ValueError):
            RunConfig.from_tables({name: table.get(name, {})})
            tables[name] = table.get(name, {})
    return RunConfig.from_tables(tables)

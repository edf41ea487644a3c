"""The settings of a run that the diagnosis reads from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rest_rl.config import RunConfig
from rest_rl.report.diagnosis.history import has_finite_square
from rest_rl.weights import WeightConfig

# The field of WeightConfig by which the curriculum moves the weight of a region, and the direction.
CURRICULUM_FIELDS = {
    "format": ("decay_format", -1.0),
    "arguments": ("gain_arguments", 1.0),
    "reasoning": ("gain_reasoning", 1.0),
    "answer": ("gain_reasoning", 1.0),
}
# At this temperature and below, responses to a prompt differ little: at 0.5 the odds between any two tokens are
# squared.
LOW_TEMPERATURE = 0.5
NEUTRAL_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class DiagnosisSettings:
    """The settings of a run that the diagnosis reads, with the trainer's defaults for settings that the run lacks."""

    group_size: int = 8
    max_length: int | None = None
    """Maximum length of a response in tokens."""
    temperature: float | None = None
    learning_rate: float | None = None
    max_norm: float = 1.0
    """Maximum gradient norm; 0 turns clipping off."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    is_half_precision: bool = False
    """Whether the run uses float16, where the loss scale may skip steps."""
    weight_clip: tuple[float, float] | None = None
    """Minimum and maximum weight of a region. None if the rule is not the package's own, or if its entropies are the
    initial ones: then the weights are meant to start at the bounds, and only the curriculum moves them."""
    strength: float | None = None
    curriculum_shifts: Mapping[str, float] = field(default_factory=dict)
    """How far the curriculum has moved the weight of a region at the end of the run; only regions that it moves."""
    is_shuffled: bool = False
    """Whether the rule `permuted` shuffles the weights among the regions."""
    changed_sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings that change the policy's distribution, with their values."""
    total_steps: int = 0
    """Number of steps of the whole run; 0 if unknown."""
    progress_steps: int = 0
    """Number of steps over which the curriculum moves; 0 for the whole run."""

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> DiagnosisSettings:
        """Read the settings from a run's config.toml; tables that cannot be parsed (old or damaged) are left out."""
        config = parse_readable_tables(table)
        trl, rule = config.trl, None
        # resolve() raises for supervised presets, and for a user's rule whose module is not installed here. Fields of
        # other rules may share the names but not the meaning, so only the package's own rule counts.
        with suppress(ValueError):
            found = config.rest.resolve().weights
            rule = found if isinstance(found, WeightConfig) else None

        def number(name: str) -> float | None:
            return float(trl[name]) if has_finite_square(trl.get(name)) else None

        is_fixed = rule is not None and rule.entropies == "initial"
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
            weight_clip=None if w_min is None or w_max is None or is_fixed else (w_min, w_max),
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
        """Return the settings with this number of steps, unless the configuration sets one."""
        return self if self.total_steps > 0 else replace(self, total_steps=total_steps)

    def curriculum_shift(self, region: str, step: int) -> float:
        """Return how far the curriculum has moved a region's weight at a step; 0 if the number of steps is unknown."""
        steps = self.progress_steps or self.total_steps
        return self.curriculum_shifts.get(region, 0.0) * min(1.0, max(0, step - 1) / (steps - 1)) if steps > 1 else 0.0

    @property
    def most_groups_threshold(self) -> float:
        """The share s of (say) truncated responses above which most groups of G contain one: 1 - (1 - s)^G > 1/2."""
        return 1 - 0.5 ** (1 / self.group_size)  # 0.083 for groups of 8

    @property
    def is_low_temperature(self) -> bool:
        return self.temperature is not None and self.temperature <= LOW_TEMPERATURE

    @property
    def limit_text(self) -> str:
        """The maximum length of a response as text such as ` of 96 tokens`; empty if it is unknown."""
        return f" of {self.max_length} tokens" if self.max_length else ""

    @property
    def lower_rate_remedy(self) -> str:
        now = "" if self.learning_rate is None else f" (now {self.learning_rate:g})"
        return f"lower trl.learning_rate{now} and train again from the start"

    @property
    def truncation_remedy(self) -> str:
        longer = "if the truncated responses make sense, raise trl.max_completion_length"
        return f"{longer}; otherwise {self.lower_rate_remedy}"


def parse_readable_tables(table: Mapping[str, Any]) -> RunConfig:
    # Parse each table separately, so that a key unknown to this version makes only its own table unreadable.
    tables: dict[str, Any] = {}
    for name in ("trl", "rest"):
        with suppress(ValueError):
            RunConfig.from_tables({name: table.get(name, {})})
            tables[name] = table.get(name, {})
    return RunConfig.from_tables(tables)

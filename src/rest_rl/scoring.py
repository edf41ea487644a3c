"""One call from the text of a response to its reward, for any format and preset; imports no torch."""

from __future__ import annotations

from rest_rl.authors_code import SCHEDULE_STEPS, authors_reward
from rest_rl.formats import ToolFormat, get_format
from rest_rl.response import Gold
from rest_rl.rewards import Finding, Reward, RewardConfig, score

PRESET_REWARDS: dict[str, RewardConfig | None] = {
    "rest": RewardConfig(),
    "paper": RewardConfig(accuracy_share_start=0.0, accuracy_share_end=1.0),
    "authors-code": None,
    "grpo": RewardConfig(),
    "dr_grpo": RewardConfig(),
    "dapo": RewardConfig(),
}
"""The reward of each preset; None stands for the published code's own. The baselines share the reward of `rest`, so
that a comparison with them is one of token weights alone."""


def score_response(
    text: str,
    gold: Gold,
    *,
    format: str | ToolFormat = "toolrl",
    preset: str = "rest",
    progress: float = 0.0,
    step: float | None = None,
    reward: RewardConfig | None = None,
) -> Reward:
    """Score a response at training progress in [0, 1]; malformed text scores low and never raises.

    `reward` replaces the preset's reward settings. For the preset `authors-code` the schedule counts absolute steps:
    `step`, or progress * 150; its format and accuracy are the published code's raw scores, which add up to the reward.
    """
    if reward is None and preset not in PRESET_REWARDS:
        raise ValueError(f"got preset {preset!r}, expected one of {', '.join(PRESET_REWARDS)}")
    config = reward or PRESET_REWARDS[preset]
    if config is not None:
        return score(get_format(format).parse(text, spans=False), gold, progress, config)
    return _authors_score(text, gold, authors_step(progress) if step is None else step)


def authors_step(progress: float) -> float:
    """The step of the published code's 150-step schedule that a progress stands for; exact for step / 150."""
    if not 0 <= progress <= 1:
        raise ValueError(f"got progress {progress}, expected a number in [0, 1]: step / (total steps - 1)")
    return round(progress * SCHEDULE_STEPS, 9)


def _authors_score(text: str, gold: Gold, step: float) -> Reward:
    if not 0 <= step < float("inf"):
        raise ValueError(f"got step {step}, expected a number >= 0")
    well_formatted, correctness = authors_reward(text, gold, step)
    findings = (
        Finding("format", f"published format score {well_formatted:g}", 0.0),
        Finding("value", f"published correctness score {correctness:g}", 0.0),
    )
    return Reward(well_formatted + correctness, well_formatted, correctness, findings)

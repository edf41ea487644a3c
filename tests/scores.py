"""Score responses that are already parsed."""

from __future__ import annotations

from rest_rl.response import Gold, ParsedResponse
from rest_rl.rewards import Reward, RewardConfig, judge_parsed


def score(parsed: ParsedResponse, gold: Gold, progress: float = 0.0, config: RewardConfig | None = None) -> Reward:
    return (config or RewardConfig())(judge_parsed(parsed, gold), progress)


def exact_match(parsed: ParsedResponse, gold: Gold) -> bool:
    return judge_parsed(parsed, gold).exact_match

"""Group advantages of GRPO, Dr. GRPO and DAPO, the credit of the stages of a trajectory, and their spread over tokens.

A stage is a turn of a trajectory, or a part of a single response. Shapes: B = P * G responses, with the G responses to
each of P prompts in adjacent rows; T completion tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import fsum
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, get_args

from rest_rl.errors import UserError

if TYPE_CHECKING:  # torch is imported inside the function: run files are read without it
    from torch import Tensor

AdvantageKind = Literal["grpo", "dr_grpo", "dapo", "weighted_token_mean"]

# Added to a group's standard deviation, as in TRL.
STD_EPSILON = 1e-4


def group_advantages(rewards_B: Tensor, group_size: int, kind: AdvantageKind = "grpo") -> Tensor:
    """Return the advantage of each response within its group (the responses to its prompt). Shape (B,).

    `grpo`: (reward - mean) / (std + 1e-4), with the group's mean and unbiased standard deviation (arXiv 2402.03300).
    `dapo` (arXiv 2503.14476) and `weighted_token_mean` have the same advantages and only aggregate the loss
    differently: they average over all tokens of a batch, the latter with the token weights as weights of the mean.
    `dr_grpo`: reward - mean (arXiv 2503.20783).
    If all rewards of a group are equal, its advantages are 0; engines can find and resample it with `zero_spread_mask`.
    """
    import torch

    if kind not in get_args(AdvantageKind):
        raise ValueError(f"unknown advantage {kind!r}, expected one of {', '.join(get_args(AdvantageKind))}")
    rewards_PG = _to_groups(rewards_B, group_size)
    centered_PG = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    # The mean of equal rewards is rounded (3 x 0.1 is not 0.3), and division by a std near 0 would inflate the error.
    centered_PG = torch.where(_has_no_spread(rewards_PG)[:, None], 0.0, centered_PG)
    if kind != "dr_grpo" and group_size > 1:
        centered_PG = centered_PG / (rewards_PG.std(-1, keepdim=True) + STD_EPSILON)
    return centered_PG.reshape(-1)


def zero_spread_mask(rewards_B: Tensor, group_size: int) -> Tensor:
    """Return True for responses whose group has equal rewards and therefore no gradient. Shape (B,), bool."""
    return _has_no_spread(_to_groups(rewards_B, group_size)).repeat_interleave(group_size)


def weight_advantages(advantages: Tensor, weights_BT: Tensor) -> Tensor:
    """Return each token's weighted advantage, A_BT = A * w_BT (ResT's reshaped policy gradient). Shape (B, T).

    The advantages have shape (B,), or (B, T) if the tokens of a response differ in credit (`spread_credits`). With the
    policy ratio r, min(r w A, clip(r) w A) = w min(r A, clip(r) A) for w >= 0. Therefore this weights each token's
    clipped surrogate; weights of 1 give exactly GRPO.
    """
    if weights_BT.ndim != 2 or advantages.shape not in (weights_BT.shape[:1], weights_BT.shape):
        raise ValueError(
            f"advantages and weights have shapes {tuple(advantages.shape)} and {tuple(weights_BT.shape)}, "
            "expected (B,) or (B, T) and (B, T)"
        )
    return (advantages if advantages.ndim == 2 else advantages[:, None]) * weights_BT.to(advantages)


CreditKind = Literal["outcome", "return_to_go", "matched", "anchor"]
Baseline = Literal["leave_one_out", "mean"]

# Names under which others offer the estimator that `CreditConfig` refuses.
_INDEX_NORMALIZATION = ("index", "turn_index", "mt_grpo")


@dataclass(frozen=True)
class CreditConfig:
    """How the rewards of a trajectory's stages become one credit per stage (docs/method.md, "Credit per turn")."""

    kind: CreditKind = "outcome"
    """`outcome`: the total reward minus its baseline, for every stage. `return_to_go`: the reward that is still to come
    minus its baseline over the members of the group that reached the stage. `matched`: `outcome` plus `return_to_go` of
    the rewards of `match_calls_by_stage`. `anchor`: `outcome` plus the reward still to come minus its mean over visits
    of the same state (GiGPO, arXiv 2505.10978)."""
    gamma: float = 1.0
    """Discount per stage of the reward still to come, in [0, 1]. Below 1, credit is biased against early stages."""
    baseline: Baseline = "leave_one_out"
    """Mean over the other members of the group, or over all of them (as in GRPO, smaller by (G - 1) / G)."""
    lone: Literal["outcome", "zero"] = "outcome"
    """Credit of a stage that no other member reached: that of the whole trajectory (unbiased), or 0."""
    anchor_weight: float = 1.0
    """Weight of the second term of `anchor`."""
    turn_norm: str = "none"
    """Only `none`: normalization by turn index is refused."""

    def __post_init__(self) -> None:
        for name, value in (("kind", self.kind), ("turn_norm", self.turn_norm)):
            if value in _INDEX_NORMALIZATION:
                raise UserError(
                    f"{name} is {value!r}, but comparing rewards of equal turn index removes the credit of earlier "
                    "choices: on a problem with the gradient 0.25 it gives 0.000 (docs/method.md)",
                    remedy="use kind = 'return_to_go' and turn_norm = 'none'",
                )
        for name, known in (
            ("kind", get_args(CreditKind)),
            ("baseline", get_args(Baseline)),
            ("lone", ("outcome", "zero")),
            ("turn_norm", ("none",)),
        ):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} is {value!r}", f"one of {', '.join(known)}", "change it")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma is {self.gamma}", "a number in [0, 1]", "change it")
        if not 0 <= self.anchor_weight < float("inf"):
            raise UserError(f"anchor_weight is {self.anchor_weight}", "a finite number, at least 0", "change it")


class StageCredits(NamedTuple):
    """The credit of each stage of each member of a group, and counts for the metrics."""

    credits: list[list[float]]
    num_stages: int
    """Stages of scored trajectories."""
    num_lone: int
    """Stages without a baseline: no other scored member reached them, or visited their state. 0 for `outcome`."""
    num_unscored: int
    """Trajectories without any reward. Their credit is 0, and no baseline contains them."""


_Stages = Sequence[Sequence["float | None"]]
_T = TypeVar("_T")


def stage_credits(
    rewards: _Stages,
    config: CreditConfig | CreditKind,
    *,
    states: Sequence[Sequence[str | None]] | None = None,
    matched: _Stages | None = None,
) -> StageCredits:
    """Return the credit of each stage (a turn, or a part of a response) of the trajectories of one group.

    `rewards` has one number per stage and member; the reward of the episode belongs to the last stage. None means that
    a stage was not scored and adds nothing. A trajectory of which no stage was scored has credit 0. `states` are the
    hashes of the states before each stage (None if unknown), for `anchor`; `matched` are the rewards of
    `match_calls_by_stage`, for `matched`.

    Raises:
        ValueError: The kind needs `states` or `matched`, and it is missing or has another number of stages.
    """
    config = CreditConfig(config) if isinstance(config, str) else config
    group = _Group(tuple(any(reward is not None for reward in member) for member in rewards), config)
    outcomes, nothing = group.outcome_credits(rewards), [0.0] * len(rewards)
    num_lone = 0
    if config.kind == "outcome":
        credits = [[outcome] * len(member) for outcome, member in zip(outcomes, rewards, strict=True)]
    elif config.kind == "anchor":
        keys = _check_stages(rewards, states, "states")
        later, num_lone = group.center(_returns_to_go(rewards, config.gamma), keys, nothing)
        credits = [
            [outcome + config.anchor_weight * credit for credit in member]
            for outcome, member in zip(outcomes, later, strict=True)
        ]
    else:
        is_matched = config.kind == "matched"
        events = _check_stages(rewards, matched, "matched") if is_matched else rewards
        fallbacks = group.outcome_credits(events) if config.lone == "outcome" else nothing
        turns = [range(len(member)) for member in events]
        credits, num_lone = group.center(_returns_to_go(events, config.gamma), turns, fallbacks)
        if is_matched:
            credits = [[o + credit for credit in member] for o, member in zip(outcomes, credits, strict=True)]
    num_stages = sum(len(member) for member, is_scored in zip(rewards, group.scored, strict=True) if is_scored)
    return StageCredits(credits, num_stages, num_lone, group.scored.count(False))


@dataclass(frozen=True)
class _Group:
    # The members with a reward, and how to subtract baselines.

    scored: tuple[bool, ...]
    config: CreditConfig

    def outcome_credits(self, rewards: _Stages) -> list[float]:
        totals = [[fsum(reward for reward in member if reward is not None)] for member in rewards]
        return [credit for (credit,) in self.center(totals, [[0]] * len(totals), [0.0] * len(totals))[0]]

    def center(
        self, values: Sequence[Sequence[float]], keys: Sequence[Sequence[Hashable]], fallbacks: Sequence[float]
    ) -> tuple[list[list[float]], int]:
        # Each stage's value minus the mean of the group's values with the same key. The keys are turn indices or
        # states; a stage that nobody else has gets the member's fallback and is counted.
        found: dict[Hashable, list[tuple[int, float]]] = {}
        for member in self._scored_members():
            for key, value in zip(keys[member], values[member], strict=True):
                found.setdefault(key, []).append((member, value))
        credits, num_lone = [[0.0] * len(stages) for stages in values], 0
        for member in self._scored_members():
            for stage, (key, value) in enumerate(zip(keys[member], values[member], strict=True)):
                baseline = None if key is None else self._baseline(member, found[key])
                num_lone += baseline is None
                credits[member][stage] = fallbacks[member] if baseline is None else value - baseline
        return credits, num_lone

    def _scored_members(self) -> list[int]:
        return [member for member, is_scored in enumerate(self.scored) if is_scored]

    def _baseline(self, member: int, found: Sequence[tuple[int, float]]) -> float | None:
        own_counts = self.config.baseline == "mean"
        values = [value for other, value in found if own_counts or other != member]
        if len(values) <= own_counts:
            return None
        # The mean of equal values is rounded (3 x 0.1 is not 0.3), and a group without spread has no gradient.
        return values[0] if min(values) == max(values) else fsum(values) / len(values)


def _returns_to_go(rewards: _Stages, gamma: float) -> list[list[float]]:
    # G_k = sum over l >= k of gamma^(l - k) r_l
    results: list[list[float]] = []
    for member in rewards:
        later, returns = 0.0, []
        for reward in reversed(member):
            later = (reward or 0.0) + gamma * later
            returns.append(later)
        results.append(returns[::-1])
    return results


def _check_stages(rewards: _Stages, given: Sequence[Sequence[_T]] | None, name: str) -> Sequence[Sequence[_T]]:
    if given is None or [len(member) for member in given] != [len(member) for member in rewards]:
        raise ValueError(f"{name} is needed, with one entry for each stage of each trajectory")
    return given


def spread_credits(credits: Sequence[Sequence[float]], stages_BT: Tensor) -> Tensor:
    """Return each token's credit, that of its stage; 0 for tokens of stage -1. Shape (B, T), float32.

    `credits` has the stages of each row, and `stages_BT` the stage of each token, -1 for tokens that were not sampled.
    """
    import torch

    counts_B1 = torch.tensor([len(row) for row in credits], device=stages_BT.device)[:, None]
    if stages_BT.ndim != 2 or len(credits) != len(stages_BT) or (stages_BT >= counts_B1).any():
        raise ValueError(
            f"{len(credits)} rows of credits and stages of shape {tuple(stages_BT.shape)}, expected one row of credits "
            "for each row of stages, and one credit for each stage"
        )
    width = max(map(len, credits), default=0)
    table = [[*row, *[0.0] * (width + 1 - len(row))] for row in credits]  # the last column is that of stage -1
    table_BK = torch.tensor(table, dtype=torch.float32, device=stages_BT.device).reshape(len(credits), -1)
    return table_BK.gather(1, stages_BT.where(stages_BT >= 0, width).long())


def find_turn_stages(mask_BT: Tensor) -> Tensor:
    """Return the number of each token's turn, a run of ones in its row of the mask, and -1 where masked. (B, T)."""
    import torch

    mask_BT = mask_BT.bool()
    is_start_BT = mask_BT & ~torch.nn.functional.pad(mask_BT, (1, 0))[:, :-1]
    return (is_start_BT.cumsum(-1) - 1).where(mask_BT, -1)


def find_part_stages(char_lengths: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the stage of each token of a response: the one that contains its first character.

    `char_lengths` are those of `regions.token_char_lengths`, and `ends` the ends of the stages (`split_reward`). A
    token that contains the end of a stage therefore belongs to the stage that it decides. Tokens after the text belong
    to the last stage.
    """
    starts = accumulate(char_lengths, initial=0)
    return [min(bisect_right(ends, start), len(ends) - 1) for start, _ in zip(starts, char_lengths, strict=False)]


def _to_groups(rewards_B: Tensor, group_size: int) -> Tensor:
    if rewards_B.ndim != 1 or group_size < 1 or len(rewards_B) % group_size:
        raise ValueError(f"rewards have shape {tuple(rewards_B.shape)}, expected (B,), B a multiple of {group_size}")
    return rewards_B.reshape(-1, group_size)


def _has_no_spread(rewards_PG: Tensor) -> Tensor:
    return rewards_PG.max(-1).values == rewards_PG.min(-1).values

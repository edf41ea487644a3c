"""Group advantages of GRPO, Dr. GRPO and DAPO, and how each is spread over a response's tokens.

Shapes: B = P * G responses, with the G responses to each of P prompts in adjacent rows; T completion tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

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


def weight_advantages(advantages_B: Tensor, weights_BT: Tensor) -> Tensor:
    """Return each token's weighted advantage, A_BT = A_B * w_BT (ResT's reshaped policy gradient). Shape (B, T).

    With the policy ratio r, min(r w A, clip(r) w A) = w min(r A, clip(r) A) for w >= 0. Therefore this weights each
    token's clipped surrogate; weights of 1 give exactly GRPO.
    """
    if weights_BT.ndim != 2 or advantages_B.shape != weights_BT.shape[:1]:
        raise ValueError(
            f"advantages and weights have shapes {tuple(advantages_B.shape)} and {tuple(weights_BT.shape)}, "
            "expected (B,) and (B, T)"
        )
    return advantages_B[:, None] * weights_BT.to(advantages_B)


def _to_groups(rewards_B: Tensor, group_size: int) -> Tensor:
    if rewards_B.ndim != 1 or group_size < 1 or len(rewards_B) % group_size:
        raise ValueError(f"rewards have shape {tuple(rewards_B.shape)}, expected (B,), B a multiple of {group_size}")
    return rewards_B.reshape(-1, group_size)


def _has_no_spread(rewards_PG: Tensor) -> Tensor:
    return rewards_PG.max(-1).values == rewards_PG.min(-1).values

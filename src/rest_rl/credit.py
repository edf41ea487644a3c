"""Group advantages of GRPO, Dr. GRPO and DAPO, and their spreading over tokens.

Shapes: B = P * G responses, the G responses to one prompt consecutive; T completion tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # torch is imported inside the function: run files are read without it
    from torch import Tensor

AdvantageKind = Literal["grpo", "dr_grpo", "dapo"]

STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as TRL does."""


def group_advantages(rewards_B: Tensor, group_size: int, kind: AdvantageKind = "grpo") -> Tensor:
    """The advantage of each response within its group: (B,).

    grpo and dapo: (R - mean) / (std + 1e-4), the standard deviation unbiased (arXiv 2402.03300; the two differ in the
    aggregation of the loss, arXiv 2503.14476). dr_grpo: R - mean (arXiv 2503.20783). A group without spread has
    advantage 0, and so has a group of one; `zero_spread_mask` marks them for an engine that can draw others instead.
    """
    import torch

    if kind not in get_args(AdvantageKind):
        raise ValueError(f"got advantage {kind!r}, expected one of {', '.join(get_args(AdvantageKind))}")
    rewards_PG = _to_groups(rewards_B, group_size)
    centred_PG = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    centred_PG = torch.where(_has_no_spread(rewards_PG)[:, None], 0.0, centred_PG)  # a mean rounds: 3 x 0.1 is not 0.3
    if kind != "dr_grpo" and group_size > 1:
        centred_PG = centred_PG / (rewards_PG.std(-1, keepdim=True) + STD_EPSILON)
    return centred_PG.reshape(-1)


def zero_spread_mask(rewards_B: Tensor, group_size: int) -> Tensor:
    """True for every response whose group has one reward throughout and so teaches nothing: bool (B,)."""
    return _has_no_spread(_to_groups(rewards_B, group_size)).repeat_interleave(group_size)


def weight_advantages(advantages_B: Tensor, weights_BT: Tensor) -> Tensor:
    """Spread each response's advantage over its tokens: A_BT = A_B * w_BT (ResT's reshaped policy gradient).

    For w >= 0, min(r w A, clip(r) w A) = w min(r A, clip(r) A): weighting the advantage is weighting the clipped
    surrogate. Weights of 1 give GRPO exactly.
    """
    if weights_BT.ndim != 2 or advantages_B.shape != weights_BT.shape[:1]:
        raise ValueError(
            f"got advantages {tuple(advantages_B.shape)}, weights {tuple(weights_BT.shape)}; expected (B,) and (B, T)"
        )
    return advantages_B[:, None] * weights_BT.to(advantages_B)


def _to_groups(rewards_B: Tensor, group_size: int) -> Tensor:
    if rewards_B.ndim != 1 or group_size < 1 or len(rewards_B) % group_size:
        raise ValueError(
            f"got rewards of shape {tuple(rewards_B.shape)}, expected (B,) with B a multiple of {group_size}"
        )
    return rewards_B.reshape(-1, group_size)


def _has_no_spread(rewards_PG: Tensor) -> Tensor:
    return rewards_PG.max(-1).values == rewards_PG.min(-1).values

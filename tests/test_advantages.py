from __future__ import annotations

import math

import pytest
import torch

from rest_rl.credit import group_advantages, weight_advantages, zero_spread_mask


def test_grpo_by_hand():
    # group 1: mean 2, deviations -1, 0, 1, unbiased std 1 -> divided by 1.0001; group 2: no spread
    rewards_B = torch.tensor([1.0, 2.0, 3.0, 0.1, 0.1, 0.1])
    expected = [-1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0]
    assert group_advantages(rewards_B, 3).tolist() == pytest.approx(expected)
    assert group_advantages(rewards_B, 3, "dapo").tolist() == pytest.approx(expected)
    assert group_advantages(rewards_B, 3, "dr_grpo").tolist() == pytest.approx([-1, 0, 1, 0, 0, 0])


def test_groups_without_spread_have_advantage_zero_and_are_marked():
    rewards_B = torch.tensor([0.3, 0.3, 0.3, 0.0, 1.0, 0.0])
    assert group_advantages(rewards_B, 3)[:3].tolist() == [0, 0, 0]
    assert zero_spread_mask(rewards_B, 3).tolist() == [True] * 3 + [False] * 3


def test_a_group_of_one_has_no_advantage():
    assert group_advantages(torch.tensor([1.0, 5.0]), 1).tolist() == [0.0, 0.0]


def test_permuting_a_group_permutes_its_advantages():
    rewards_B = torch.tensor([0.2, 0.9, 0.4, 0.4])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(group_advantages(rewards_B[order], 4), group_advantages(rewards_B, 4)[order])


def test_an_advantage_is_distributed_over_its_tokens():
    weights_BT = torch.tensor([[1.5, 0.5, 0.0], [1.0, 1.0, 1.0]])
    assert weight_advantages(torch.tensor([2.0, -1.0]), weights_BT).tolist() == [[3.0, 1.0, 0.0], [-1.0, -1.0, -1.0]]


def test_advantages_may_differ_between_tokens():
    weights_BT = torch.tensor([[1.5, 0.5, 0.0]])
    assert weight_advantages(torch.tensor([[2.0, -1.0, 3.0]]), weights_BT).tolist() == [[3.0, -0.5, 0.0]]
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        weight_advantages(torch.zeros(1, 2), weights_BT)


def test_invalid_shapes_and_kinds_are_errors():
    with pytest.raises(ValueError, match="multiple of 3"):
        group_advantages(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="dr_grpo"):
        group_advantages(torch.zeros(4), 2, "ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(B,\) or \(B, T\)"):
        weight_advantages(torch.zeros(2), torch.zeros(3, 4))
    assert not math.isnan(group_advantages(torch.zeros(4), 2).sum().item())

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.loss import clipped_surrogate, collision_mass, token_entropy


def test_the_three_aggregations_by_hand():
    # ratios 1.5, 0.5 | 1.0; advantages 1, 1 | -2; clip 0.2
    # min(1.5, 1.2) = 1.2; min(0.5, 0.8) = 0.5; min(-2, -2) = -2
    logprobs_BT = torch.tensor([[math.log(1.5), math.log(0.5)], [0.0, 7.0]])
    old_BT = torch.zeros(2, 2)
    advantages_BT = torch.tensor([[1.0, 1.0], [-2.0, 3.0]])
    mask_BT = torch.tensor([[1, 1], [1, 0]])
    arguments = (logprobs_BT, old_BT, advantages_BT, mask_BT)
    # grpo gives -((1.2 + 0.5) / 2 + (-2) / 1) / 2 = 0.575, dapo -(1.7 - 2) / 3 = 0.1 and
    # dr_grpo -(1.7 - 2) / (2 * 10) = 0.015
    assert clipped_surrogate(*arguments).item() == pytest.approx(0.575)
    assert clipped_surrogate(*arguments, aggregation="dapo").item() == pytest.approx(0.1)
    assert clipped_surrogate(*arguments, aggregation="dr_grpo", max_length=10).item() == pytest.approx(0.015)
    # clip-higher: min(1.5, 1.28) = 1.28 -> -((1.28 + 0.5) / 2 - 2) / 2 = 0.555
    assert clipped_surrogate(*arguments, epsilon_high=0.28).item() == pytest.approx(0.555)


@given(st.floats(0, 5), st.floats(-3, 3), st.floats(-3, 3))
def test_weighting_the_advantage_is_weighting_the_clipped_surrogate(weight, log_ratio, advantage):
    def loss(a):
        shape = torch.ones(1, 1, dtype=torch.float64)
        return clipped_surrogate(shape * log_ratio, shape * 0, shape * a, shape).item()

    assert loss(weight * advantage) == pytest.approx(weight * loss(advantage), abs=1e-12)


def test_the_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    logprobs_BT = (torch.randn(2, 3, dtype=torch.float64) * 0.1).requires_grad_()
    advantages_BT = torch.randn(2, 3, dtype=torch.float64)
    mask_BT = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda x: clipped_surrogate(x, torch.zeros_like(x), advantages_BT, mask_BT), (logprobs_BT,)
    )


def test_masked_tokens_can_have_any_value():
    nan_BT = torch.tensor([[0.0, float("nan")]], requires_grad=True)
    loss = clipped_surrogate(nan_BT, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1, 0]]))
    assert loss.item() == -1.0


def test_entropy_and_collision_mass_of_known_distributions():
    logits_BTV = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]]])
    # uniform over 4: H = ln 4, 1 - 4 / 16 = 3/4 = 1 - exp(-H); deterministic: 0 and 0
    assert token_entropy(logits_BTV)[0].tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    assert collision_mass(logits_BTV)[0].tolist() == pytest.approx([0.75, 0.0], abs=1e-6)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=8), st.floats(0.3, 3))
def test_collision_mass_is_bounded_by_one_minus_exp_of_minus_entropy(logits, temperature):
    logits_BTV = torch.tensor([[logits]], dtype=torch.float64)  # ResT Lemma 2
    bound = 1 - math.exp(-token_entropy(logits_BTV, temperature).item())
    assert collision_mass(logits_BTV, temperature).item() <= bound + 1e-9


def test_invalid_input_is_an_error():
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2))
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="max_length"):
        clipped_surrogate(ones, ones, ones, ones, aggregation="dr_grpo")
    with pytest.raises(ValueError, match="grpo, dr_grpo, dapo"):
        clipped_surrogate(ones, ones, ones, ones, aggregation="sum")  # type: ignore[arg-type]

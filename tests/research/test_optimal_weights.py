import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.theory.optimal_weights import (
    check_closed_form,
    compare_with_scipy,
    find_region_optimum,
    solve_closed_form,
    solve_numerically,
)
from research.theory.token_bounds import ResponseTokens
from rest_rl.response import Region

BETAS = st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=40)


def response(prompt, expected, regions, gram=None, advantage=1.0):
    expected = np.array(expected, float)
    bounds = expected / 10
    return ResponseTokens(
        prompt,
        advantage,
        np.array(regions),
        np.full(len(expected), -0.7),
        -np.log1p(-bounds),
        bounds,
        expected,
        np.diag(expected) if gram is None else np.array(gram, float),
    )


def test_closed_form_by_hand():
    # 1 / beta = 1, 1/2, 1/4, sum 7/4: w = 3 / (7/4) * (1, 1/2, 1/4) = (12, 6, 3) / 7
    w = solve_closed_form(np.array([1.0, 2.0, 4.0]))
    assert w.tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert w.mean() == pytest.approx(1)
    # sum w^2 beta = T^2 / sum 1/beta = 9 / (7/4)
    assert w**2 @ np.array([1.0, 2.0, 4.0]) == pytest.approx(36 / 7)
    assert solve_closed_form(np.full(5, 0.3)).tolist() == pytest.approx([1] * 5)


def test_a_region_solution_equals_the_token_solution():
    # Two tokens of beta 2 and one of beta 8 in a region of its own: shares 2/3 and 1/3, region sums 4 and 8.
    by_token = solve_closed_form(np.array([2.0, 2.0, 8.0]))
    by_region = solve_closed_form(np.array([4.0, 8.0]), np.array([2 / 3, 1 / 3]))
    assert by_region.tolist() == pytest.approx([by_token[0], by_token[2]])


@settings(max_examples=40, deadline=None)
@given(BETAS)
def test_the_closed_form_is_scipys_minimum(betas):
    assert compare_with_scipy(np.array(betas)) == pytest.approx(0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(BETAS, st.integers(0, 1000))
def test_no_other_weights_of_mean_one_are_better(betas, seed):
    betas = np.array(betas)
    other = np.random.default_rng(seed).exponential(size=len(betas))
    other /= other.mean()
    assert solve_closed_form(betas) ** 2 @ betas <= (other**2 @ betas) * (1 + 1e-12)


def test_the_numerical_optimum_includes_cross_terms():
    # C^-1 s / (s' C^-1 s) with C = [[2, 1], [1, 3]], s = (1/2, 1/2): C^-1 s ~ (2, 1) / 10, so w = (4/3, 2/3)
    w = solve_numerically(np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([0.5, 0.5]))
    assert w.tolist() == pytest.approx([4 / 3, 2 / 3], abs=1e-5)
    # strong positive cross terms would want a negative weight; it stays at 0
    w = solve_numerically(np.array([[1.0, 2.0], [2.0, 9.0]]), np.array([0.5, 0.5]))
    assert w.tolist() == pytest.approx([2, 0], abs=1e-5)


def test_the_theorem_holds_if_its_assumptions_do():
    name, reasoning = int(Region.NAME), int(Region.REASONING)
    some = [response(prompt, [1, 4], [name, reasoning]) for prompt in range(6)]
    found = find_region_optimum(some)
    # beta 1 and 4: w = 2 / (5/4) * (1, 1/4) = (1.6, 0.4); sum w^2 beta = 3.2 against 5
    assert found.weights["closed form"] == pytest.approx({"name": 1.6, "reasoning": 0.4})
    assert found.predicted["closed form"] == pytest.approx(0.64)
    assert found.second_moment["closed form"] == pytest.approx((0.64, 0), abs=1e-9)
    assert found.second_moment["measured optimum"].value == pytest.approx(0.64, abs=1e-5)
    assert found.cross_share.value == pytest.approx(0)
    # here 1 - exp(-H) = beta / 10, so the entropy rule is the closed form
    assert found.second_moment["entropy rule"].value == pytest.approx(0.64)


def test_cross_terms_break_the_theorem():
    name, reasoning = int(Region.NAME), int(Region.REASONING)
    gram = [[1, 1.9], [1.9, 4]]
    found = find_region_optimum([response(prompt, [1, 4], [name, reasoning], gram) for prompt in range(6)])
    assert found.predicted["closed form"] == pytest.approx(0.64)
    # w = (1.6, 0.4) on this gram: (1.6^2 + 2 * 1.6 * 0.4 * 1.9 + 0.4^2 * 4) / (1 + 3.8 + 4)
    assert found.second_moment["closed form"].value == pytest.approx(5.632 / 8.8)
    assert found.cross_share.value == pytest.approx(3.8 / 8.8)


def test_solutions_are_evaluated_on_the_other_half():
    # Even prompts: all gradient in NAME; odd ones: in REASONING. What suits one half is the worst for the other.
    name, reasoning = int(Region.NAME), int(Region.REASONING)
    some = [response(p, [9, 1] if p % 2 else [1, 9], [name, reasoning]) for p in range(8)]
    # from betas (1, 9) w = (1.8, 0.2); on the other half (1.8^2 * 9 + 0.2^2) / 10 = 2.92
    assert find_region_optimum(some).second_moment["closed form"].value == pytest.approx(2.92)


def test_halves_are_taken_by_position():
    # Prompts 0, 2, 4, 6 alone: all of them even, but every other one is of the second half.
    name, reasoning = int(Region.NAME), int(Region.REASONING)
    some = [response(2 * p, [9, 1] if p % 2 else [1, 9], [name, reasoning]) for p in range(4)]
    assert find_region_optimum(some).second_moment["closed form"].value == pytest.approx(2.92)


def test_every_response_is_checked():
    found = check_closed_form([response(p, [1, 3, 9], [0, 1, 2]) for p in range(3)])
    assert found.responses == 3
    assert max(abs(found.entropy_excess), abs(found.gradient_excess)) < 1e-7


def test_too_little_spread_gives_no_optimum():
    some = [response(p, [1, 4], [0, 1], advantage=float(p % 2)) for p in range(6)]
    assert find_region_optimum(some) is None
    with pytest.raises(ValueError, match="smallest beta is 0"):
        solve_closed_form(np.array([1.0, 0.0]))

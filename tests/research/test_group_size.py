import numpy as np
import pytest

from research.theory.group_size import (
    PromptResponses,
    fit_log_log_slope,
    measure_group_size_curves,
    measure_within_variance,
)


def prompts(number, responses=32, dimensions=6, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        vectors = rng.normal(size=(responses, dimensions))
        found.append(PromptResponses((rng.random(responses) < 0.5).astype(float), vectors @ vectors.T))
    return found


def test_variance_of_single_responses_by_hand():
    # gradients 1, 2, 4 on one axis, rewards all 1, baseline 0: terms 1, 2, 4, sample variance 7/3
    vectors = np.array([[1.0], [2.0], [4.0]])
    prompt = PromptResponses(np.ones(3), vectors @ vectors.T)
    rng = np.random.default_rng(0)
    assert measure_within_variance(prompt, 1, lambda r, b: r - b, 0.0, 3, rng) == pytest.approx(7 / 3)


def test_a_fixed_baseline_follows_the_lemma():
    curves = {curve.advantage: curve for curve in measure_group_size_curves(prompts(12), repeats=200)}
    fixed = curves["fixed baseline"]
    assert fixed.sizes == (2, 4, 8, 16)
    assert fixed.slope.value == pytest.approx(-1, abs=0.05)
    first = fixed.variances[0].value
    assert [one.value / first for one in fixed.variances] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8], rel=0.1)


def test_group_baselines_add_variance_in_small_groups():
    # Leave-one-out has the variance factor 1 + 1 / (G - 1), so its curve is steeper than the lemma's.
    curves = {curve.advantage: curve for curve in measure_group_size_curves(prompts(12), repeats=100)}
    assert curves["leave-one-out"].slope.value < -1.1
    # GRPO divides by a standard deviation that is 0 in half of the groups of two: its curve is flatter.
    assert curves["grpo"].slope.value > curves["leave-one-out"].slope.value


def test_slope_by_hand():
    assert fit_log_log_slope([2, 4, 8], np.array([8.0, 2.0, 0.5])) == pytest.approx(-2)
    assert np.isnan(fit_log_log_slope([2, 4], np.array([0.0, 1.0])))
    assert np.isnan(fit_log_log_slope([2], np.array([1.0])))


def test_equal_rewards_have_no_variance():
    some = [PromptResponses(np.ones(8), one.gram_nn) for one in prompts(3, responses=8)]
    curves = measure_group_size_curves(some, repeats=2)
    assert all(one.value == pytest.approx(0, abs=1e-20) for curve in curves for one in curve.variances)


def test_too_few_prompts_or_responses_raise():
    with pytest.raises(ValueError, match="2 prompts with 32"):
        measure_group_size_curves(prompts(2))
    with pytest.raises(ValueError, match="3 prompts with 4"):
        measure_group_size_curves(prompts(3, responses=4))

import math

import numpy as np
import pytest

from research.theory.token_bounds import (
    ResponseTokens,
    check_lemma_two,
    contrast_regions,
    largest_advantage,
    max_gain_square,
    measure_bound_chain,
    spearman,
    summarize_regions,
)
from rest_rl.response import Region


def response(prompt, advantage, expected, collisions, gram=None, regions=None, entropies=None):
    expected, collisions = np.array(expected, float), np.array(collisions, float)
    return ResponseTokens(
        prompt,
        advantage,
        np.array(regions if regions is not None else [0] * len(expected)),
        np.full(len(expected), math.log(0.5)),
        np.array(entropies, float) if entropies is not None else -np.log(1 - collisions),
        collisions,
        expected,
        np.diag(expected) if gram is None else np.array(gram, float),
    )


def drawn_tokens(seed, number=400, off_policy=False):
    """Tokens sampled from random distributions: log-probability, entropy and collision mass of each."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        p = rng.dirichlet(np.full(6, rng.choice([0.05, 0.5, 5.0])))
        q = np.roll(p, 1) if off_policy else p
        positive = p[p > 0]
        rows.append((np.log(p[rng.choice(6, p=q)] + 1e-300), -(positive * np.log(positive)).sum(), 1 - (p**2).sum()))
    return np.array(rows).T


def test_lemma_two_by_hand():
    # Two tokens of p = (1/2, 1/2): 1 - sum p^2 = 1/2 = 1 - exp(-log 2), tight, and |e_y - p|^2 is always 1/2.
    half = np.full(2, math.log(2))
    found = check_lemma_two(-half, half, np.full(2, 0.5))
    assert (found.tokens, found.violations) == (2, 0)
    assert found.tightness == pytest.approx(1)
    # p = (3/4, 1/4): 1 - sum p^2 = 3/8, H = log 4 - 3/4 log 3, exp(-H) = 3^(3/4) / 4
    entropy = math.log(4) - 0.75 * math.log(3)
    found = check_lemma_two(np.log([0.75]), np.array([entropy]), np.array([0.375]))
    assert found.tightness == pytest.approx(0.375 / (1 - 3**0.75 / 4))
    assert found.violations == 0
    # |e_y - p|^2 = 2 (1/4)^2 = 1/8 against 3/8: one token off by its own deviation is one standard error off
    assert found.z == pytest.approx(-1)


@pytest.mark.parametrize("seed", range(5))
def test_lemma_two_holds_on_any_distribution_and_detects_other_policies(seed):
    found = check_lemma_two(*drawn_tokens(seed))
    assert found.violations == 0
    assert 0 < found.tightness < 1
    assert abs(found.z) < 4
    assert check_lemma_two(*drawn_tokens(seed, off_policy=True)).z > 5


def test_a_token_beyond_the_bound_is_counted():
    assert check_lemma_two(np.log([0.5, 0.5]), np.array([0.1, 0.1]), np.array([0.05, 0.2])).violations == 1


def test_bound_chain_by_hand():
    # One token pair per response, uniform weights, T = 2; gram of the first: diagonal 4 and 1, off-diagonal 1.
    first = response(0, 0.5, [4, 1], [0.5, 0.5], [[4, 1], [1, 1]])
    second = response(1, -1.0, [2, 2], [0.5, 0.25])
    chain = measure_bound_chain([first, second], [np.ones(2), np.ones(2)], 4)
    # E|g|^2: 0.25 * (4 + 1 + 2) / 4 = 7/16 and 1 * (2 + 2) / 4 = 1, mean 23/32
    assert chain.measured.value == pytest.approx(23 / 32)
    # A_max^2 of a group of 4 is (3/2)^2 = 9/4; without advantages |.|^2 = 7/4 and 1
    assert chain.advantage.value == pytest.approx(9 / 4 * (7 / 4 + 1) / 2 / (23 / 32))
    # diagonals alone: (4 + 1) / 4 and (2 + 2) / 4
    assert chain.cross_terms.value == pytest.approx((5 / 4 + 1) / (7 / 4 + 1))
    # the largest gain of the other half: of prompt 1 for prompt 0 max(4, 8) = 8; of prompt 0 for prompt 1 4 / 0.5 = 8
    assert chain.gain.value == pytest.approx((8 * 1 / 4 + 8 * 0.75 / 4) / (5 / 4 + 1))
    # entropies were chosen so that 1 - exp(-H) equals the collision mass
    assert chain.entropy.value == pytest.approx(1)
    product = chain.advantage.value * chain.cross_terms.value * chain.gain.value * chain.entropy.value
    assert chain.looseness == pytest.approx(product)
    assert chain.bound.value == pytest.approx(9 / 4 * 8 * (1 + 0.75) / 4 / 2)


def test_weights_enter_squared():
    one, two = response(0, 1.0, [4, 1], [0.5, 0.5]), response(1, 1.0, [4, 1], [0.5, 0.5])
    plain = measure_bound_chain([one, two], [np.ones(2)] * 2, 4)
    doubled = measure_bound_chain([one, two], [np.full(2, 2.0)] * 2, 4)
    assert doubled.measured.value == pytest.approx(4 * plain.measured.value)
    assert doubled.bound.value == pytest.approx(4 * plain.bound.value)
    # all weight on the first token: 2^2 * 4 / 4 = 4 against 5/4
    first_only = measure_bound_chain([one, two], [np.array([2.0, 0.0])] * 2, 4)
    assert first_only.measured.value == pytest.approx(4)


def test_the_largest_advantage_is_one_response_against_all_others():
    from torch import tensor

    from rest_rl.credit import group_advantages

    rewards = tensor([1.0] + [0.0] * 7)
    assert largest_advantage(8) == pytest.approx(float(group_advantages(rewards, 8).max()), rel=1e-3)


def test_the_gain_ignores_certain_tokens():
    assert max_gain_square([response(0, 1.0, [3, 5], [0.5, 1e-9])]) == pytest.approx(6)


def test_region_summary_by_hand():
    name, reasoning = int(Region.NAME), int(Region.REASONING)
    rows = summarize_regions(
        [
            response(0, 1.0, [2, 4, 6], [0.5, 0.5, 0.25], regions=[name, reasoning, reasoning]),
            response(1, 1.0, [4], [0.5], regions=[name]),
        ]
    )
    assert [(row.region, row.tokens, row.share) for row in rows] == [("name", 2, 0.5), ("reasoning", 2, 0.5)]
    assert rows[0].square.value == pytest.approx(3)
    assert rows[0].square_per_bound.value == pytest.approx(6)
    # leaving a prompt out gives 4 and 2: jackknife error sqrt(1/2 * 2) = 1
    assert rows[0].square.error == pytest.approx(1)
    assert rows[1].square_per_bound.value == pytest.approx(5 / 0.375)


def test_spearman_ignores_scale():
    assert spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [5, 2, 1]) == pytest.approx(-1)


def test_a_region_of_one_prompt_has_no_error():
    rows = summarize_regions(
        [
            response(0, 1.0, [2, 4], [0.5, 0.5], regions=[int(Region.NAME), int(Region.ANSWER)]),
            response(1, 1.0, [4], [0.5], regions=[int(Region.NAME)]),
        ]
    )
    assert [(row.region, row.square.value) for row in rows] == [("name", 3), ("answer", 4)]
    assert rows[0].square.error == pytest.approx(1)
    assert math.isnan(rows[1].square.error)


def test_regions_contrast_only_beyond_their_errors():
    name, reasoning = int(Region.NAME), int(Region.REASONING)

    def contrast(squares):
        some = [response(p, 1.0, [own, 4], [0.5, 0.5], regions=[name, reasoning]) for p, own in enumerate(squares)]
        return contrast_regions(some, summarize_regions(some))

    sure = contrast([1.0, 1.1, 0.9, 1.0, 1.0])
    assert (sure.high, sure.low, sure.is_sure) == ("reasoning", "name", True)
    assert sure.log_ratio.value == pytest.approx(math.log(4))
    unsure = contrast([0.1, 0.1, 0.1, 0.1, 12.0])  # mean 2.48, that of a single prompt
    assert (unsure.high, unsure.is_sure) == ("reasoning", False)
    alone = [response(p, 1.0, [1], [0.5], regions=[name]) for p in range(3)]
    assert contrast_regions(alone, summarize_regions(alone)) is None

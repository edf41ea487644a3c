from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.response import Region
from rest_rl.weights import (
    RegionStatistics,
    RuleName,
    WeightConfig,
    apply_curriculum,
    assign_weights,
    normalize_weights,
    region_weights,
    top_entropy_mask,
)

NAN = float("nan")
WIDE = WeightConfig(w_min=1e-6, w_max=1e6)


def statistics(entropies, counts=(1, 1, 1, 1, 1, 1), collisions=None):
    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    return RegionStatistics(tensor(counts), tensor(entropies), None if collisions is None else tensor(collisions))


LN2 = math.log(2)  # 1 - exp(-ln 2) = 1/2; 1 - exp(-ln 4) = 3/4
TWO_REGIONS = ([LN2, NAN, NAN, 2 * LN2, NAN, NAN], (3, 0, 0, 1, 0, 0))


@pytest.mark.parametrize(
    ("rule", "format_weight", "reasoning_weight"),
    [
        # raw 1/(1/2) = 2 and 1/(3/4) = 4/3; token mean (3 * 2 + 4/3) / 4 = 11/6; 12/11 and 8/11
        ("one_minus_exp", 12 / 11, 8 / 11),
        # raw 1/ln2 and 1/(2 ln2), in units of 1/ln2: 1 and 1/2; token mean 3.5/4 = 7/8; 8/7 and 4/7
        ("inverse", 8 / 7, 4 / 7),
        # raw 1/2 and 3/4; token mean (3/2 + 3/4) / 4 = 9/16; 8/9 and 4/3
        ("inverted", 8 / 9, 4 / 3),
        ("uniform", 1.0, 1.0),
        ("top_entropy", 1.0, 1.0),
    ],
)
def test_rules_by_hand(rule, format_weight, reasoning_weight):
    weights_R = region_weights(statistics(*TWO_REGIONS), replace(WIDE, rule=rule))
    assert weights_R[Region.FORMAT].item() == pytest.approx(format_weight, abs=1e-12)
    assert weights_R[Region.REASONING].item() == pytest.approx(reasoning_weight, abs=1e-12)
    assert weights_R[[1, 2, 4, 5]].tolist() == [1.0] * 4  # a region that was not seen weighs 1


def test_collision_reads_the_collision_mass():
    # raw 1/0.25 = 4 and 1/0.5 = 2; token mean (4 + 2) / 2 = 3; 4/3 and 2/3
    given_statistics = statistics([1.0] * 6, (1, 0, 0, 1, 0, 0), [0.25, NAN, NAN, 0.5, NAN, NAN])
    weights_R = region_weights(given_statistics, replace(WIDE, rule="collision"))
    assert weights_R[[0, 3]].tolist() == pytest.approx([4 / 3, 2 / 3])
    with pytest.raises(ValueError, match="collision"):
        region_weights(statistics([1.0] * 6), replace(WIDE, rule="collision"))


def test_strength_interpolates_geometrically_down_to_grpo():
    # strength 1/2: raw sqrt(2) and sqrt(4/3); token mean (3 sqrt(2) + sqrt(4/3)) / 4
    mean = (3 * math.sqrt(2) + math.sqrt(4 / 3)) / 4
    half_R = region_weights(statistics(*TWO_REGIONS), replace(WIDE, strength=0.5))
    assert half_R[[0, 3]].tolist() == pytest.approx([math.sqrt(2) / mean, math.sqrt(4 / 3) / mean])
    for rule in get_args(RuleName):
        config = WeightConfig(rule=rule, strength=0.0, decay_format=0.5, gain_arguments=0.5, gain_reasoning=0.5)
        weights_R = apply_curriculum(region_weights(statistics(*TWO_REGIONS, [0.5] * 6), config), 1.0, config)
        assert weights_R.tolist() == [1.0] * 6, rule


def test_constants_are_used_unchanged():
    weights_R = region_weights(None, WeightConfig(rule="constant"))
    assert weights_R.tolist() == [1.0, 1.2, 0.6, 0.6, 0.6, 0.6]


def test_permuted_permutes_the_weights_by_seed():
    seen = statistics([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    ordered = region_weights(seen, WIDE)
    first, again = (region_weights(seen, replace(WIDE, rule="permuted", seed=1)) for _ in range(2))
    assert first.tolist() == again.tolist() != ordered.tolist()
    assert sorted(first.tolist()) == sorted(ordered.tolist())
    ways = {tuple(region_weights(seen, replace(WIDE, rule="permuted", seed=s)).tolist()) for s in range(9)}
    assert len(ways) == 9  # the derangements of four regions
    assert all(new != own for way in ways for new, own in zip(way[:4], ordered.tolist(), strict=False))
    assert {way[4:] for way in ways} == {tuple(ordered.tolist()[4:])}


def test_permuted_permutes_the_curriculum_with_the_weights():
    config = WeightConfig(decay_format=0.4, gain_arguments=0.3, gain_reasoning=0.2, rule="permuted", seed=1)
    dealing = [2, 3, 0, 1, 4, 5]  # the fifth of the nine: FORMAT gets what ARGUMENTS would have, NAME that of REASONING
    plain_R = apply_curriculum(torch.ones(6, dtype=torch.float64), 1.0, replace(config, rule="one_minus_exp"))
    assert plain_R.tolist() == pytest.approx([0.6, 1.0, 1.3, 1.2, 1.2, 1.0])
    dealt_R = apply_curriculum(torch.ones(6, dtype=torch.float64), 1.0, config)
    assert dealt_R.tolist() == pytest.approx(plain_R[dealing].tolist())
    seen = statistics([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    whole_R, whole_dealt_R = (apply_curriculum(region_weights(seen, c), 0.5, c) for c in (
        replace(config, rule="one_minus_exp"), config))  # fmt: skip
    assert whole_dealt_R.tolist() == pytest.approx(whole_R[dealing].tolist())


def test_dropped_regions_have_weight_zero_and_the_mean_stays_one():
    config = WeightConfig(rule="uniform", dropped=("reasoning",), gain_reasoning=0.5)
    weights_R = apply_curriculum(region_weights(None, config), 1.0, config)
    assert weights_R.tolist() == [1.0, 1.0, 1.0, 0.0, 1.5, 1.0]
    # FORMAT 1, REASONING 0, 0, 0: mean 1/4, so FORMAT gets 4; a response of reasoning alone has no gradient
    regions_BT = torch.tensor([[0, 3, 3, 3], [3, 3, 3, 3]])
    weights_BT = assign_weights(weights_R, regions_BT, torch.ones_like(regions_BT))
    assert weights_BT.tolist() == [[4, 0, 0, 0], [0, 0, 0, 0]]
    assert WeightConfig(dropped=["name"]) == WeightConfig(dropped=("name",))  # as TOML has it


def test_regions_out_of_scope_have_weight_one():
    config = WeightConfig(rule="inverse", scope=("format", "name"))
    weights_R = region_weights(statistics([1.0, 0.5, 9, 9, 9, 9]), config)
    # 1/1 and 1/0.5 over one token each: mean 1.5
    assert weights_R.tolist() == pytest.approx([1 / 1.5, 2 / 1.5, 1, 1, 1, 1])
    assert region_weights(statistics([1.0] * 6), WeightConfig(scope=())).tolist() == [1.0] * 6


def test_weights_are_clipped_after_division_by_the_token_mean():
    weights_R = region_weights(statistics([1e-9, 0.5, 1, 2, 4, 8]), WeightConfig(w_min=0.5, w_max=2.0))
    assert weights_R.min() == 0.5
    assert weights_R.max() == 2.0


def test_weights_are_equal_before_the_first_measurement():
    assert region_weights(None, WeightConfig()).tolist() == [1.0] * 6
    assert region_weights(statistics([NAN] * 6, [0] * 6), WeightConfig()).tolist() == [1.0] * 6
    overflown = statistics([math.inf, 1.0, 0.5, 1.0, 1.0, 1.0], [1] * 6)
    assert region_weights(overflown, WeightConfig(rule="inverse"))[0] == 1.0  # 1 / inf would weigh nothing


def test_curriculum_by_hand():
    config = WeightConfig(w_min=0.5, w_max=1.4, decay_format=0.8, gain_arguments=0.3, gain_reasoning=0.6)
    # at nu = 1/2: FORMAT 1 - .4 = .6, NAME 1, ARGUMENTS 1 + .15, REASONING and ANSWER 1 + .3, OTHER 1
    ones_R = torch.ones(6, dtype=torch.float64)
    assert apply_curriculum(ones_R, 0.5, config).tolist() == pytest.approx([0.6, 1, 1.15, 1.3, 1.3, 1])
    # at nu = 1: FORMAT max(.5, .2), ARGUMENTS 1.3, REASONING and ANSWER min(1.4, 1.6)
    assert apply_curriculum(ones_R, 1.0, config).tolist() == pytest.approx([0.5, 1, 1.3, 1.4, 1.4, 1])
    assert apply_curriculum(ones_R, 0.0, config).tolist() == [1.0] * 6


def test_tokens_get_the_weight_of_their_region_with_mean_one_per_response():
    # response 1: weights 2, 2, 1 -> mean 5/3 -> 1.2, 1.2, 0.6; response 2: one token; response 3: nothing unmasked
    weights_R = torch.tensor([2.0, 1.0, 1, 1, 1, 5], dtype=torch.float64)
    regions_BT = torch.tensor([[0, 0, 1], [5, 5, 5], [0, 1, 2]])
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    weights_BT = assign_weights(weights_R, regions_BT, mask_BT)
    assert weights_BT.dtype == torch.float32
    expected = torch.tensor([[1.2, 1.2, 0.6], [1, 0, 0], [0, 0, 0]])
    assert torch.allclose(weights_BT, expected, atol=1e-7)


entropies = st.one_of(st.floats(0, 20), st.just(0.0), st.just(NAN), st.just(math.inf))


@given(
    st.sampled_from(get_args(RuleName)),
    st.lists(entropies, min_size=6, max_size=6),
    st.lists(st.integers(0, 10**6), min_size=6, max_size=6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=4),
)
def test_weights_are_finite_non_negative_and_have_mean_one(rule, h, counts, strength, nu, rows):
    config = WeightConfig(rule=rule, strength=strength, decay_format=0.9, gain_arguments=3.0, gain_reasoning=9.0)
    weights_R = apply_curriculum(region_weights(statistics(h, counts, h), config), nu, config)
    regions_BT = torch.tensor(rows)
    weights_BT = assign_weights(weights_R, regions_BT, torch.ones_like(regions_BT))
    assert torch.isfinite(weights_BT).all()
    assert (weights_BT >= 0).all()
    assert torch.allclose(weights_BT.mean(-1), torch.ones(len(rows)), atol=1e-5)


def test_top_entropy_keeps_the_most_uncertain_tokens_and_one_of_every_response():
    entropies_BT = torch.tensor([[5.0, 4.0, 1.0, 9.0], [0.1, 0.3, 0.2, 0.0]])
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    # 6 unmasked tokens, 1/3 of them kept: 5 and 4; the second response has none of these and keeps its own 0.3
    kept_BT = top_entropy_mask(entropies_BT, mask_BT, 1 / 3)
    assert kept_BT.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]
    assert normalize_weights(kept_BT, mask_BT)[0].tolist() == [1.5, 1.5, 0, 0]
    assert top_entropy_mask(entropies_BT, torch.zeros_like(mask_BT), 0.2).sum() == 0
    assert top_entropy_mask(entropies_BT * NAN, mask_BT, 0.2).sum(-1).min() >= 1
    with pytest.raises(ValueError, match="have shapes"):
        top_entropy_mask(entropies_BT[:1], mask_BT, 0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "entropy"}, "one_minus_exp"),
        ({"strength": 1.5}, r"\[0, 1\]"),
        ({"w_min": 0.0}, "w_min"),
        ({"w_max": math.inf}, "w_max"),
        ({"quantile": 0.0}, "quantile"),
        ({"uncertainty_floor": 0.0}, "above 0"),
        ({"constants": {"format": 1.0}}, "reasoning"),
        ({"dropped": ("think",)}, "'think'.*reasoning"),
        ({"scope": ("call",)}, "'call'.*reasoning"),
        ({"dropped": tuple(WeightConfig().constants)}, "every region"),
        ({"dropped": ("name",), "rule": "top_entropy"}, "top_entropy"),
        ({"constants": dict.fromkeys(WeightConfig().constants, 0.0)}, "and not all 0"),
    ],
)
def test_invalid_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightConfig(**settings)


def test_progress_outside_zero_to_one_is_an_error():
    with pytest.raises(ValueError, match="progress"):
        apply_curriculum(torch.ones(6), 1.01, WeightConfig())

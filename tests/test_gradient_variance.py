import math

import pytest
import torch

from research.theory.estimates import GradientFigures, largest_share
from rest_rl.probe.variance import (
    Estimate,
    HalfStatistics,
    UnitSums,
    add_sums,
    choose_num_blocks,
    compute_adam_progress,
    compute_batch_figures,
    compute_gradient_series,
    compute_norm_scales,
    generate_halvings,
    max_prompts_per_step,
    sum_by_block,
)


def gradient_figures(g, base, t, *, batch=1, blocks=8, scales_M=None):
    own, baseline = (compute_gradient_series(x, t, batch=batch, blocks=blocks, scales_M=scales_M) for x in (g, base))
    return GradientFigures.from_series(own, baseline, largest_share(g, scales_M))


def efficiency(g, t, *, adam=False, batch=1, blocks=8):
    figures = gradient_figures(g, g, t, batch=batch, blocks=blocks)
    return figures.eff_adam if adam else figures.eff


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums_of(g, t):
    return UnitSums(len(g), g.sum(0), t.sum(0), g.square().sum(0), (g * t).sum(0), float(t.square().sum()))


def test_sums_by_hand():
    g = torch.tensor([[1.0, 0.0], [3.0, 2.0], [1.0, 0.0], [3.0, 2.0]])
    t = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    first, second = sums_of(g[:2], t[:2]), sums_of(g[2:], t[2:])
    sums = add_sums([first, second])
    variance, mean_square, cosine, true_norm, progress = compute_batch_figures(sums, 2)
    # sum g = (8, 4), sum t = (4, 2); sum_m <g_m, t_m> = 1 + 5 + 2 + 0 = 8; pairs of different units: 4 * 3 = 12
    assert sums.signals.sum() == pytest.approx((8 * 4 + 4 * 2 - 8) / 12)
    # sum |g_m|^2 = 1 + 13 + 1 + 13 = 28; |sum g|^2 = 80: (80 - 28) / 12
    assert mean_square == pytest.approx(52 / 12)
    # sum |t_m|^2 = 2 + 2 + 4 = 8; |sum t|^2 = 20
    assert true_norm == pytest.approx(1)
    # the sample variances of (1, 3, 1, 3) and (0, 2, 0, 2): 4/3 each; half of that in a batch of 2
    assert variance == pytest.approx(8 / 3 / 2)
    # E g_j^2 of batches of 2: mean^2 + s^2 (1/2 - 1/4) = 4 + 1/3 and 1 + 1/3
    assert sums.second_moments(2).tolist() == pytest.approx([13 / 3, 4 / 3])
    assert sums.second_moments(1).sum() == pytest.approx(8 / 3 + mean_square)
    assert progress == pytest.approx((32 / 12) / math.sqrt(17 / 3))
    assert cosine == pytest.approx((32 / 12) / math.sqrt(52 / 12))


def test_adam_divides_the_signal_of_one_half_by_the_scales_of_the_other():
    first = sums_of(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    second = sums_of(torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    # signals: pairs of different units over 2: (1 + 3) / 2 and (0 + 2) / 2; (1 * 0 + 5 * 2) / 2 and 0
    # E g_j^2 of single units: mean^2 + s^2 / 2: 4 + 1 and 1 + 1; 9 + 4 and 0, which is raised to a thousandth of 13 / 2
    expected = ((2 / math.sqrt(13) + 1 / math.sqrt(0.0065)) + (5 / math.sqrt(5) + 0)) / 2 / math.sqrt(2)
    halves = HalfStatistics.from_sums(first, 1), HalfStatistics.from_sums(second, 1)
    assert halves[0].progress(halves[1]) == pytest.approx(expected)
    assert halves[1].progress(halves[0]) == pytest.approx(expected)


def test_blocks_are_split_into_halves_in_several_ways():
    assert list(generate_halvings(4)) == [[0, 1, 0, 1], [0, 0, 1, 1]]
    sixteen = list(generate_halvings(16))
    assert all(sum(sides) == 8 for sides in sixteen)
    apart = [(i, k) for i in range(16) for k in range(i) if all(sides[i] != sides[k] for sides in sixteen)]
    assert apart == [(i, 15 - i) for i in range(8, 16)]
    assert [choose_num_blocks(units) for units in (8, 9, 10, 17, 18, 500)] == [4, 4, 8, 8, 16, 16]
    # 8 units in 4 blocks: halves of 4, 2 of which are left; 64 in 16: a quarter
    assert [max_prompts_per_step(units) for units in (8, 12, 64, 96)] == [1, 2, 16, 24]


def test_a_rarely_touched_coordinate_does_not_drown_the_others():
    g = torch.ones(16, 1001) + 0.3 * normal(16, 1001)
    g[:, 0] = 1e-7
    g[[1, 5], 0] = 1.0  # a rare event, whose two units are often in the same half
    found = Estimate.from_jackknife(compute_adam_progress(sum_by_block(g, g, 8), 2))
    rest = Estimate.from_jackknife(compute_adam_progress(sum_by_block(g[:, 1:], g[:, 1:], 8), 2))
    assert found.value == pytest.approx(rest.value, rel=0.01)
    assert found.error == pytest.approx(rest.error, rel=0.2)


def test_adam_progress_is_zero_without_signal():
    # g and t of a unit agree except for noise and share a random sign, so E g = E t = 0.
    crossed, same_units = [], []
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(0, 2, (96, 1), generator=rng) - 1
        g = signs * (torch.randn(96, 1000, generator=rng) + 0.1)
        t = 0.8 * g + 0.6 * torch.randn(96, 1000, generator=rng)
        sums = sum_by_block(g, t, 16)
        crossed.append(Estimate.from_jackknife(compute_adam_progress(sums, 16)))
        whole = HalfStatistics.from_sums(add_sums(sums), 16)
        same_units.append(whole.progress(whole))
    values = torch.tensor([one.value for one in crossed])
    assert abs(values.mean()) < 3 * values.std() / 12**0.5
    assert sum(abs(one.value) < 2 * one.error for one in crossed) >= 10
    same = torch.tensor(same_units)
    assert same.mean() < -10 * same.std() / 12**0.5  # signals and scales from the same units are biased


def test_adam_progress_matches_the_closed_form():
    rng = torch.Generator().manual_seed(0)
    g = torch.randn(96, 5000, generator=rng)
    t = 0.8 * g + 0.6 * torch.randn(96, 5000, generator=rng)
    found = Estimate.from_jackknife(compute_adam_progress(sum_by_block(g + 0.1, t + 0.1, 16), 8))
    # sqrt(N) mu^2 / sqrt(mu^2 + 1 / P); noise in the scales adds a few percent
    assert found.value == pytest.approx(math.sqrt(5000) * 0.01 / math.sqrt(0.01 + 1 / 8), rel=0.1)
    assert found.error < 0.2


def test_subtracting_a_block_leaves_the_sums_of_the_others():
    g, t = normal(10, 3), normal(10, 3, seed=1)
    blocks = sum_by_block(g, t, 4)
    rest = add_sums(blocks).without(blocks[0])
    again = sums_of(g[3:], t[3:])
    assert rest.units == 7
    torch.testing.assert_close(rest._asdict(), again._asdict())


def test_shared_noise_is_not_counted_as_signal():
    # g and t are the same pure noise: their true means are 0, and so is every estimate, within its error.
    values = []
    for seed in range(200):
        noise = normal(12, 4, seed=seed)
        values.append(float(add_sums(sum_by_block(noise, noise, 4)).signals.sum()))
    values = torch.tensor(values)
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    naive = normal(12, 4).mean(0).square().sum()
    assert naive > 0.05  # products of a unit with itself count the noise as signal


def test_single_units_predict_a_batch():
    mean = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    units, t = mean + normal(60_000, 3), mean.expand(60_000, 3)
    batches = units.reshape(-1, 6, 3).mean(1)
    predicted = efficiency(units, t, batch=6)
    direct = efficiency(batches, t[: len(batches)], batch=1)
    assert predicted.value == pytest.approx(direct.value, abs=4 * math.hypot(predicted.error, direct.error))
    # closed form: <m, m> / sqrt((|m|^2 + 3/6) |m|^2) with |m|^2 = 1.25
    assert predicted.value == pytest.approx(1.25 / math.sqrt(1.75 * 1.25), abs=0.01)
    adam = efficiency(units, t, batch=6, adam=True)
    closed = (1 / math.sqrt(1 + 1 / 6) + 0.25 / math.sqrt(0.25 + 1 / 6)) / math.sqrt(3) / math.sqrt(1.25)
    assert adam.value == pytest.approx(closed, abs=0.01)


def test_figures_under_scaling_and_reversal():
    g, t = normal(40, 5) + 1, normal(40, 5, seed=1) + 1
    one, seven = efficiency(g, t, batch=3), efficiency(7 * g, t, batch=3)
    assert one == pytest.approx(seven)
    assert efficiency(-g, t, batch=3).value == pytest.approx(-one.value)
    assert gradient_figures(7 * g, g, t).eff_adam_gain == pytest.approx((0, 0), abs=1e-12)
    figures = gradient_figures(2 * g, g, t, batch=4)
    assert figures.eff_gain == pytest.approx((0, 0), abs=1e-12)
    assert figures.variance.value == pytest.approx(4 * gradient_figures(g, g, t, batch=4).variance.value)
    assert figures.variance.value == pytest.approx(4 * float(g.var(0).sum()) / 4)
    assert figures.eff == pytest.approx(efficiency(g, t, batch=4))
    assert figures.lead == pytest.approx((0, 0), abs=1e-12)


def test_a_lead_is_the_difference_that_a_gain_divides():
    g, base, t = normal(40, 5) + 1, normal(40, 5, seed=1) + 1, normal(40, 5, seed=2) + 1
    figures = gradient_figures(g, base, t, batch=2)
    of_base = gradient_figures(base, base, t, batch=2)
    size = compute_batch_figures(add_sums(sum_by_block(g, t, 8)), 2)[3]
    assert figures.lead.value == pytest.approx((figures.eff.value - of_base.eff.value) * size)
    assert figures.adam_lead.value == pytest.approx((figures.eff_adam.value - of_base.eff_adam.value) * size)
    assert figures.eff_gain.value == pytest.approx(figures.eff.value / of_base.eff.value - 1)


def test_errors_cover_the_spread_over_repeats():
    mean = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    found = [efficiency(mean + normal(80, 3, seed=s), mean + normal(80, 3, seed=s + 999), batch=4) for s in range(200)]
    spread = torch.tensor([one.value for one in found]).std()
    typical = torch.tensor([one.error for one in found]).mean()
    assert 0.8 < typical / spread < 1.3


def test_paired_errors_are_smaller_where_the_noise_is_shared():
    g, t = normal(60, 4) + 0.5, normal(60, 4, seed=1) + 0.5
    nearly = g + 0.05 * normal(60, 4, seed=2)
    paired = gradient_figures(nearly, g, t, batch=4).eff_gain
    alone = efficiency(nearly, t, batch=4)
    assert paired.error < 0.3 * alone.error / alone.value


def test_a_dominant_unit_is_flagged_and_capped():
    g = torch.ones(12, 2, dtype=torch.float64)
    g[5] = 30
    g[7] = 0
    t = torch.ones(12, 2, dtype=torch.float64)
    # squared norms: 10 of 2, one of 1800, one of 0
    assert largest_share(g) == pytest.approx(1800 / 1820)
    assert gradient_figures(g, g, t, blocks=4).is_dominated
    scales = compute_norm_scales(g, 2.0)
    assert scales.tolist() == pytest.approx([1, 1, 1, 1, 1, 2 / 30, 1, 1, 1, 1, 1, 1])
    assert not gradient_figures(g, g, t, blocks=4, scales_M=scales).is_dominated
    assert largest_share(g, scales) == pytest.approx(8 / 28)
    capped = gradient_figures(g, g, t, blocks=4, scales_M=scales)
    by_hand = gradient_figures(g * scales[:, None], g * scales[:, None], t * scales[:, None], blocks=4)
    assert capped.eff == pytest.approx(by_hand.eff)


def test_zero_gradients_give_nan():
    nothing = torch.zeros(8, 3)
    figures = gradient_figures(nothing, nothing, nothing, blocks=4)
    assert math.isnan(figures.eff.value)
    assert math.isnan(figures.eff_gain.value)
    assert figures.variance.value == 0
    assert compute_norm_scales(nothing, 2.0).tolist() == [1.0] * 8


def test_errors_quote_the_wrong_value():
    with pytest.raises(ValueError, match=r"gradients are \(4, 2\) and true gradients \(4, 3\)"):
        efficiency(torch.ones(4, 2), torch.ones(4, 3))
    with pytest.raises(ValueError, match="9 units cannot form 8 blocks"):
        efficiency(torch.ones(9, 2), torch.ones(9, 2))
    with pytest.raises(ValueError, match="12 units cannot form 6 blocks"):
        efficiency(normal(12, 2), normal(12, 2), blocks=6)
    with pytest.raises(ValueError, match="12 units cannot predict a batch of 10, expected a batch of 1 to 2"):
        efficiency(normal(12, 2), normal(12, 2), batch=10, blocks=4)
    with pytest.raises(ValueError, match="norm cap is 0"):
        compute_norm_scales(torch.ones(4, 2), 0)

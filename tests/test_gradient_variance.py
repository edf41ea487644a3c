import math

import pytest
import torch

from rest_rl.analyze.gradient_variance import (
    block_sums,
    efficiency,
    efficiency_gain,
    gradient_figures,
    jackknife_error,
    largest_share,
    norm_cap,
    total,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sums_by_hand():
    g = torch.tensor([[1.0, 0.0], [3.0, 2.0], [1.0, 0.0], [3.0, 2.0]])
    t = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    sums = total(block_sums(g, t, 2))
    # sum g = (8, 4), sum t = (4, 2); sum_m <g_m, t_m> = 1 + 5 + 2 + 0 = 8; pairs of different units: 4 * 3 = 12
    assert sums.signal == pytest.approx((8 * 4 + 4 * 2 - 8) / 12)
    # sum |g_m|^2 = 1 + 13 + 1 + 13 = 28; |sum g|^2 = 80: (80 - 28) / 12
    assert sums.mean_square == pytest.approx(52 / 12)
    # sum |t_m|^2 = 2 + 2 + 4 = 8; |sum t|^2 = 20
    assert sums.true_square == pytest.approx(12 / 12)
    # the sample variances of (1, 3, 1, 3) and (0, 2, 0, 2): 4/3 each
    assert sums.variance == pytest.approx(8 / 3)
    # E g_j^2 of batches of 2: mean^2 + s^2 (1/2 - 1/4) = 4 + 1/3 and 1 + 1/3
    assert sums.second_moments(2).tolist() == pytest.approx([13 / 3, 4 / 3])
    assert sums.second_moments(1).sum() == pytest.approx(sums.variance + sums.mean_square)
    assert sums.eff(2) == pytest.approx((32 / 12) / math.sqrt(17 / 3))
    # signal per coordinate: (8 * 4 - (1 + 3 + 2)) / 12 = 26/12 and (4 * 2 - 2) / 12 = 6/12
    expected = (26 / 12 / math.sqrt(13 / 3) + 6 / 12 / math.sqrt(4 / 3)) / math.sqrt(2)
    assert sums.eff(2, adam=True) == pytest.approx(expected)
    assert sums.cosine() == pytest.approx((32 / 12) / math.sqrt(52 / 12))


def test_without_a_block_is_the_rest():
    g, t = normal(10, 3), normal(10, 3, seed=1)
    blocks = block_sums(g, t, 4)
    rest = total(blocks).without(blocks[0])
    again = total(block_sums(g[3:], t[3:], 2))
    assert rest.units == 7
    torch.testing.assert_close(vars(rest), vars(again))


def test_shared_noise_is_no_signal():
    # g and t are the same pure noise: their true means are 0, and so is every estimate, within its error.
    values = []
    for seed in range(200):
        noise = normal(12, 4, seed=seed)
        values.append(total(block_sums(noise, noise, 2)).signal)
    values = torch.tensor(values)
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    naive = normal(12, 4).mean(0).square().sum()
    assert naive > 0.05  # what products of a unit with itself would have said


def test_a_batch_of_units_is_predicted_by_single_ones():
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


def test_scale_and_direction():
    g, t = normal(40, 5) + 1, normal(40, 5, seed=1) + 1
    one, seven = efficiency(g, t, batch=3), efficiency(7 * g, t, batch=3)
    assert one == pytest.approx(seven)
    assert efficiency(-g, t, batch=3).value == pytest.approx(-one.value)
    assert efficiency_gain(7 * g, g, t, adam=True) == pytest.approx((0, 0), abs=1e-12)
    figures = gradient_figures(2 * g, g, t, batch=4)
    assert figures.eff_gain == pytest.approx((0, 0), abs=1e-12)
    assert figures.variance.value == pytest.approx(4 * gradient_figures(g, g, t, batch=4).variance.value)
    assert figures.variance.value == pytest.approx(4 * float(g.var(0).sum()) / 4)
    assert figures.eff == pytest.approx(efficiency(g, t, batch=4))
    assert figures.lead == pytest.approx((0, 0), abs=1e-12)


def test_a_lead_is_a_gain_without_the_quotient():
    g, base, t = normal(40, 5) + 1, normal(40, 5, seed=1) + 1, normal(40, 5, seed=2) + 1
    figures = gradient_figures(g, base, t, batch=2)
    of_base = gradient_figures(base, base, t, batch=2)
    size = total(block_sums(g, t, 8)).true_square ** 0.5
    assert figures.lead.value == pytest.approx((figures.eff.value - of_base.eff.value) * size)
    assert figures.adam_lead.value == pytest.approx((figures.eff_adam.value - of_base.eff_adam.value) * size)
    assert figures.eff_gain.value == pytest.approx(figures.eff.value / of_base.eff.value - 1)


def test_jackknife_of_a_mean_is_its_standard_error():
    # leave-one-out means of (1, 2, 6): 4, 3.5, 1.5; the standard error of the mean is s / sqrt(3) with s^2 = 7
    assert jackknife_error([4.0, 3.5, 1.5]) == pytest.approx(math.sqrt(7 / 3))


def test_errors_cover_the_spread_over_repeats():
    mean = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    found = [efficiency(mean + normal(80, 3, seed=s), mean + normal(80, 3, seed=s + 999), batch=4) for s in range(200)]
    spread = torch.tensor([one.value for one in found]).std()
    typical = torch.tensor([one.error for one in found]).mean()
    assert 0.8 < typical / spread < 1.3


def test_paired_errors_are_smaller_where_the_noise_is_shared():
    g, t = normal(60, 4) + 0.5, normal(60, 4, seed=1) + 0.5
    nearly = g + 0.05 * normal(60, 4, seed=2)
    paired = efficiency_gain(nearly, g, t, batch=4)
    alone = efficiency(nearly, t, batch=4)
    assert paired.error < 0.3 * alone.error / alone.value


def test_one_unit_that_dominates_is_said_and_capped():
    g = torch.ones(12, 2, dtype=torch.float64)
    g[5] = 30
    g[7] = 0
    t = torch.ones(12, 2, dtype=torch.float64)
    # squared norms: 10 of 2, one of 1800, one of 0
    assert largest_share(g) == pytest.approx(1800 / 1820)
    assert gradient_figures(g, g, t, blocks=4).is_dominated
    scales = norm_cap(g, 2.0)
    assert scales.tolist() == pytest.approx([1, 1, 1, 1, 1, 2 / 30, 1, 1, 1, 1, 1, 1])
    assert not gradient_figures(g, g, t, blocks=4, scales_M=scales).is_dominated
    assert largest_share(g, scales) == pytest.approx(8 / 28)
    capped = gradient_figures(g, g, t, blocks=4, scales_M=scales)
    by_hand = gradient_figures(g * scales[:, None], g * scales[:, None], t * scales[:, None], blocks=4)
    assert capped.eff == pytest.approx(by_hand.eff)


def test_no_gradient_at_all_is_no_number():
    nothing = torch.zeros(8, 3)
    figures = gradient_figures(nothing, nothing, nothing, blocks=2)
    assert math.isnan(figures.eff.value)
    assert math.isnan(figures.eff_gain.value)
    assert figures.variance.value == 0
    assert norm_cap(nothing, 2.0).tolist() == [1.0] * 8


def test_errors_name_what_was_got():
    with pytest.raises(ValueError, match=r"got gradients \(4, 2\) and true gradients \(4, 3\)"):
        efficiency(torch.ones(4, 2), torch.ones(4, 3))
    with pytest.raises(ValueError, match="9 units for 8 blocks"):
        efficiency(torch.ones(9, 2), torch.ones(9, 2))
    with pytest.raises(ValueError, match="a batch of 10 units, expected 1 to 9"):
        efficiency(normal(12, 2), normal(12, 2), batch=10, blocks=4)
    with pytest.raises(ValueError, match="norm cap of 0"):
        norm_cap(torch.ones(4, 2), 0)

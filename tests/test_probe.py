"""Figures of a probe checked by hand, unbiasedness of the estimators, verdict and recommendation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from rest_rl.jsonl import as_json
from rest_rl.presets import PRESETS
from rest_rl.probe.figures import (
    InnerProducts,
    RuleSeries,
    compute_difference_facts,
    compute_gradient_facts,
    compute_region_facts,
    compute_rule_facts,
    compute_token_facts,
    measure_signal,
    summarize_samples,
)
from rest_rl.probe.measure import compute_grpo_weights, compute_region_and_true_weights
from rest_rl.probe.page import build_tables, render_page, to_mapping
from rest_rl.probe.report import (
    DifferenceFacts,
    GradientFacts,
    LowEntropyFacts,
    ProbeReport,
    RegionFacts,
    RuleFacts,
    SampledTokens,
    SamplingFacts,
    TokenFacts,
)
from rest_rl.probe.rules import SHUFFLED, UNIFORM, built_in_rules, select_rules
from rest_rl.probe.sample import SampledGroup, SampledResponse
from rest_rl.probe.variance import Estimate, compute_gradient_series
from rest_rl.response import NUM_REGIONS, Region
from rest_rl.weights import TaggedBatch, WeightConfig

FORMAT, NAME, REASONING = Region.FORMAT, Region.NAME, Region.REASONING


def group(*responses: tuple[list[int], list[Region], float]) -> SampledGroup:
    """Responses as (ids, regions, reward)."""
    return SampledGroup(
        [1], tuple(SampledResponse(i, [int(r) for r in rs], x, 1.0, x, x == 1) for i, rs, x in responses)
    )


def test_inner_products_with_each_prompt_left_out() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 6, 5))
    found = InnerProducts.from_gram(left @ right.T)
    for dropped in range(6):
        kept = [m for m in range(6) if m != dropped]
        smaller = InnerProducts.from_gram(left[kept] @ right[kept].T)
        assert found.across_1M[1 + dropped] == pytest.approx(smaller.across_1M[0])
        assert found.within_1M[1 + dropped] == pytest.approx(smaller.within_1M[0])


def test_products_of_different_prompts_contain_no_noise() -> None:
    # mean e1, noise ±e2 twice each: |sum|² = 4² + 0, sum |.|² = 8, so across = (16 - 8) / (4 * 3) = 2/3
    vectors = np.array([[1, 1], [1, 1], [1, -1], [1, -1]], dtype=float)
    found = InnerProducts.from_gram(vectors @ vectors.T)
    assert found.across_1M[0] == pytest.approx(2 / 3)
    assert found.noise()[0] == pytest.approx(2 - 2 / 3)
    many = np.random.default_rng(1).normal(size=(4000, 2)) + np.array([0.5, 0.0])
    assert InnerProducts.from_gram(many @ many.T).across_1M[0] == pytest.approx(0.25, abs=0.03)  # while within is 2.25


def gram(vectors_KMN: np.ndarray) -> np.ndarray:
    return np.einsum("kmn,lpn->kmlp", vectors_KMN, vectors_KMN)


def test_shares_of_norm_and_signal_add_up() -> None:
    # format 3 e1, name 4 e2, t = e1 + e2, for every prompt: |g|² = 25, <g, t> = 7
    vectors = np.zeros((NUM_REGIONS + 1, 5, 2))
    vectors[FORMAT, :, 0], vectors[NAME, :, 1], vectors[-1] = 3, 4, 1
    products = gram(vectors)
    form, name = compute_gradient_facts(products, [FORMAT]), compute_gradient_facts(products, [NAME])
    assert (form.norm_share.value, name.norm_share.value) == pytest.approx((9 / 25, 16 / 25))
    assert (form.signal_share.value, name.signal_share.value) == pytest.approx((3 / 7, 4 / 7))
    assert form.surplus.value == pytest.approx(9 / 25 - 3 / 7)
    assert form.signal_share.error == pytest.approx(0, abs=1e-12)
    assert math.isnan(form.snr.value)  # no noise to divide by
    assert compute_gradient_facts(products, [FORMAT, NAME]).signal_share.value == pytest.approx(1)
    noisy = vectors + np.random.default_rng(2).normal(size=vectors.shape)
    facts = [compute_gradient_facts(gram(noisy), [region]) for region in Region]
    assert sum(one.norm_share.value for one in facts) == pytest.approx(1)
    assert sum(one.signal_share.value for one in facts) == pytest.approx(1)


def test_signal_snr_and_largest_prompt_share() -> None:
    vectors = np.zeros((NUM_REGIONS + 1, 4, 2))
    vectors[NAME] = [[1, 1], [1, 1], [1, -1], [1, -1]]
    vectors[-1] = [1, 0]
    signal, snr, heaviest = measure_signal(gram(vectors))
    assert (signal.value, signal.error) == pytest.approx((1, 0))
    assert snr.value == pytest.approx((2 / 3) / (4 / 3))
    assert heaviest == pytest.approx(1 / 4)
    assert measure_signal(np.zeros((7, 4, 7, 4)))[2] == 0


def test_a_region_difference_predicts_a_reward_difference() -> None:
    names = [
        group(([5, 7], [FORMAT, NAME], 1), ([5, 7], [FORMAT, NAME], 1), ([5, 8], [FORMAT, NAME], 0)) for _ in "abcd"
    ]
    # pairs: two of unequal reward, the names differ in both; one of equal reward, the names are equal
    assert compute_difference_facts(names, NAME) == DifferenceFacts(Estimate(1, 0), Estimate(1, 0))
    assert compute_difference_facts(names, FORMAT).auc.value == 0.5  # never differs: 0.5 + (0 - 0) / 2
    always = [group(([5], [REASONING], 1), ([6], [REASONING], 1), ([7], [REASONING], 0)) for _ in "abcd"]
    assert compute_difference_facts(always, REASONING).auc.value == 0.5  # always differs: 0.5 + (1 - 1) / 2
    # one more group with a name that makes no difference: 8 of 9 unequal pairs and 0 of 4 + 0 equal ones differ
    mixed = [*names, group(([5, 7], [FORMAT, NAME], 1), ([5, 7], [FORMAT, NAME], 0))]
    assert compute_difference_facts(mixed, NAME).auc.value == pytest.approx(0.5 + (8 / 9) / 2)
    assert compute_difference_facts(mixed, NAME).best_worst.value == pytest.approx(4 / 5)


def test_equal_rewards_leave_the_auc_undefined() -> None:
    flat = [group(([5], [NAME], 1), ([6], [NAME], 1)) for _ in "abc"]
    facts = compute_difference_facts(flat, NAME)
    assert math.isnan(facts.auc.value)
    assert math.isnan(facts.best_worst.value)
    assert summarize_samples(flat, {5}) == SamplingFacts(3, 2, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0)


def tokens(*prompts: tuple[list[Region], list[float]]) -> SampledTokens:
    owners = np.repeat(np.arange(len(prompts)), [len(regions) for regions, _ in prompts])
    entropies = np.concatenate([own for _, own in prompts])
    regions = np.array([int(region) for own, _ in prompts for region in own])
    return SampledTokens(len(prompts), owners, regions, entropies, entropies / 10)


def test_token_figures() -> None:
    facts = compute_token_facts(tokens(([NAME, *[REASONING] * 3], [0.1, 1, 2, 3]), ([NAME, REASONING], [0.3, 2])))
    assert set(facts) == {"name", "reasoning"}
    name, reasoning = facts["name"], facts["reasoning"]
    assert (name.number, reasoning.number) == (2, 4)
    assert name.share.value == pytest.approx(2 / 6)
    assert (name.entropy.value, reasoning.entropy.value) == pytest.approx((0.2, 2.0))
    assert name.collision.value == pytest.approx(0.02)
    assert reasoning.entropy_p90 == pytest.approx(2.7)  # between 2 and 3: rank 0.9 * 3 = 2.7
    # leaving one out: shares 1/2 and 1/4, mean 3/8, se² = 1/2 * 2 * (1/8)²
    assert name.share.error == pytest.approx(1 / 8)


def test_low_entropy_regions_together() -> None:
    vectors = np.zeros((NUM_REGIONS + 1, 3, 2))
    vectors[NAME, :, 0], vectors[REASONING, :, 1], vectors[-1] = 3, 1, 1
    sampled = [group(([5, 6], [NAME, REASONING], 1), ([5, 7], [NAME, REASONING], 0)) for _ in range(3)]
    own = tokens(*[([NAME, REASONING] * 2, [0.1, 2, 0.1, 2])] * 3)
    facts, sure = compute_region_facts(sampled, own, gram(vectors))
    assert list(facts) == ["name", "reasoning"]
    assert sure.regions == ("name",)
    assert (sure.share.value, sure.signal_share.value, sure.surplus.value) == pytest.approx((0.5, 0.75, 0.25))


def test_weights_of_the_grpo_objective() -> None:
    own = group(([5, 6], [NAME, REASONING], 1), ([5], [NAME], 0))
    # rewards 1, 0: mean 1/2, sd 0.7071; A = ±0.5 / (0.7071 + 1e-4); divided by G T_i = 4 and 2
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert compute_grpo_weights([own]).tolist() == [
        pytest.approx([advantage / 4] * 2),
        pytest.approx([-advantage / 2, 0]),
    ]
    parts = compute_region_and_true_weights([own])
    assert parts.shape == (NUM_REGIONS + 1, 2, 2)
    assert torch.equal(parts[:-1].sum(0), compute_grpo_weights([own]))
    assert parts[NAME].tolist() == [pytest.approx([advantage / 4, 0]), pytest.approx([-advantage / 2, 0])]
    assert parts[-1].tolist() == [[0.5, 0.5], [-0.5, 0]]  # (1 - 1/2) / (2 - 1)


def test_the_true_gradient_is_unbiased() -> None:
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    rewards = [1.0, 0.25, 0.0]
    p = logits.softmax(0)
    wanted = torch.autograd.grad((p * torch.tensor(rewards, dtype=torch.float64)).sum(), logits)[0]
    expected = torch.zeros(3, dtype=torch.float64)
    for ids in product(range(3), repeat=3):  # every group of three one-token responses, by its probability
        weights = compute_region_and_true_weights([group(*(([i], [NAME], rewards[i]) for i in ids))])[-1][:, 0]
        scores = torch.stack([torch.eye(3, dtype=torch.float64)[i] - p for i in ids]).detach()
        expected += p[list(ids)].prod().item() * (weights[:, None] * scores).sum(0)
    assert torch.allclose(expected, wanted)


def test_gains_ignore_scale_and_reward_less_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    true = torch.tensor([[1.0, 0.0]]).expand(400, 2)
    noise = torch.randn(400, 2, generator=rng) * torch.tensor([0.0, 2.0])
    names = [UNIFORM, "twice", "quiet", *SHUFFLED]
    stacks = [true + noise, 2 * (true + noise), true + 0.5 * noise, *[true + noise] * 3]
    series = [compute_gradient_series(vectors, true, batch=4) for vectors in stacks]
    facts = compute_rule_facts([RuleSeries(n, {}, (1, 1), own) for n, own in zip(names, series, strict=True)], SHUFFLED)
    twice, quiet = facts[1], facts[2]
    assert (twice.gain.value, twice.adam_gain.value) == pytest.approx((0, 0), abs=1e-9)
    # |mean|² = 1, variance 4 and 1 of a prompt, 1 and 1/4 of a step: eff 1/sqrt(2) and 1/sqrt(1.25)
    assert quiet.gain.value == pytest.approx(math.sqrt(2 / 1.25) - 1, abs=0.05)
    assert quiet.adam_gain.value == pytest.approx(0, abs=0.01)  # Adam scales the noisy coordinate by itself
    assert quiet.noise_ratio.value == pytest.approx(0.25, abs=0.05)
    assert quiet.cosine.value == pytest.approx(1, abs=0.02)
    assert quiet.adam_over_shuffled.value == pytest.approx(quiet.adam_gain.value)


def test_the_rules_begin_with_uniform_weights() -> None:
    rules = built_in_rules()
    assert next(iter(rules)) == UNIFORM
    assert set(SHUFFLED) < set(rules)
    own = rules["rest"]
    assert isinstance(own, WeightConfig)
    assert all(rules[name] == replace(own, rule="permuted", seed=i) for i, name in enumerate(SHUFFLED, 1))


def words(batch: TaggedBatch, statistics: object, progress: float) -> torch.Tensor:
    """A weight rule that a user wrote."""
    return 1.0 + batch.regions_BT


def test_the_rule_of_the_run_is_added_to_the_built_in_rules() -> None:
    default, tuned = PRESETS["rest"].weights, WeightConfig(strength=0.3)
    assert list(select_rules("toolrl", default)) == list(built_in_rules())
    assert list(select_rules("hermes", words)) == [*built_in_rules(), "words"]
    assert select_rules("toolrl", tuned)["this run"] == tuned
    # the published code knows the tags of two formats only
    assert set(built_in_rules()) - set(select_rules("llama3", default)) == {"authors-code"}


def made_probe(
    adam: float = 0.0, error: float = 0.01, shuffled: float = 0.0, signal: float = 1.0, best: str = "rest"
) -> ProbeReport:
    """A probe with high-entropy reasoning, low-entropy names, and the given gain at the default strength."""

    def region(share: float, entropy: float, signal_share: float, auc: float) -> RegionFacts:
        return RegionFacts(
            TokenFacts(100, Estimate(share, 0.01), Estimate(entropy, 0.1), entropy, Estimate(0.1, 0.01)),
            DifferenceFacts(Estimate(0.9, 0.05), Estimate(auc, 0.05)),
            GradientFacts(
                Estimate(0.5, 0.05), Estimate(signal_share, 0.05), Estimate(0.5 - signal_share, 0.05), Estimate(0.01, 0)
            ),
        )

    def rule(name: str, gain: float) -> RuleFacts:
        figures = (Estimate(5, 1), Estimate(0.9, 0.1), Estimate(0, 0.1))
        difference = Estimate(gain - shuffled, error)
        return RuleFacts(
            name, {"name": 1.6, "reasoning": 0.6}, (0.62, 1.73), *figures, Estimate(gain, error), difference
        )

    other = "rest_live" if best == "rest" else "rest"
    gains = {best: adam, other: adam / 2 - 0.01, "rest_live, strength 1": -0.3}
    return ProbeReport(
        format="toolrl",
        sampled=SamplingFacts(64, 8, 0.1, 0.4, 0.8, 0.6, 0.7, 0.0, 40.0),
        regions={"name": region(0.2, 0.1, 0.7, 0.8), "reasoning": region(0.8, 2.0, 0.3, 0.6)},
        rules=(rule(UNIFORM, 0.0), *(rule(name, gain) for name, gain in gains.items())),
        sure=LowEntropyFacts(("name",), Estimate(0.2, 0.01), Estimate(0.7, 0.05), Estimate(0.5, 0.05)),
        signal=Estimate(signal, 0.2),
        snr=Estimate(0.01, 0.002),
        heaviest=0.1,
        prompts_per_step=16,
        progress=0.0,
        coordinates=10,
        parameters=10,
        tokens=tokens(([NAME, REASONING], [0.1, 2.0])),
    )


def test_weights_are_recommended_if_their_gain_is_significant_and_beats_shuffling() -> None:
    found = made_probe(adam=0.2).advice
    own = built_in_rules()["rest"]
    assert isinstance(own, WeightConfig)
    assert (found.preset, found.rule, found.strength) == ("rest", own.rule, own.strength)
    assert (found.w_min, found.w_max) == (own.w_min, own.w_max)
    assert found.sureness == "likely"
    assert "+20.0 ± 1.0 %" in found.why
    live = made_probe(adam=0.2, best="rest_live").advice
    assert (live.preset, live.strength) == ("rest_live", 0.25)
    assert (live.w_min, live.w_max) == (0.6, 1.8)  # 0.62 and 1.73, rounded outward


@pytest.mark.parametrize(
    ("probe", "sureness", "why"),
    [
        (made_probe(adam=0.2, shuffled=0.2), "unsure", "shuffled"),
        (made_probe(adam=0.2, error=0.1), "unsure", "chance"),
        (made_probe(adam=0.01), "likely", "unlikely to help"),
        (made_probe(adam=-0.1), "likely", "rest_live, strength 1 would cost 30 ± 1 %"),
        (made_probe(adam=0.2, signal=0.3), "not measurable", "noise"),
        (made_probe(adam=0.2, signal=math.nan), "not measurable", "noise"),
        (made_probe(adam=math.nan, error=math.nan), "not measurable", "increase --prompts"),
    ],
)
def test_uniform_weights_are_recommended_otherwise(probe: ProbeReport, sureness: str, why: str) -> None:
    found = probe.advice
    assert (found.preset, found.strength) == ("grpo", None)
    assert found.sureness == sureness
    assert why in found.why


def kinds(report: ProbeReport) -> list[str]:
    return [remark.kind for remark in report.verdict]


def test_the_verdict_names_the_regions_with_the_signal() -> None:
    own = made_probe()
    assert kinds(own) == ["signal", "signal", "noise", "sure regions above", "telling"]
    name, reasoning, noise, sure, telling = (remark.text for remark in own.verdict)
    assert all(figure in name for figure in ("name", "70 ± 5 %", "20 %", "50 ± 5 %"))
    assert all(figure in reasoning for figure in ("reasoning", "30 ± 5 %"))
    assert "reasoning" in noise
    assert "(name)" in sure
    assert "region name" in telling
    assert "0.80 ± 0.05" in telling


def test_the_verdict_names_obstacles() -> None:
    own = made_probe(signal=0.1)
    hampered = replace(own, sampled=own.sampled._replace(no_spread=0.9, truncated=0.4), heaviest=0.8)
    assert kinds(hampered) == ["no spread", "cut off", "one prompt", "no signal", "telling"]
    spread, cut, heavy, *_ = (remark.text for remark in hampered.verdict)
    assert ("90 %" in spread, "40 %" in cut, "80 %" in heavy) == (True, True, True)


def test_a_format_that_is_never_met_is_not_blamed_on_too_few_prompts() -> None:
    own = made_probe(signal=0.0)
    never = replace(own, sampled=own.sampled._replace(no_spread=1.0, s_format=0.0, truncated=0.4))
    assert kinds(never) == ["no format", "cut off", "telling"]  # too few tokens may be why
    assert never.advice.sureness == "not measurable"
    for text in (never.verdict[0].text, never.advice.why):
        assert "--format" in text
        assert "--prompts" not in text
    assert "no spread" in kinds(replace(never, sampled=never.sampled._replace(s_format=0.2)))


def test_an_insignificant_auc_is_not_reported_as_the_best() -> None:
    def told(name: Estimate, reasoning: Estimate) -> list[str]:
        own = made_probe()
        regions = {
            label: facts._replace(differences=facts.differences._replace(auc=auc))
            for (label, facts), auc in zip(own.regions.items(), (name, reasoning), strict=True)
        }
        return [remark.text for remark in replace(own, regions=regions).verdict if remark.kind == "telling"]

    assert told(Estimate(0.55, 0.03), Estimate(0.5, 0.0)) == []  # 0.55 is 1.7 errors from 0.5
    assert "0.60 ± 0.03" in told(Estimate(0.6, 0.03), Estimate(0.9, 0.3))[0]


def test_a_ratio_with_an_insignificant_divisor_shows_as_a_dash() -> None:
    own = made_probe()
    lost = [rule._replace(noise_ratio=Estimate(51.0, 1.2e19), cosine=Estimate(0.3, 35.0)) for rule in own.rules]
    text = render_page("Probe", [replace(own, rules=tuple(lost), prompts_per_step=1)], {})
    assert "| rest | +0 ± 1 | +0 ± 10 | – | – |" in text.replace("+0.0 ± 1.0", "+0 ± 1")
    assert "gain over uniform weights per step of 1 prompt\n" in text


def test_page_and_json_show_the_figures() -> None:
    own = made_probe(adam=math.nan, error=math.nan)
    row = json.loads(as_json(to_mapping(own)))
    assert row["regions"]["name"]["gradient"]["signal_share"] == [0.7, 0.05]
    assert row["rules"][1]["adam_gain"] == [None, None]
    assert row["recommendation"]["preset"] == "grpo"
    text = render_page("Probe of a model", [own], {"toolrl": []})
    assert "| rest | – | +0 ± 10 | 0.90 ± 0.10 | 5.0 ± 1.0 |" in text
    assert all(len(row) == len(table.header) for table in build_tables(own) for row in table.rows)

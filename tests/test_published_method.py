"""ResT's sources disagree: hand-computed numbers that tell the poster, the published code and our presets apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rest_rl.config import RestTable, RunConfig, parse_recorded_run
from rest_rl.errors import RenamedWarning, UserError
from rest_rl.formats import FORMATS, get_format
from rest_rl.presets import PRESETS, Preset, get_origin, get_preset, score_response
from rest_rl.regions import tag_regions
from rest_rl.response import NUM_REGIONS, Gold, Region, ToolCall
from rest_rl.rewards import AuthorsReward, RewardConfig, check_reward_rule
from rest_rl.weights import (
    AuthorsWeights,
    RegionStatistics,
    TaggedBatch,
    WeightConfig,
    apply_weight_rule,
    normalize_by_turn,
    normalize_weights,
    scale_to_mean_one,
)
from tests.tokenizers_in_memory import byte_level

CALL = (ToolCall("f", {"a": 1}),)
POSTER = RewardConfig(accuracy_share_start=1.0, accuracy_share_end=0.0)
"""The reward on the paper's poster: R = S_acc (1 - nu) + S_format nu."""


# Reward


@pytest.mark.parametrize(
    ("progress", "poster", "ours", "published"),
    [
        # S_format 1, S_acc (1 + 1 + 0) / 3: the poster starts with accuracy and ends with the format, `rest` goes from
        # equal shares to 3/4 accuracy, the published code from [-2, 2] + [-2, 2] to [-1, 1] + [-3, 3].
        (0.0, 2 / 3, 1 / 2 * 2 / 3 + 1 / 2, 2 + (4 * 2 / 3 - 2)),
        (0.5, 1 / 2 * 2 / 3 + 1 / 2, 0.625 * 2 / 3 + 0.375, 1.5 + (5 * 2 / 3 - 2.5)),
        (1.0, 1.0, 3 / 4 * 2 / 3 + 1 / 4, 1 + (6 * 2 / 3 - 3)),
    ],
)
def test_three_sources_give_three_rewards(progress: float, poster: float, ours: float, published: float) -> None:
    text, gold = FORMATS["toolrl"].render("a thought", (ToolCall("f", {"a": 2}),), None), Gold(CALL)
    presets: dict[str, str | Preset] = {
        "poster": replace(PRESETS["rest"], reward=POSTER),
        "ours": "rest",
        "published": "authors-code",
    }
    found = {name: score_response(text, gold, preset=preset, progress=progress) for name, preset in presets.items()}
    assert found["poster"].total == pytest.approx(poster)
    assert found["ours"].total == pytest.approx(ours)
    assert found["published"].total == pytest.approx(published)
    assert len({round(reward.total, 6) for reward in found.values()}) == 3


def test_the_share_of_the_accuracy_is_that_of_the_published_code() -> None:
    """The range of each published score, from its worst to its best response, at the start and at step 150."""
    right, wrong = FORMATS["toolrl"].render("a thought", CALL, None), "nonsense"
    for progress in (0.0, 1.0):
        best, worst = (
            score_response(text, Gold(CALL), preset="authors-code", progress=progress) for text in (right, wrong)
        )
        accuracy, well_formatted = best.accuracy - worst.accuracy, best.format - worst.format
        ours = score_response(right, Gold(CALL), progress=progress, truncated=True).total  # S_acc 1, S_format 0
        assert ours == pytest.approx(accuracy / (accuracy + well_formatted))


@pytest.mark.parametrize("name", [*FORMATS, "toolrl+think", "hermes+think"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_gold_full_marks_or_refuses_the_format(preset: str, name: str) -> None:
    tool_format, reward = get_format(name), PRESETS[preset].reward
    if preset == "authors-code" and name != "toolrl":
        with pytest.raises(UserError, match="toolrl"):
            check_reward_rule(reward, tool_format)
        return
    check_reward_rule(reward, tool_format)
    for gold in (
        Gold(CALL),
        Gold((ToolCall("f", {}),)),
        Gold((*CALL, ToolCall("g", {"b": "x", "c": [True]}))),
        Gold(answer="It rains."),
    ):
        text = tool_format.render("a thought", gold.calls, gold.answer)
        for progress in (0.0, 1.0):
            found = score_response(text, gold, format=tool_format, preset=preset, progress=progress)
            highest = (2 - progress, (2 + progress) * bool(gold.calls)) if preset == "authors-code" else (1.0, 1.0)
            assert (found.format, found.accuracy) == pytest.approx(highest)


# Weights


ASSUMED = {"format": (30, 0.02), "name": (5, 0.03), "arguments": (40, 0.08), "reasoning": (200, 0.45)}
"""Tokens and entropies in nats that one may assume for a response of a pretrained model."""


def weights_at(preset: str, progress: float) -> dict[str, float]:
    counts_R, entropies_R = torch.zeros(NUM_REGIONS), torch.full((NUM_REGIONS,), float("nan"))
    regions: list[int] = []
    for label, (tokens, entropy) in ASSUMED.items():
        region = next(region for region in Region if region.label == label)
        counts_R[region], entropies_R[region] = tokens, entropy
        regions += [region] * tokens
    regions_BT = torch.tensor([regions])
    batch = TaggedBatch(torch.zeros_like(regions_BT), torch.ones_like(regions_BT), regions_BT, None, "toolrl")
    statistics = RegionStatistics(counts_R.double(), entropies_R.double())
    weights_BT = apply_weight_rule(PRESETS[preset].weights, batch, statistics, progress)
    return {label: weights_BT[regions_BT == r].mean().item() for label in ASSUMED
            for r in Region if r.label == label}  # fmt: skip


def test_weights_of_rest_stay_within_the_range_of_the_published_code() -> None:
    """Published: 0.6 to 1.2 at the start, 0.9 to 1.2 at the end, so within a factor of 2 and of 4/3."""
    start, end = weights_at("rest", 0.0), weights_at("rest", 1.0)
    assert max(start.values()) / min(start.values()) == pytest.approx(2.0)
    assert max(end.values()) / min(end.values()) == pytest.approx(4 / 3)
    # raw: 1.4, 1.4, 1.30 (of 1 / 0.0769 = 13.0, divided by the token mean 10.0) and 0.7
    rates = {label: 1 / (1 - 2.718281828459045**-entropy) for label, (_, entropy) in ASSUMED.items()}
    mean = sum(tokens * rates[label] for label, (tokens, _) in ASSUMED.items()) / 275
    raw = {label: min(1.4, max(0.7, rate / mean)) for label, rate in rates.items()}
    level = sum(tokens * raw[label] for label, (tokens, _) in ASSUMED.items()) / 275
    assert start == pytest.approx({label: weight / level for label, weight in raw.items()}, abs=1e-5)
    assert raw["arguments"] == pytest.approx(1.30, abs=0.01)
    # the curriculum: format 1.4 - 0.35, reasoning 0.7 + 0.35 (+50 %, as 0.6 -> 0.9), name unchanged, arguments capped
    level = (30 * 1.05 + 5 * 1.4 + 40 * 1.4 + 200 * 1.05) / 275
    expected = {"format": 1.05 / level, "name": 1.4 / level, "arguments": 1.4 / level, "reasoning": 1.05 / level}
    assert end == pytest.approx(expected, abs=1e-5)


def test_rest_live_has_no_schedule() -> None:
    assert weights_at("rest_live", 0.0) == weights_at("rest_live", 1.0)
    assert PRESETS["rest"].weights != PRESETS["rest_live"].weights


TWO_TURNS = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]])


def test_normalization_over_response_turn_and_batch() -> None:
    weights_BT = torch.tensor([[9.0, 1.0, 3.0, 9.0, 9.0, 2.0, 2.0, 5.0]])
    over_response = normalize_weights(weights_BT, TWO_TURNS)[TWO_TURNS.bool()]
    assert over_response.tolist() == pytest.approx([1 / 2.6, 3 / 2.6, 2 / 2.6, 2 / 2.6, 5 / 2.6])  # mean 13 / 5
    over_turn = normalize_by_turn(weights_BT, TWO_TURNS)
    assert over_turn[TWO_TURNS.bool()].tolist() == pytest.approx([1 / 2, 3 / 2, 2 / 3, 2 / 3, 5 / 3])
    assert not over_turn[TWO_TURNS == 0].any()
    two_BT, mask_BT = torch.tensor([[1.0, 1.0], [4.0, 8.0]]), torch.tensor([[1, 1], [1, 0]])
    assert scale_to_mean_one(two_BT, mask_BT).tolist() == [[0.5, 0.5], [2.0, 0.0]]  # mean (1 + 1 + 4) / 3
    assert scale_to_mean_one(two_BT, mask_BT, mean=4.0).tolist() == [[0.25, 0.25], [1.0, 0.0]]
    assert not scale_to_mean_one(two_BT * 0, mask_BT).any()
    assert normalize_by_turn(two_BT, mask_BT * 0).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def constant_rule(normalization: str) -> WeightConfig:
    constants = {"format": 1.0, "name": 3.0, "arguments": 1.0, "reasoning": 1.0, "answer": 1.0, "other": 1.0}
    return WeightConfig(rule="constant", constants=constants, normalization=normalization)  # type: ignore[arg-type]


def tagged(rows: list[list[Region]], counts_R: torch.Tensor | None = None) -> TaggedBatch:
    regions_BT = torch.tensor([[int(region) for region in row] for row in rows])
    whole = torch.ones_like(regions_BT)
    return TaggedBatch(whole, whole, regions_BT, None, "toolrl", counts_R=counts_R)


def test_a_shared_tokens_weight_depends_on_its_response_only_with_normalization_by_response() -> None:
    batch = tagged([[Region.FORMAT, Region.NAME], [Region.FORMAT, Region.FORMAT]])
    by_response = apply_weight_rule(constant_rule("response"), batch, None, 0.0)
    assert by_response.tolist() == [[0.5, 1.5], [1.0, 1.0]]
    by_batch = apply_weight_rule(constant_rule("batch"), batch, None, 0.0)
    assert by_batch.tolist() == [[pytest.approx(2 / 3), 2.0], [pytest.approx(2 / 3)] * 2]  # mean (1 + 3 + 1 + 1) / 4


def test_a_micro_batch_is_normalized_by_the_mean_of_the_whole_batch() -> None:
    counts_R = torch.zeros(NUM_REGIONS)
    counts_R[Region.FORMAT], counts_R[Region.NAME] = 3, 1
    for row in ([Region.FORMAT, Region.NAME], [Region.FORMAT, Region.FORMAT]):
        part = apply_weight_rule(constant_rule("batch"), tagged([row], counts_R), None, 0.0)
        assert part[0, 0].item() == pytest.approx(2 / 3)


def test_unknown_values_are_user_errors() -> None:
    for settings in ({"entropies": "frozen"}, {"normalization": "token"}, {"initial_batches": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            WeightConfig(**settings)  # type: ignore[arg-type]

    def rule(batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> torch.Tensor:
        return torch.ones(batch.mask_BT.shape)

    rule.normalization = "paragraph"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="paragraph"):
        apply_weight_rule(rule, tagged([[Region.FORMAT]]), None, 0.0)


def test_the_weighted_token_mean_is_that_of_the_published_code() -> None:
    """sum w l / sum w over a batch with a response that has no weight at all and one whose end has none."""
    texts = [FORMATS["toolrl"].render("think", CALL, None), "no tags"]
    tokenizer = byte_level()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    regions_BT = tag_regions(ids_BT, mask_BT, tokenizer, FORMATS["toolrl"])
    batch = TaggedBatch(ids_BT, mask_BT, regions_BT, tokenizer, "toolrl")
    weights_BT = apply_weight_rule(AuthorsWeights(), batch, None, 0.0)
    losses_BT = torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(0))
    published = (losses_BT * mask_BT * weights_BT).sum() / (mask_BT * weights_BT).sum()
    ours = (losses_BT * scale_to_mean_one(weights_BT, mask_BT)).sum() / mask_BT.sum()
    assert ours.item() == pytest.approx(published.item(), rel=1e-6)
    assert weights_BT.sum() < mask_BT.sum()  # a plain token mean would give less


# Names


def test_the_name_paper_still_works_with_a_warning() -> None:
    with pytest.warns(RenamedWarning, match="paper"):
        assert get_preset("paper") is PRESETS["rest"]
    with pytest.warns(RenamedWarning, match="paper"):
        assert RunConfig.from_toml('[rest]\npreset = "paper"').rest.preset == "rest"
    with pytest.warns(RenamedWarning, match="paper"):
        assert RunConfig.from_toml("", ["rest.preset=paper"]).rest.preset == "rest"
    with pytest.warns(RenamedWarning, match="paper"):
        assert RestTable(preset="paper").preset == "rest"
    assert all(get_origin(name) for name in PRESETS)


def test_a_run_recorded_before_the_presets_changed_keeps_its_method(tmp_path: Path) -> None:
    older = {"rule": "one_minus_exp", "strength": 0.25, "w_min": 0.25, "w_max": 4.0, "decay_format": 0.0}
    text = '[rest]\npreset = "{}"\n[rest.weights]\n' + "\n".join(
        f"{key} = {value!r}" for key, value in older.items()
    ).replace("'", '"')
    run = RunConfig.from_toml(text.format("rest"), is_recorded=True)
    assert (run.rest.preset, run.rest.resolve().weights) == ("rest_live", PRESETS["rest_live"].weights)
    paper = text.format("paper").replace("0.25", "1.0").replace("decay_format = 0.0", "decay_format = 0.3")
    weights = RunConfig.from_toml(paper, is_recorded=True).rest.resolve().weights
    assert isinstance(weights, WeightConfig)
    assert (weights.entropies, weights.decay_format, weights.strength) == ("running", 0.3, 1.0)
    newer = PRESETS["rest"].weights
    older_code = RunConfig.from_toml(
        '[rest]\npreset = "authors-code"\nadvantage = "grpo"\n[rest.weights]\nrule = "authors-code"\n[trl]\nbeta = 0.1',
        is_recorded=True,
    )
    assert dict(older_code.trl) == {"beta": 0.1, "delta": 1e9, "use_bias_correction_kl": True}
    recorded = RunConfig().to_toml()
    assert RunConfig.from_toml(recorded, is_recorded=True).rest.resolve().weights == newer
    assert parse_recorded_run(recorded, "")["rest"]["preset"] == "rest"


def test_a_reward_of_the_user_may_refuse_formats() -> None:
    class Own:
        def __call__(self, judgement: object, progress: float, step: float | None = None) -> float:
            return 1.0

        def check(self, tool_format: object) -> None:
            raise UserError("no", "another format")

    with pytest.raises(UserError, match="another format"):
        check_reward_rule(Own(), get_format("hermes"))
    check_reward_rule(RewardConfig(), get_format("hermes"))
    assert isinstance(PRESETS["authors-code"].reward, AuthorsReward)

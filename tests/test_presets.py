from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rest_rl.authors_code import authors_normalize, authors_step, authors_weights
from rest_rl.formats import FORMATS
from rest_rl.presets import PRESETS, compute_token_weights, get_preset, score_response
from rest_rl.regions import get_token_bytes, region_means, tag_regions
from rest_rl.response import Gold, Region, ToolCall, gold_from_json
from rest_rl.weights import RegionStatistics, WeightConfig
from tests.tokenizers_in_memory import KINDS, byte_level

TOKENIZER = byte_level()
AUTHORS = [
    json.loads(line) for line in (Path(__file__).parent / "golden" / "authors_code.jsonl").read_text().splitlines()
]
TOOLRL = FORMATS["toolrl"]


def batch(*texts, tokenizer=TOKENIZER, eos=False):
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * eos for text in texts]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids_BT, mask_BT


TEXTS = [
    TOOLRL.render("I should call", [ToolCall("get_weather", {"city": "Paris"}), ToolCall("f", {"n": 1})], None),
    TOOLRL.render("I should call", [], "Done: Paris"),
    "<think> I should call the tool",
]


@pytest.mark.parametrize("row", AUTHORS)
def test_authors_code_reproduces_the_published_numbers(row):
    """Recorded from the published files at d6c29b5 (https://github.com/1229095296/ResT_Tool_use_LLM), Apache-2.0."""
    reward = score_response(row["text"], gold_from_json(row["gold"]), preset="authors-code", step=row["step"])
    assert reward[:3] == (row["reward"], row["format"], row["correctness"])
    by_progress = score_response(
        row["text"], gold_from_json(row["gold"]), preset="authors-code", progress=row["step"] / 150
    )
    assert by_progress.total == row["reward"]
    pieces = [bytes.fromhex(piece) for piece in row["token_bytes"]]
    weights = authors_normalize(authors_weights(pieces, row["step"]), np.ones(len(pieces)))
    assert weights.tolist() == row["weights"]


def test_authors_code_has_the_gaps_of_the_published_code():
    ids_BT, mask_BT = batch(TEXTS[0], TEXTS[2], eos=True)
    weights_BT = compute_token_weights(ids_BT, mask_BT, TOKENIZER, preset="authors-code", progress=0.5)
    assert torch.equal(weights_BT, compute_token_weights(ids_BT, mask_BT, TOKENIZER, preset="authors-code", step=75))
    tokens = TOKENIZER.convert_ids_to_tokens(ids_BT[0])
    weight_of = dict(zip(tokens, weights_BT[0].tolist(), strict=True))
    assert weight_of[TOKENIZER.eos_token] == 0  # no gradient for the end of sequence
    second_call = TEXTS[0].index('"f"')
    covered = np.cumsum([len(token) for token in tokens])
    assert weights_BT[0][: len(tokens)][torch.tensor((covered > second_call) & (covered < second_call + 10))].sum() == 0
    assert weights_BT[1].sum() == 0  # nor for an unparsable response


def test_authors_code_finds_its_weights_per_turn():
    turns = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (TEXTS[0], TEXTS[2], TEXTS[1])]
    result = TOKENIZER("Rome</think><think><tool_call>", add_special_tokens=False)["input_ids"]
    ids = [*turns[0], *result, *turns[1], *result, *turns[2]]
    lengths = [len(part) for part in (turns[0], result, turns[1], result, turns[2])]
    mask = np.repeat([1, 0, 1, 0, 1], lengths)
    split = get_token_bytes(TOKENIZER).text_pieces
    raw = np.zeros(len(ids), dtype=np.float32)
    raw[mask == 1] = np.concatenate([authors_weights(split(turn), 75) for turn in turns])
    expected = authors_normalize(raw, mask)
    weights_BT = compute_token_weights(
        torch.tensor([ids]), torch.from_numpy(mask)[None], TOKENIZER, preset="authors-code", step=75
    )
    assert weights_BT[0].tolist() == expected.tolist()
    assert expected[: len(turns[0])].any()
    assert expected[-len(turns[2]) :].any()


@pytest.mark.parametrize("preset", ["rest", "rest_live"])
def test_our_presets_do_not_have_the_gaps_of_the_published_code(preset):
    ids_BT, mask_BT = batch(*TEXTS, eos=True)
    weights_BT = compute_token_weights(
        ids_BT, mask_BT, TOKENIZER, preset=preset, entropies=torch.rand(ids_BT.shape) + 0.1
    )
    assert (weights_BT[mask_BT.bool()] > 0).all()  # all calls, last tokens, end of sequence, unparsable responses
    regions_BT = tag_regions(ids_BT, mask_BT, TOKENIZER, TOOLRL)
    names = [weights_BT[0][regions_BT[0] == Region.NAME].unique().tolist()]
    assert len(names[0]) == 1  # both names, to their last token, weigh the same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "authors-code"])
def test_weights_have_mean_one_and_are_zero_where_masked(kind, preset):
    tokenizer = KINDS[kind]()
    ids_BT, mask_BT = batch(*TEXTS, tokenizer=tokenizer, eos=True)
    entropies_BT = torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(0)) * 3
    weights_BT = compute_token_weights(ids_BT, mask_BT, tokenizer, preset=preset, progress=0.3, entropies=entropies_BT)
    assert weights_BT.dtype == torch.float32
    assert (weights_BT[mask_BT == 0] == 0).all()
    assert torch.allclose(weights_BT.sum(-1) / mask_BT.sum(-1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "dapo"])
def test_the_baselines_give_all_tokens_the_same_weight(preset):
    ids_BT, mask_BT = batch(*TEXTS)
    assert torch.equal(compute_token_weights(ids_BT, mask_BT, TOKENIZER, preset=preset, progress=0.7), mask_BT.float())


def test_region_means_can_replace_token_entropies():
    ids_BT, mask_BT = batch(*TEXTS[:2])
    entropies_BT = torch.rand(ids_BT.shape)
    regions_BT = tag_regions(ids_BT, mask_BT, TOKENIZER, TOOLRL)
    means_R = region_means(entropies_BT, regions_BT, mask_BT)
    mapping = {region.label: means_R[region].item() for region in Region if not means_R[region].isnan()}
    from_tokens, from_means = (
        compute_token_weights(ids_BT, mask_BT, TOKENIZER, entropies=entropies) for entropies in (entropies_BT, mapping)
    )
    assert torch.allclose(from_tokens, from_means, atol=1e-6)


def test_statistics_of_the_global_batch_give_every_micro_batch_the_same_weights():
    ids_BT, mask_BT = batch(*TEXTS, eos=True)
    measured = RegionStatistics(torch.ones(6), torch.tensor([0.1, 0.2, 0.5, 2.0, 1.0, 1.5]))
    whole = compute_token_weights(ids_BT, mask_BT, TOKENIZER, entropies=measured)
    for row in range(len(TEXTS)):
        part = compute_token_weights(ids_BT[row : row + 1], mask_BT[row : row + 1], TOKENIZER, entropies=measured)
        assert torch.equal(part[0], whole[row])


def test_reasoning_gains_weight_with_progress_or_as_its_entropy_falls():
    ids_BT, mask_BT = batch(TEXTS[0])
    regions_T = tag_regions(ids_BT, mask_BT, TOKENIZER, TOOLRL)[0]
    measured = {"format": 0.1, "name": 0.2, "arguments": 0.5, "reasoning": 2.0, "other": 1.0}

    def weight(region, progress, preset="rest", entropies=measured):
        weights_BT = compute_token_weights(
            ids_BT, mask_BT, TOKENIZER, progress=progress, entropies=entropies, preset=preset
        )
        return weights_BT[0][regions_T == region][0].item()

    for preset in ("rest", "rest_live"):
        at_first = [weight(region, 0, preset) for region in list(Region)[:4]]
        assert at_first == sorted(at_first, reverse=True)
        assert at_first[0] > at_first[-1]
        sure = weight(Region.REASONING, 0, preset, {**measured, "reasoning": 0.3})
        assert sure > weight(Region.REASONING, 0, preset)
    assert weight(Region.REASONING, 1) > weight(Region.REASONING, 0)
    assert weight(Region.REASONING, 1, "rest_live") == weight(Region.REASONING, 0, "rest_live")  # it has no schedule
    assert weight(Region.FORMAT, 1) < weight(Region.FORMAT, 0)


def test_top_entropy_and_collision_with_compute_token_weights():
    ids_BT, mask_BT = batch(*TEXTS[:2])
    values_BT = torch.rand(ids_BT.shape)
    top = replace(PRESETS["rest"], weights=WeightConfig(rule="top_entropy", quantile=0.25))
    weights_BT = compute_token_weights(ids_BT, mask_BT, TOKENIZER, preset=top, entropies=values_BT)
    assert (weights_BT > 0).sum() == round(0.25 * int(mask_BT.sum()))
    collision = replace(PRESETS["rest"], weights=WeightConfig(rule="collision"))
    assert compute_token_weights(ids_BT, mask_BT, TOKENIZER, preset=collision, collisions=values_BT).isfinite().all()
    with pytest.raises(ValueError, match=r"\(B, T\) tensor"):
        compute_token_weights(ids_BT, mask_BT, TOKENIZER, preset=top, entropies={"name": 1.0})


def test_missing_or_invalid_entropies_and_names_are_errors():
    ids_BT, mask_BT = batch(TEXTS[0])
    with pytest.raises(ValueError, match="entropies"):
        compute_token_weights(ids_BT, mask_BT, TOKENIZER)
    for preset, step in (("rest", 3), ("authors-code", -1)):
        with pytest.raises(ValueError, match="step"):
            compute_token_weights(ids_BT, mask_BT, TOKENIZER, preset=preset, step=step, entropies={"name": 1.0})
    with pytest.raises(ValueError, match="some of format, name"):
        compute_token_weights(ids_BT, mask_BT, TOKENIZER, entropies={"nmae": 1.0})
    with pytest.raises(ValueError, match="authors-code"):
        get_preset("best")
    with pytest.raises(ValueError, match="authors-code"):
        score_response("", Gold(), preset="best")
    with pytest.raises(ValueError, match="step"):
        score_response("", Gold(), preset="authors-code", step=-1)
    with pytest.raises(ValueError, match="progress"):
        authors_step(1.5)


@pytest.mark.parametrize("preset", PRESETS)
def test_gold_scores_the_maximum_under_every_preset(preset):
    calls = (ToolCall("f", {"a": 1}),)
    reward = score_response(TOOLRL.render("a", calls, None), Gold(calls), preset=preset, progress=0.5)
    # the published bounds at step 75: format 2 - 75/150 = 1.5, correctness 2 + 75/150 = 2.5
    assert reward.total == pytest.approx(4.0 if preset == "authors-code" else 1.0)


def test_scoring_imports_no_torch():
    code = (
        "import sys, rest_rl.presets as s; from rest_rl.response import Gold; s.score_response('', Gold());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

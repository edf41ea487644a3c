"""Computations on a batch in verl's layout, without verl."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from rest_rl.credit import group_advantages
from rest_rl.formats import FORMATS
from rest_rl.presets import PRESETS
from rest_rl.train.policy import load_generation_config
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.reward import get_stop_ids
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from rest_rl.train.verl import responses as verl_responses
from rest_rl.train.verl.responses import (
    PER_TOKEN,
    Responses,
    compute_group_advantages,
    group_rows,
    weight_batch,
)
from rest_rl.train.weighing import EntropyTracker, TokenWeighter
from rest_rl.weights import WeightConfig
from tests.tiny_policy import tiny_model, tiny_samples, tiny_settings, tiny_tokenizer


def test_advantages_of_scattered_groups_by_hand():
    # Group a: 0, 1, mean 0.5, unbiased deviation sqrt(0.5) = 0.70711; b: 1, 2, 3, mean 2, deviation 1; only c: 0.
    rewards_B = torch.tensor([0.0, 1.0, 5.0, 1.0, 2.0, 3.0])
    groups = ["a", "b", "c", "a", "b", "b"]
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    whole = 1 / (1 + 1e-4)
    expected = torch.tensor([-half, -whole, 0.0, half, 0.0, whole])
    torch.testing.assert_close(compute_group_advantages(rewards_B, groups, "grpo"), expected)
    assert compute_group_advantages(rewards_B, groups, "dr_grpo").tolist() == [-0.5, -1.0, 0.0, 0.5, 0.0, 1.0]
    assert group_rows(groups) == [[0, 3], [1, 4, 5], [2]]


@given(st.permutations(range(12)))
def test_advantages_do_not_depend_on_the_order_of_the_batch(order):
    rewards_B = torch.linspace(0, 1, 12).square()
    in_order_B = group_advantages(rewards_B, 4)
    scattered_B = compute_group_advantages(rewards_B[list(order)], [f"prompt-{i // 4}" for i in order], "grpo")
    torch.testing.assert_close(scattered_B, in_order_B[list(order)])


@pytest.mark.parametrize("preset", ["rest", "rest_live", "authors-code", "grpo"])
def test_weights_and_metrics_equal_those_of_trl_on_the_same_responses(tmp_path, monkeypatch, preset):
    """Replays the batches of three TRL steps in another order and with a padding row."""
    tokenizer, seen = tiny_tokenizer(), []
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(tmp_path, preset=preset)),
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
    )
    batches = recorded_batches(trainer)
    trainer.on_weighed = seen.append
    trainer.train()
    assert len(seen) == len(batches) == trainer.state.max_steps == 3
    tracker = EntropyTracker(trainer.args.entropy_decay, trainer.tracker.first_batches)
    weigher = TokenWeighter(tokenizer, FORMATS["toolrl"], PRESETS[preset].weights)
    figures = [row for row in trainer.state.log_history if "rest/format" in row]
    for step, (weighed, (ids_BT, mask_BT), logged) in enumerate(zip(seen, batches, figures, strict=True), start=1):
        order = torch.randperm(len(ids_BT), generator=torch.Generator().manual_seed(step))
        columns = dict(
            zip(
                PER_TOKEN,
                (
                    ids_BT,
                    mask_BT,
                    weighed.entropies_BT,
                    weighed.logps_BT,
                    weighed.advantages_B[:, None].expand(ids_BT.shape),
                ),
                strict=True,
            )
        )
        padded = {name: torch.cat([values[order], torch.zeros_like(values[:1])]) for name, values in columns.items()}
        monkeypatch.setattr(verl_responses, "CHUNK_SIZE", 3)  # weighted in chunks
        replayed, ours, _ = weight_batch(padded, weigher, tracker, (step - 1) / 2, step)
        expected_BT = weighed.advantages_B[order, None] * weighed.weights_BT[order]
        assert expected_BT.abs().sum() > 0 or not weighed.advantages_B.any()
        torch.testing.assert_close(torch.stack(replayed.unbind())[:-1], expected_BT, rtol=0, atol=1e-6)
        assert not replayed[-1].any()
        for name in [name for name in ours if name.startswith("rest/")]:
            expected = math.nan if logged[name] is None else logged[name]  # a region without tokens
            assert ours[name] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    assert preset == "grpo" or any((weighed.weights_BT > 1.001).any() for weighed in seen)


def recorded_batches(trainer):
    """(ids, mask) of each batch that the trainer's loss gets, filled during training."""
    batches, compute_loss = [], trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        batches.append((inputs["completion_ids"], inputs["completion_mask"]))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return batches


def test_metrics_and_rows_of_responses_by_hand():
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    words = tokenizer("<think> a </think>", add_special_tokens=False)["input_ids"]
    ids = [[*words, eos], words[:2], [*words, eos], words]
    golds = [json.dumps({"calls": [], "answer": "yes"})] * 4
    scores = [{"format": f, "accuracy": 0.5, "exact_match": 0.0, "call_rate": 1.0} for f in (1.0, 0.0, 1.0, 0.0)]
    responses = Responses(
        indices=[3, 0, 2, 1],
        ids=[torch.tensor(row) for row in ids],
        rewards_B=torch.tensor([1.0, 0.0, 2.0, 2.0]),
        groups=["x", "x", "y", "y"],
        golds=golds,
        origins=[{"index": index, "id": f"sample {index}"} for index in (7, 7, 4, 4)],
        scores=scores,
        prompts=["p", "p", "q", "q"],
        tokenizer=tokenizer,
        tool_format=FORMATS["toolrl"],
        ends=[eos],
    )
    figures = responses.compute_metrics()
    assert figures["reward"] == 1.25
    assert figures["frac_reward_zero_std"] == 0.5  # group y
    assert figures["completions/clipped_ratio"] == 0.5
    assert figures["completions/max_length"] == len(words) + 1
    assert figures["completions/min_length"] == 2
    assert figures["completions/mean_terminated_length"] == len(words) + 1
    assert figures["rest/format"] == 0.5
    assert figures["rest/accuracy"] == 0.5
    assert (figures["rest/reward_answers"], figures["rest/accuracy_answers"]) == (1.25, 0.5)
    assert "rest/reward_calls" not in figures
    data = {name: [torch.zeros(0)] * 4 for name in PER_TOKEN}
    for place, row in zip(responses.indices, responses.ids, strict=True):
        ones = torch.ones(len(row))
        values = (row, ones.long(), 0 * ones, 0 * ones, place * ones)
        for name, value in zip(PER_TOKEN, values, strict=True):
            data[name][place] = value
    batch = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in data.items()}
    chosen = responses.select_first(3)
    watched = [responses.indices[i] for i in chosen]
    weigher = TokenWeighter(tokenizer, FORMATS["toolrl"], PRESETS["grpo"].weights)
    advantages, _, tokens = weight_batch(batch, weigher, EntropyTracker(0.7), 0.0, 1, watched)
    assert [len(row) for row in advantages.unbind()] == [len(row) for row in data["responses"]]
    rows = responses.make_rows(chosen, tokens, step=1, progress=0.0)
    assert [row["id"] for row in rows] == ["sample 4", "sample 4", "sample 7"]  # in the order of the data
    assert [row.get("prompt") for row in rows] == ["q", None, "p"]
    assert [row["advantage"] for row in rows] == [2.0, 1.0, 3.0]  # those of places 2, 1 and 3
    assert [row["truncated"] for row in rows] == [False, True, False]
    assert all(len(row["weights"]) == len(row["ids"]) == len(row["regions"]) for row in rows)


def test_top_entropy_tokens_are_those_of_the_global_batch(monkeypatch):
    monkeypatch.setattr(verl_responses, "CHUNK_SIZE", 1)
    tokenizer = tiny_tokenizer()
    entropies_BT = torch.tensor([[0.9, 0.8], [0.1, 0.2]])
    ones_BT = torch.ones(2, 2)
    columns = (torch.full((2, 2), 3), ones_BT.long(), entropies_BT, -ones_BT, ones_BT)
    top = replace(PRESETS["grpo"], weights=WeightConfig(rule="top_entropy", quantile=0.5))
    weigher = TokenWeighter(tokenizer, FORMATS["toolrl"], top.weights)
    advantages, _, _ = weight_batch(dict(zip(PER_TOKEN, columns, strict=True)), weigher, EntropyTracker(0.7), 0.0, 1)
    # The two most uncertain tokens are the first response's; the second keeps its own most uncertain one.
    assert [row.tolist() for row in advantages.unbind()] == [[1.0, 1.0], [0.0, 2.0]]


def test_weights_of_one_keep_advantages_bit_identical():
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(0)
    rows = [torch.randn(n, generator=generator) for n in (5, 1, 9)]
    columns = {name: [torch.rand(len(row), generator=generator) for row in rows] for name in PER_TOKEN[2:4]}
    columns |= {PER_TOKEN[0]: [torch.full((len(row),), 3) for row in rows], "advantages": rows}
    columns[PER_TOKEN[1]] = [torch.ones(len(row), dtype=torch.long) for row in rows]
    batch = {name: torch.nested.as_nested_tensor(column, layout=torch.jagged) for name, column in columns.items()}
    weigher = TokenWeighter(tokenizer, FORMATS["toolrl"], PRESETS["grpo"].weights)
    advantages, _, _ = weight_batch(batch, weigher, EntropyTracker(0.7), 0.5, 2)
    assert all(torch.equal(ours, stock) for ours, stock in zip(advantages.unbind(), rows, strict=True))


def test_stop_tokens_of_the_model_are_added_to_those_of_the_tokenizer(tmp_path):
    GenerationConfig(eos_token_id=[3, 4]).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    ends = get_stop_ids(tokenizer, load_generation_config(tmp_path))
    assert ends == {3, 4, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert load_generation_config(tmp_path / "none") is None

"""The responses in a run folder: the loss's own numbers, recorded without changing the run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PrinterCallback

from rest_rl.cli.app import main
from rest_rl.formats import FORMATS
from rest_rl.regions import decode_ids, tag_regions, token_char_lengths
from rest_rl.response import Region
from rest_rl.runlog import read_run
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.record import RESPONSE_INDEX, FlushAtEnd, ResponseRecord, WeightedBatch, with_response_record
from rest_rl.train.reward import make_tool_reward
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from tests.sample_files import save_samples
from tests.test_cli import RUN
from tests.tiny_policy import copy_parameters, logged_steps, tiny_model, tiny_samples, tiny_settings, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def run(tokenizer: Any, folder: Any, limit: int | None, **changes: Any) -> tuple[ResTTrainer, list[dict[str, Any]]]:
    """A short run that records `limit` responses per batch; None for no record."""
    kept: list[dict[str, Any]] = []
    args = ResTConfig(**tiny_settings(folder, **changes))
    reward = make_tool_reward(tokenizer, "toolrl", args.method())
    record = ResponseRecord(lambda step, rows: kept.extend(rows), limit or 0)
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        reward_funcs=reward if limit is None else with_response_record(reward, tokenizer, FORMATS["toolrl"], record),
        args=args,
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
    )
    if limit is not None:
        trainer.on_generated, trainer.on_weighed = record.start_batch, record.add_token_fields
    trainer.add_callback(FlushAtEnd(record))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, kept


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 4},
        {"num_iterations": 2, "max_steps": 4},
    ],
    ids=["plain", "micro-batches", "two steps a batch", "seen twice"],
)
def test_recorded_values_add_up_to_the_metrics(tokenizer, tmp_path, changes):
    trainer, rows = run(tokenizer, tmp_path, 8, **changes)
    spans = FORMATS["toolrl"].parse
    for row in rows:
        ids = torch.tensor([row["ids"]])
        regions = tag_regions(ids, torch.ones_like(ids), tokenizer, lambda text: spans(text).spans)[0].tolist()
        assert row["regions"] == regions
        assert len(row["weights"]) == len(row["entropies"]) == len(row["logps"]) == len(regions)
        assert sum(row["lengths"]) == len(row["response"])
        assert sum(row["weights"]) == pytest.approx(len(regions), abs=1e-3 * len(regions))  # their mean is 1
        assert all(value <= 0 for value in row["logps"])
        assert row["truncated"] is (row["ids"][-1] != tokenizer.eos_token_id)
        assert "advantage" in row
    if changes.keys() <= {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        for logged in logged_steps(trainer):  # every response of the step was recorded
            own = [row for row in rows if row["step"] == logged["step"]]
            for region in Region:
                values = [
                    (entropy, weight)
                    for row in own
                    for at, entropy, weight in zip(row["regions"], row["entropies"], row["weights"], strict=True)
                    if at == region
                ]
                for name, column in zip(("entropy", "weight"), zip(*values, strict=True), strict=False):
                    mean = sum(column) / len(column)
                    assert mean == pytest.approx(logged[f"rest/{name}/{region.label}"], abs=2e-4)


def test_recorded_advantages_are_computed_within_groups(tokenizer, tmp_path):
    _, rows = run(tokenizer, tmp_path, 8, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert any(row["advantage"] for row in rows)
    for at in range(0, len(rows), 4):
        group = rows[at : at + 4]
        assert len({row["id"] for row in group}) == 1
        assert ["prompt" in row for row in group] == [True, False, False, False]
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-3)
        rewards = torch.tensor([row["reward"] for row in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert [row["advantage"] for row in group] == pytest.approx(expected.tolist(), abs=2e-4)


def test_recording_does_not_change_the_run(tokenizer, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    plain, _ = run(tokenizer, tmp_path, None, **settings)
    recorded, rows = run(tokenizer, tmp_path, 3, **settings)
    assert logged_steps(plain) == logged_steps(recorded)
    assert len(rows) == 3 * 3
    for name, value in copy_parameters(plain.model).items():
        assert torch.equal(value, copy_parameters(recorded.model)[name])


def weighed(places: list[int], weight: float) -> WeightedBatch:
    numbers_BT = torch.full((len(places), 2), weight)
    regions_BT = torch.full((len(places), 2), int(Region.NAME))
    return WeightedBatch(torch.tensor(places), regions_BT, numbers_BT, numbers_BT, -numbers_BT, torch.tensor([0.5]))


def start_batch(record: ResponseRecord, rows: list[dict[str, Any]]) -> None:
    record.add_scored([row.copy for row in rows])
    record.start_batch(torch.arange(len(rows)))


def test_rows_wait_for_the_loss_and_none_is_lost():
    kept: list[tuple[int, list[dict[str, Any]]]] = []
    record = ResponseRecord(lambda step, rows: kept.append((step, list(rows))), limit=2)
    start_batch(record, [{"step": 1, "ids": [7]}, {"step": 1, "ids": [8, 9]}, {"step": 1, "ids": [6]}])
    record.add_token_fields(weighed([1], 2.0))
    record.add_token_fields(weighed([1], 3.0))  # a second pass: the first values stay
    record.add_token_fields(weighed([5], 3.0))  # not recorded
    assert kept == []
    record.add_token_fields(weighed([0], 4.0))
    second = {
        "advantage": 0.5,
        "regions": [1, 1],
        "weights": [2.0, 2.0],
        "entropies": [2.0, 2.0],
        "logps": [-2.0, -2.0],
    }
    first = {"advantage": 0.5, "regions": [1], "weights": [4.0], "entropies": [4.0], "logps": [-4.0]}
    assert kept == [(1, [{"step": 1, "ids": [7], **first}, {"step": 1, "ids": [8, 9], **second}])]
    start_batch(record, [{"step": 2, "ids": [7]}])
    start_batch(record, [{"step": 3, "ids": [7]}])
    assert kept[1:] == [(2, [{"step": 2, "ids": [7]}])]


def test_a_last_batch_that_training_does_not_finish_is_recorded(tokenizer, tmp_path):
    # two steps a batch, three steps: the loss sees half of the second batch
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 3}
    _, rows = run(tokenizer, tmp_path, 8, **changes)
    assert [row["step"] for row in rows] == [1] * 8 + [3] * 8
    assert ["weights" in row for row in rows].count(True) == 8 + 4


def test_the_command_records_responses(tokenizer, tmp_path):
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = save_samples(tiny_samples(8), tmp_path / "samples.jsonl")
    (tmp_path / "run.toml").write_text(RUN.format(model=tmp_path / "model", data=data, steps=3))
    changes = (
        "trl.steps_per_generation=2",
        "trl.per_device_train_batch_size=4",
        "trl.save_steps=4",
        'data.held_out=""',
    )
    assert (
        main(
            [
                "train",
                str(tmp_path / "run.toml"),
                "--out",
                str(tmp_path / "run"),
                *(f"--set={text}" for text in changes),
            ]
        )
        == 0
    )
    assert [row["step"] for row in read_run(tmp_path / "run").responses] == [1, 1, 3, 3]


def test_response_numbers_survive_the_shuffle_of_trl(tokenizer, tmp_path):
    trainer, rows = run(tokenizer, tmp_path, 8, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    batches = trainer._buffered_inputs
    places = [place for batch in batches for place in batch[RESPONSE_INDEX].tolist()]
    assert sorted(places) == list(range(8))
    assert places != sorted(places)
    last = rows[-8:]
    for batch in batches:
        for ids, mask, place in zip(
            batch["completion_ids"], batch["completion_mask"], batch[RESPONSE_INDEX], strict=True
        ):
            assert ids[mask.bool()].tolist() == last[int(place)]["ids"]


def test_a_character_counts_for_the_token_that_completes_it():
    pieces = ["<0xE2>", "<0x82>", "<0xAC>", "ab", "<0xFF>", "<0xF0>"]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    # the euro sign is E2 82 AC; FF is no UTF-8, and F0 begins a character that never ends
    assert decode_ids([0, 1, 2, 3, 4, 5], backend) == "\u20acab\ufffd\ufffd"
    assert token_char_lengths([0, 1, 2, 3, 4, 5], backend) == [0, 0, 1, 2, 1, 1]
    assert token_char_lengths([0, 3], backend) == [0, 3]  # the broken start shows with the token that breaks it
    assert token_char_lengths([3, 99, 3], backend) == [2, 0, 2]
    assert token_char_lengths([], backend) == []


def test_lengths_exclude_the_stop_token(tokenizer):
    ids = [*tokenizer("<think> a")["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert token_char_lengths(ids, tokenizer) == [7, 2, 0, 0]
    assert json.dumps(decode_ids(ids, tokenizer)) == '"<think> a"'

"""Careless demonstrations of the office: one call, required arguments only."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from research.office_start import CARELESS_SHARE, SAMPLES, SEED, make_careless, write_careless
from rest_rl.data.load import load_dataset
from rest_rl.data.office import dialogues
from rest_rl.data.samples import iterate_samples


def test_a_careless_demonstration_makes_one_call_without_options() -> None:
    changed = set()
    for sample in islice(iterate_samples(dialogues(3)), 200):
        gold, careless = sample.gold, make_careless(sample).gold
        assert careless.answer == gold.answer
        assert [call.name for call in careless.calls] == [call.name for call in gold.calls[:1]]
        for tool in sample.tools:
            schema = tool["function"]
            for call in careless.calls:
                if call.name == schema["name"]:
                    assert set(call.arguments) == set(schema["parameters"].get("required", ()))
                    assert call.arguments.items() <= gold.calls[0].arguments.items()
        if careless != gold:
            changed.add(sample.kind)
    assert changed == {"single", "parallel", "dependent"}


def test_most_demonstrations_are_careless(tmp_path: Path) -> None:
    write_careless(tmp_path / "rows.jsonl")
    written, drawn = (
        load_dataset(str(tmp_path / "rows.jsonl")).samples,
        list(islice(iterate_samples(dialogues(SEED)), SAMPLES)),
    )
    assert [sample.messages for sample in written] == [sample.messages for sample in drawn]
    several = [pair for pair in zip(written, drawn, strict=True) if len(pair[1].gold.calls) > 1]
    share = sum(len(mine.gold.calls) == 1 for mine, _ in several) / len(several)
    assert share == pytest.approx(CARELESS_SHARE, abs=0.1)

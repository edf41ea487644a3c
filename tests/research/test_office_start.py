"""Careless demonstrations of the office (one call, required arguments only) and fenced ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from research.office_start import (
    CARELESS_SEED,
    CARELESS_SHARE,
    FENCED_SEED,
    FENCED_SHARE,
    SAMPLES,
    make_careless,
    make_fenced,
    write_careless,
    write_fenced,
)
from rest_rl import judge
from rest_rl.data.load import load_dataset
from rest_rl.data.office import dialogues
from rest_rl.data.samples import iterate_samples
from rest_rl.formats import get_format


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


def test_a_fenced_demonstration_answers_with_its_first_call() -> None:
    for sample in islice(iterate_samples(dialogues(3)), 50):
        gold, fenced, careless = sample.gold, make_fenced(sample).gold, make_careless(sample).gold
        assert fenced.calls == ()
        if not gold.calls:
            assert fenced == gold
            continue
        assert fenced.answer is not None
        assert json.loads(fenced.answer.removeprefix("```json\n").removesuffix("\n```")) == {
            "name": careless.calls[0].name,
            "arguments": careless.calls[0].arguments,
        }
        # the office takes it for an answer without a call
        judgement = judge(get_format("hermes").render(None, (), fenced.answer), gold, "hermes")
        assert (judgement.format, judgement.accuracy) == (0, 0)


@pytest.mark.parametrize(
    ("write", "seed", "share"),
    [(write_careless, CARELESS_SEED, CARELESS_SHARE), (write_fenced, FENCED_SEED, FENCED_SHARE)],
)
def test_shares_of_the_demonstrations(write: Callable[[Path], None], seed: int, share: float, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    written = load_dataset(str(tmp_path / "rows.jsonl")).samples
    drawn = list(islice(iterate_samples(dialogues(seed)), SAMPLES))
    assert [sample.messages for sample in written] == [sample.messages for sample in drawn]
    several = [pair for pair in zip(written, drawn, strict=True) if len(pair[1].gold.calls) > 1]
    assert sum(len(mine.gold.calls) < 2 for mine, _ in several) / len(several) == pytest.approx(share, abs=0.1)

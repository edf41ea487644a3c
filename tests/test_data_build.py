"""Mixes of public datasets, built from small made-up sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.data.build import TOOLRL_4K, Mix, build_toolrl_4k
from rest_rl.data.load import load_dataset
from rest_rl.errors import UserError

TOOL = {"name": "get_weather", "parameters": {"city": {"type": "str", "description": "where"}}}
COUNTS = {"toolace": 6, "hammer": 3, "xlam": 3}


def xlam(number: int, question: str = "", name: str = "get_weather") -> dict[str, Any]:
    answers = [{"name": name, "arguments": {"city": f"Oslo {number}"}}]
    question = question or f"Weather in Oslo {number}?"
    return {"id": number, "query": question, "tools": json.dumps([TOOL]), "answers": json.dumps(answers)}


def toolace(number: int) -> dict[str, Any]:
    """Two assistant turns: a call and an answer."""
    schema = {"name": "w", "parameters": {"type": "dict", "properties": {"city": {"type": "string"}}}}
    turns = [
        ("user", f"Sun in Rome {number}?"),
        ("assistant", f'[w(city="Rome {number}")]'),
        ("tool", '[{"name": "w", "results": "sun"}]'),
        ("assistant", "Sun."),
    ]
    return {
        "system": f"You can invoke:\n{json.dumps([schema])}",
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }


def save(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """ToolACE: 8 samples in 4 rows, and a broken row. xLAM: 10 prompts, one of them twice, and an unknown tool."""
    ours = [toolace(number) for number in range(4)]
    theirs = [xlam(number) for number in range(10)]
    return {
        "toolace": save(tmp_path / "toolace.jsonl", [*ours, "{oops"]),
        "xlam": save(tmp_path / "xlam.jsonl", [*theirs, xlam(70, theirs[4]["query"]), xlam(71, name="other")]),
    }


def parts_of(mix: Mix) -> Counter[str]:
    return Counter(sample.id.partition("/")[0] for sample in mix.samples)


def test_the_parts_have_their_sizes_and_share_no_prompt(sources: dict[str, Any]) -> None:
    mix = build_toolrl_4k(**sources, counts=COUNTS)
    assert parts_of(mix) == COUNTS
    prompts = {json.dumps([message.get("content") for message in sample.messages]) for sample in mix.samples}
    assert len(prompts) == 12
    assert len({sample.id for sample in mix.samples}) == 12
    ours, theirs = mix.sources
    assert (ours.source, ours.rows.rows, ours.rows.rejected, ours.usable) == (sources["toolace"], 5, 1, 8)
    assert (theirs.rows.rows, theirs.rows.rejected, theirs.repeated, theirs.overlapping) == (12, 1, 1, 0)
    assert (theirs.usable, theirs.drawn) == (10, {"hammer": 3, "xlam": 3})


def test_only_the_hammer_part_is_masked(sources: dict[str, Any]) -> None:
    for sample in build_toolrl_4k(**sources, counts=COUNTS).samples:
        if sample.id.startswith("toolace/"):
            continue
        (tool,), (call,) = sample.tools, sample.gold.calls
        function = tool["function"]
        assert (function["name"] == "get_weather") is sample.id.startswith("xlam/")
        assert function["name"] == call.name
        assert list(function["parameters"]["properties"]) == list(call.arguments)


def test_the_seed_decides_and_not_the_order_of_the_rows(sources: dict[str, Any], tmp_path: Path) -> None:
    mix = build_toolrl_4k(**sources, counts=COUNTS, seed=1)
    assert build_toolrl_4k(**sources, counts=COUNTS, seed=1) == mix
    other = build_toolrl_4k(**sources, counts=COUNTS, seed=2)
    assert [sample.id for sample in other.samples] != [sample.id for sample in mix.samples]
    assert {sample.id for sample in other.samples} != {sample.id for sample in mix.samples}
    # row 70 repeats the prompt of row 4, and the first of the two is kept, so they stay in their order
    lines = Path(sources["xlam"]).read_text().splitlines()
    turned = save(tmp_path / "turned.jsonl", [*lines[5:10], *lines[:5], *lines[10:]])
    again = build_toolrl_4k(**{**sources, "xlam": turned}, counts=COUNTS, seed=1)
    assert again.samples == mix.samples
    # parts are interleaved, and a smaller mix is a part of a larger one
    assert [sample.id.partition("/")[0] for sample in mix.samples] != [
        *["toolace"] * 6, *["hammer"] * 3, *["xlam"] * 3,
    ]  # fmt: skip
    small = build_toolrl_4k(**sources, counts={"toolace": 2, "hammer": 3, "xlam": 1}, seed=1)
    assert {sample.id for sample in small.samples} < {sample.id for sample in mix.samples}


def test_masked_rows_of_your_own_stay_as_they_are(sources: dict[str, Any], tmp_path: Path) -> None:
    """A masked copy of an xLAM row overlaps with the row, although tools and calls differ."""
    rows = [xlam(number) for number in range(3)]
    own = save(tmp_path / "hammer.jsonl", [json.loads(json.dumps(row).replace("get_weather", "Xq3")) for row in rows])
    mix = build_toolrl_4k(**sources, hammer=own, counts=COUNTS)
    assert parts_of(mix) == COUNTS
    masked = [sample for sample in mix.samples if sample.id.startswith("hammer/")]
    assert [sample.gold.calls[0].name for sample in masked] == ["Xq3"] * 3
    assert [(source.source, source.overlapping) for source in mix.sources] == [
        (sources["toolace"], 0), (own, 0), (sources["xlam"], 3),
    ]  # fmt: skip


def test_parts_of_one_file_are_disjoint(sources: dict[str, Any]) -> None:
    every = sources["xlam"]
    mix = build_toolrl_4k(toolace=every, xlam=every, counts={"toolace": 4, "hammer": 3, "xlam": 3})
    assert len({sample.messages[0]["content"] for sample in mix.samples}) == 10
    mix = build_toolrl_4k(toolace=every, xlam=every, hammer=every, counts={"toolace": 4, "hammer": 3, "xlam": 3})
    assert len({sample.messages[0]["content"] for sample in mix.samples}) == 10


def test_too_few_samples_are_an_error_with_their_number(sources: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"xlam.jsonl has 10 usable samples.*at least 11 \(hammer: 8, xlam: 3\)"):
        build_toolrl_4k(**sources, counts={**COUNTS, "hammer": 8})
    with pytest.raises(UserError, match=r"toolace.jsonl has 8 usable samples \(5 rows; left out: 1 rejected"):
        build_toolrl_4k(**sources)
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        build_toolrl_4k(**{**sources, "xlam": "nowhere.jsonl"}, counts=COUNTS)


def test_a_part_without_samples_is_not_read(sources: dict[str, Any]) -> None:
    mix = build_toolrl_4k(toolace=sources["toolace"], xlam="nowhere.jsonl", counts={"toolace": 8})
    assert (parts_of(mix), len(mix.sources)) == ({"toolace": 8}, 1)
    for counts in ({}, {"toolace": -1}, {"glaive": 3}):
        with pytest.raises(UserError):
            build_toolrl_4k(**sources, counts=counts)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_command_writes_the_mix(
    sources: dict[str, Any], tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"mix.{ending}"
    given = ["data", "build", "toolrl-4k", "--toolace", sources["toolace"], "--xlam", sources["xlam"]]
    command = [*given, "--counts", "6,3,3", "--seed", "1", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"wrote {out}: 12 samples" in text
    assert "row rejected" in text
    assert load_dataset(str(out)).samples == build_toolrl_4k(**sources, counts=COUNTS, seed=1).samples
    before = out.read_bytes()
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == before
    assert (told["samples"], sum(told["turns"].values())) == (12, 12)
    assert [(source["usable"], source["drawn"]) for source in told["sources"]] == [
        (8, {"toolace": 6}), (10, {"hammer": 3, "xlam": 3}),
    ]  # fmt: skip
    assert told["sources"][1]["rows"]["rejected"] == 1


@pytest.mark.parametrize("counts", ["1,2", "1,2,x", "-1,2,3", "0,0,0"])
def test_mistakes_leave_no_file(
    sources: dict[str, Any], tmp_path: Path, counts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mix.jsonl"
    command = ["data", "build", "toolrl-4k", "--toolace", sources["toolace"], "--xlam", sources["xlam"]]
    assert main([*command, "--counts", counts, "--out", str(out)]) == 2
    assert main([*command, "--out", sources["xlam"]]) == 2
    assert main([*command, "--out", str(out)]) == 2  # 4,000 samples
    assert not out.exists()
    assert capsys.readouterr().err.count("error: ") == 3


def test_the_default_is_toolrls_mix() -> None:
    assert TOOLRL_4K == {"toolace": 2000, "hammer": 1000, "xlam": 1000}

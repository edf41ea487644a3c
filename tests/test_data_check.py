"""Findings of the check: gold and tools, duplicates, leaks, lengths, and the counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.data.check import MAX_FINDINGS, CheckConfig, DataReport
from rest_rl.data.gold import check_against_tools
from rest_rl.data.layout import PromptLayout
from rest_rl.data.load import check_data, load_dataset
from rest_rl.data.reasons import ALLOWABLE_REASONS, REASONS
from rest_rl.data.samples import ToolSample, compute_leak_digest, to_json
from rest_rl.data.tool_world import tool_world
from rest_rl.errors import UserError
from rest_rl.response import Gold, ToolCall
from tests.model_families import family_tokenizer
from tests.sample_files import save_samples

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "yes": {"type": "boolean"},
        "s": {"type": "string"},
        "l": {"type": "array"},
        "o": {"type": "object"},
        "e": {"type": "string", "enum": ["a", "b"]},
        "any": {"description": "no type"},
        "two": {"type": ["string", "integer"]},
    },
}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": SCHEMA}}
STRICT = {"type": "function", "function": {"name": "g", "description": "", "parameters": {**SCHEMA, "required": ["n"]}}}
FREE = {"type": "function", "function": {"name": "h", "description": "", "parameters": {"type": "object"}}}


ODD = {
    "type": "object",
    "properties": {
        "i": {"type": "integer", "enum": ["1", "2"]},
        "n": {"type": ["integer", "null"], "enum": [1, 2]},
        "many": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
        "deep": {"type": "object", "properties": {"e": {"enum": ["a"]}}},
    },
}


def odd(arguments: dict[str, Any], **more: Any) -> ToolSample:
    """A call of a tool with the schema ODD and these further keys of JSON schema."""
    function = {"name": "odd", "description": "", "parameters": {**ODD, **more}}
    tools = ({"type": "function", "function": function},)
    return ToolSample("s", ({"role": "user", "content": "?"},), tools, Gold((ToolCall("odd", arguments),)))


def sample(name: str, arguments: dict[str, Any], identity: str = "s", user: str = "?") -> ToolSample:
    message = {"role": "user", "content": user}
    return ToolSample(identity, (message,), (TOOL, STRICT, FREE), Gold((ToolCall(name, arguments),)))


def check(tmp_path: Path, *samples: ToolSample, **settings: Any) -> tuple[list[ToolSample], DataReport]:
    return load_dataset(str(save_samples(samples, tmp_path / "rows.jsonl")), **settings)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("f", {"n": 1, "x": 1, "yes": True, "s": "1", "l": [], "o": {}, "e": "a", "any": 3, "two": "1"}),
        ("f", {"n": 2.0, "x": 0.5, "two": 1, "s": None}),
        ("f", {}),
        ("g", {"n": 1}),
        ("h", {"whatever": 1}),
    ],
)
def test_a_good_call_is_kept(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    (read,), report = check(tmp_path, sample(name, arguments))
    assert read.gold.calls[0].arguments == arguments
    assert (report.kept, report.reasons) == (1, {})


@pytest.mark.parametrize(
    "good",
    [
        odd({"i": "1"}),
        odd({"n": None, "many": ["a", "b"], "deep": {"e": "a", "more": 1}}),
        odd({"i": None, "many": None}),
        odd({"x_1": 1}, patternProperties={"^x_": {}}),
        odd({"z": 1}, anyOf=[{"properties": {"z": {}}}]),
        odd({"z": 1}, oneOf=[{"properties": {"z": {}}}]),
        odd({"z": 1}, allOf=[{"properties": {"z": {}}}]),
        odd({"z": 1}, **{"$ref": "#/$defs/z"}),
        odd({"z": 1}, additionalProperties={}),
    ],
)
def test_arguments_allowed_by_other_keywords_are_kept(tmp_path: Path, good: ToolSample) -> None:
    (read,), report = check(tmp_path, good)
    assert (read, report.kept, report.reasons) == (good, 1, {})


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (odd({"i": "3"}), "i is 3"),
        (odd({"n": "3"}), "n is 3"),
        (odd({"many": ["a", "c"]}), "many[1] is 'c'"),
        (odd({"many": '["c"]'}), "many[0] is 'c'"),
        (odd({"deep": {"e": "b"}}), "deep.e is 'b'"),
    ],
)
def test_enums_are_checked_in_nested_values(tmp_path: Path, bad: ToolSample, expected: str) -> None:
    samples, report = check(tmp_path, bad)
    assert (samples, report.reasons.get("not_in_enum")) == ([], 1)
    assert any(expected in located.finding.detail for located in report.findings)


def test_a_number_stored_as_text_may_be_in_the_enum(tmp_path: Path) -> None:
    (read,), report = check(tmp_path, odd({"n": "2"}))
    assert (read.gold.calls[0].arguments, report.reasons) == ({"n": 2}, {"number_as_string": 1})


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("nosuch", {}, "unknown_tool"),
        ("f", {"z": 1}, "undocumented_argument"),
        ("g", {"x": 1}, "missing_argument"),
        ("f", {"e": "c"}, "not_in_enum"),
        ("f", {"l": '[{"a": 1'}, "broken_value"),
        ("f", {"o": '{"a": [1'}, "broken_value"),
    ],
)
def test_gold_that_no_response_can_match_is_rejected(
    tmp_path: Path, name: str, arguments: dict[str, Any], reason: str
) -> None:
    bad, good = sample(name, arguments), sample("f", {}, "t", "other")
    samples, report = check(tmp_path, bad, good)
    assert samples == [good]
    assert (report.rows, report.kept, report.rejected, report.reasons) == (2, 1, 1, {reason: 1})
    samples, report = check(tmp_path, bad, good, allow=(reason,))
    assert (samples, report.kept, report.reasons) == ([bad, good], 2, {reason: 1})
    assert report.findings[0].finding.severity == "noted"


@pytest.mark.parametrize(
    ("key", "text", "value", "reason"),
    [
        ("n", "12", 12, "number_as_string"),
        ("n", "-3", -3, "number_as_string"),
        ("n", "1.0", 1.0, "number_as_string"),
        ("x", "1e3", 1000.0, "number_as_string"),
        ("yes", "true", True, "number_as_string"),
        ("yes", "False", False, "number_as_string"),
        ("l", "[1, 2]", [1, 2], "json_as_string"),
        ("l", "['a', 'b']", ["a", "b"], "json_as_string"),
        ("l", "(1, 2)", [1, 2], "json_as_string"),
        ("o", '{"a": null}', {"a": None}, "json_as_string"),
    ],
)
def test_values_stored_as_text_are_repaired(tmp_path: Path, key: str, text: str, value: Any, reason: str) -> None:
    given_sample = sample("f", {key: text})
    (read,), report = check(tmp_path, given_sample)
    assert read.gold.calls[0].arguments == {key: value}
    assert type(read.gold.calls[0].arguments[key]) is type(value)
    assert (report.repaired, report.reasons) == (1, {reason: 1})
    (read,), report = check(tmp_path, given_sample, allow=(reason,))
    assert (read, report.kept, report.reasons) == (given_sample, 1, {reason: 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n", "1.5"),
        ("n", " 1"),
        ("n", "one"),
        ("n", ""),
        ("n", True),
        ("x", "0x1"),
        ("x", "NaN"),
        ("yes", "1"),
        ("yes", 1),
        ("s", 5),
        ("l", "a"),
        ("l", {}),
        ("o", []),
    ],
)
def test_other_values_of_the_wrong_type_are_noted(tmp_path: Path, key: str, value: Any) -> None:
    given_sample = sample("f", {key: value})
    (read,), report = check(tmp_path, given_sample)
    assert read == given_sample
    assert (report.kept, report.reasons) == (1, {"wrong_type": 1})


def test_nan_is_rejected(tmp_path: Path) -> None:
    _, found = check_against_tools(sample("f", {"x": {"deep": [float("nan")]}}))
    assert [each.reason for each in found if each.severity == "rejected"] == ["not_a_number"]


def test_empty_turns_and_empty_prompts(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": " "},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    samples, report = load_dataset(str(path))
    assert (samples, report.reasons) == ([], {"empty_prompt": 1, "empty_turn": 1})


# among the others


def test_duplicates_and_other_golds(tmp_path: Path) -> None:
    one = sample("f", {"n": 1}, "one")
    rows = [one, sample("f", {"n": 2}, "two"), sample("f", {"n": 1}, "three"), sample("f", {"n": 1}, "four", "else")]
    samples, report = check(tmp_path, *rows)
    assert [each.id for each in samples] == ["one", "two", "four"]
    assert report.reasons == {"duplicate": 1, "other_gold": 1}
    assert report.first_rows == {"other_gold": [2], "duplicate": [3]}
    assert check(tmp_path, *rows, allow=("duplicate",))[1].kept == 4


def test_prompts_of_the_test_file_are_leaks(tmp_path: Path) -> None:
    test = save_samples(tool_world(1, 10), tmp_path / "test.jsonl")
    train = save_samples([*tool_world(0, 10), *tool_world(1, 4)], tmp_path / "train.jsonl")
    samples, report = load_dataset(str(train), test=str(test))
    assert (len(samples), report.reasons) == (10, {"leak": 4})
    assert report.first_rows["leak"] == [11, 12, 13, 14]


def test_a_leak_is_found_in_another_layout(tmp_path: Path) -> None:
    plain = sample("f", {"n": 1})
    spaced = ToolSample(
        "x", ({"role": "system", "content": "Hi"}, {"role": "user", "content": " ?\n"}), plain.tools, Gold((), "no")
    )
    assert compute_leak_digest(plain) == compute_leak_digest(spaced)
    assert compute_leak_digest(plain) != compute_leak_digest(sample("f", {}, user="!"))


def test_prompts_over_the_limit(tmp_path: Path) -> None:
    path = save_samples([sample("f", {}), sample("f", {}, user="a b c d e f")], tmp_path / "rows.jsonl")
    layout = PromptLayout(family_tokenizer("qwen3"), "hermes")
    short, long = (layout.count_tokens(each) for each in load_dataset(str(path)).samples)
    assert long > short
    samples, report = load_dataset(str(path), layout=layout, max_prompt_tokens=short)
    assert (len(samples), report.reasons) == (1, {"prompt_too_long": 1})
    assert f"{long} tokens, the limit is {short}" in report.findings[0].finding.detail
    kept = check_data(str(path), layout=layout, max_prompt_tokens=short, allow=("prompt_too_long",))
    assert (kept.kept, kept.reasons) == (2, {"prompt_too_long": 1})
    with pytest.raises(UserError, match="needs a tokenizer"):
        check_data(str(path), max_prompt_tokens=short)


# the report


def test_rows_are_kept_repaired_or_rejected(tmp_path: Path) -> None:
    rows = [sample("f", {"n": str(n)} if n % 3 else {"z": 1} if n % 2 else {}, f"s{n}", f"{n}") for n in range(30)]
    _, report = check(tmp_path, *rows)
    # of 30, 10 are divisible by 3: 5 odd ones have an undocumented argument, 5 are good; 20 hold a number as text
    assert (report.rows, report.kept, report.repaired, report.rejected, report.samples) == (30, 5, 20, 5, 25)
    told = report.to_json()
    assert set(told) >= {"rows", "kept", "repaired", "rejected", "samples", "reasons"}
    assert told["reasons"] == {"undocumented_argument": 5, "number_as_string": 20}
    assert json.loads(json.dumps(told)) == told


def test_findings_are_bounded(tmp_path: Path) -> None:
    rows = [sample("f", {"n": "1"}, f"s{n}", f"{n}") for n in range(MAX_FINDINGS + 7)]
    _, report = check(tmp_path, *rows)
    told = report.to_json()
    assert (len(told["findings"]), told["findings_left_off"]) == (MAX_FINDINGS, 7)
    assert told["occurrences"]["number_as_string"] == MAX_FINDINGS + 7


def test_rows_of_several_shapes_are_noted(tmp_path: Path) -> None:
    other = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [to_json(sample("f", {})), other, {"question": "?"}])))
    samples, report = load_dataset(str(path))
    assert len(samples) == 2
    assert report.reasons == {"mixed_shapes": 1, "unknown_shape": 1}
    assert (report.kept, report.rejected, report.sources) == (2, 1, {"samples": 1, "messages": 1})


@pytest.mark.parametrize(
    "settings",
    [
        {"allow": ("not_json",)},
        {"allow": ("nonsense",)},
        {"mask_names": 2},
        {"mask_names": 0.5, "keep_prompts": True},
        {"max_prompt_tokens": -1},
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r" (is|contains) .*expected|cannot be combined"):
        CheckConfig(**settings)


def test_every_reason_has_a_remedy() -> None:
    assert set(ALLOWABLE_REASONS) <= set(REASONS)
    assert all(reason.meaning and reason.remedy for reason in REASONS.values())


def test_a_sample_that_the_format_cannot_write_rejects_only_itself(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "!"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "?"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "x", "messages": [*turns, {"role": "assistant", "content": "<think> b"}]}))
    assert check_data(str(path)).samples == 2
    samples, report = load_dataset(str(path), layout=PromptLayout(family_tokenizer("qwen3"), "hermes"))
    assert [sample.id for sample in samples] == ["x/0"]
    assert (report.reasons, report.repaired, report.lost_turns) == ({"not_laid_out": 1}, 1, 1)
    with pytest.raises(UserError, match="allow contains 'not_laid_out'"):
        CheckConfig(allow=("not_laid_out",))


def test_a_tool_without_parameters_takes_no_arguments(tmp_path: Path) -> None:
    call = {"function": {"name": "stop", "arguments": {"n": 1}}}
    row = {"messages": [{"role": "user", "content": "!"}, {"role": "assistant", "tool_calls": [call]}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**row, "tools": [{"name": "stop", **p}]}) for p in ({}, {"parameters": {}})))
    assert load_dataset(str(path))[1].first_rows == {"undocumented_argument": [1]}

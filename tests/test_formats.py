from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rest_rl.errors import UserError
from rest_rl.formats import FORMATS, ToolFormat, get_format
from rest_rl.response import Gold, Region, ToolCall
from tests.scores import exact_match, score
from tests.test_json_spans import json_values

HERE = Path(__file__).parent / "golden"
GOLDEN = [json.loads(line) for line in (HERE / "responses.jsonl").read_text().splitlines()]
AWKWARD = [json.loads(line) for line in (HERE / "awkward.jsonl").read_text().splitlines()]
ALL = [*FORMATS, *(f"{name}+think" for name in FORMATS)]

plain_text = (
    st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"]), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and not re.search(r"\[/?[A-Z_]+\]", text))  # Mistral's tags
)
calls = st.lists(
    st.builds(ToolCall, st.text(min_size=1), st.dictionaries(st.text(), json_values, max_size=3)), max_size=3
)


def names_without(characters: str) -> st.SearchStrategy[str]:
    allowed = st.characters(exclude_characters=characters, exclude_categories=["Cs"])
    return st.text(allowed, min_size=1).map(str.strip).filter(bool)


_QWEN_NAMES = names_without("<>\n")
_CALLS = {
    "mistral_v11": st.builds(ToolCall, names_without("[{\n"), st.dictionaries(st.text(), json_values, max_size=3)),
    "qwen3_coder": st.builds(ToolCall, _QWEN_NAMES, st.dictionaries(_QWEN_NAMES, json_values, max_size=3)),
    "pythonic": st.builds(ToolCall, names_without("()[]=,\"'\n"), st.dictionaries(st.text(), json_values, max_size=3)),
}
_CALL_LIKE = {
    "llama3": re.compile(r'\A\s*\{|^[ \t]*\{\s*"name"', re.MULTILINE),
    "pythonic": re.compile(r"^[ \t]*\[.*\(", re.MULTILINE | re.DOTALL),
}
"""Answers that a format without tags would read as a call, and refuses to write."""


def calls_for(name: str) -> st.SearchStrategy[list[ToolCall]]:
    """Any calls that the format's grammar can write, by its documented rule for names."""
    one = _CALLS.get(name.removesuffix("+think"))
    return calls if one is None else st.lists(one, max_size=3)


def writable(name: str, answer: str | None) -> bool:
    call_like = _CALL_LIKE.get(name.removesuffix("+think"))
    return not (answer and call_like and call_like.search(answer))


@pytest.mark.parametrize("name", ALL)
@given(data=st.data(), thought=plain_text, answer=st.none() | plain_text)
def test_render_and_parse_round_trip(name, data, thought, answer):
    tool_format, made = get_format(name), data.draw(calls_for(name))
    assume(writable(name, answer))
    text = tool_format.render(thought, made, answer)
    parsed = tool_format.parse(text)
    assert (parsed.thought, list(parsed.calls), parsed.answer) == (thought, made, answer)
    assert parsed.well_formed
    assert parsed.problems == ()
    assert parsed.unreadable_calls == 0
    gold = Gold(tuple(made), answer)
    if made or answer is not None:  # where the answer is plain text, an empty response is none
        assert exact_match(parsed, gold)


FRAGMENTS = [
    *dict.fromkeys(tag for tool_format in FORMATS.values() for tag in tool_format.tags),
    *('{"name": "f", ', '"parameters": {', '"arguments": ', "}", '"', "'", "\n", "x", "é", "\ud800", "\\", " ", "; "),
    *("[", "]", "(", ")", "f(", "[f(", "a=", "**{", ",", "f>", "=f>\n", "True", "1", '"""', "\t"),
]


@pytest.mark.parametrize("name", ALL)
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))
def test_any_text_parses_into_sorted_disjoint_spans(name, text):
    parsed = get_format(name).parse(text)
    quick = get_format(name).parse(text, spans=False)
    assert quick == replace(parsed, spans=())
    at = 0
    for span in parsed.spans:
        assert at <= span.start < span.end <= len(text)
        assert span.region is not Region.OTHER
        at = span.end
    assert len(parsed.problems) <= 20


@pytest.mark.parametrize("row", GOLDEN, ids=[row["title"] for row in GOLDEN])
def test_golden_responses(row):
    text = row["text"]
    parsed = get_format(row["format"]).parse(text)
    assert [[call.name, dict(call.arguments)] for call in parsed.calls] == row["calls"]
    assert parsed.answer == row["answer"]
    assert parsed.well_formed is row["well_formed"]
    assert parsed.unreadable_calls == row["unreadable"]
    assert [[span.region.label, text[span.start : span.end]] for span in parsed.spans] == row["spans"]


@pytest.mark.parametrize("row", AWKWARD, ids=[row["title"] for row in AWKWARD])
def test_awkward_responses(row):
    parsed = FORMATS[row["format"]].parse(row["text"])
    assert [[call.name, dict(call.arguments)] for call in parsed.calls] == row["calls"]
    assert parsed.answer == row["answer"]
    assert parsed.well_formed is row["well_formed"]
    assert parsed.unreadable_calls == row["unreadable"]
    assert parsed.well_formed or parsed.problems


@pytest.mark.parametrize("name", FORMATS)
def test_there_are_twenty_awkward_responses_of_each_format(name):
    assert len({row["text"] for row in AWKWARD if row["format"] == name}) == 20


@pytest.mark.parametrize("name", ALL)
def test_every_prefix_of_a_response_parses(name):
    tool_format = get_format(name)
    made = [ToolCall("f", {"a": [1, {"b": "}"}], "s": "5\n"}), ToolCall("g", {})]
    text = tool_format.render("hm 東京", made, "done 😀")
    for end in range(len(text)):
        parsed = tool_format.parse(text[:end])
        assert all(span.end <= end for span in parsed.spans)
        assert list(parsed.calls) in ([], made[:1], made)


ORDINARY = {
    "one call": Gold((ToolCall("get_weather", {"city": "Zürich", "days": 3, "hourly": False}),)),
    "parallel calls": Gold((ToolCall("maps.route", {"via": ["a", "b"], "zip": "00501"}), ToolCall("f-2", {"n": -1.5}))),
    "no arguments": Gold((ToolCall("now", {}),)),
    "call and answer": Gold((ToolCall("f", {"a": {"b": None}, "tag": "</think> [TOOL_CALLS]"}),), "I look."),
    "answer only": Gold((), "It is 21 °C; see [1] (a table)."),
}


@pytest.mark.parametrize("title", ORDINARY)
@pytest.mark.parametrize("name", ALL)
def test_gold_in_its_usual_form_scores_full_marks(name, title):
    tool_format, gold = get_format(name), ORDINARY[title]
    for thought in ("I think.", None):
        parsed = tool_format.parse(tool_format.render(thought, gold.calls, gold.answer))
        for progress in (0.0, 0.4, 1.0):
            reward = score(parsed, gold, progress)
            assert (reward.format, reward.accuracy, reward.explanation) == (1.0, 1.0, ())
        assert exact_match(parsed, gold)


@pytest.mark.parametrize("name", ALL)
def test_each_format_has_its_name_and_the_protocol(name):
    tool_format: ToolFormat = get_format(name)
    assert tool_format.name == name
    assert hash(tool_format) == hash(get_format(name))
    assert tool_format == get_format(name)


def test_a_tag_inside_an_argument_cannot_close_the_block():
    for tool_format in FORMATS.values():
        call = ToolCall("say", {"text": " ".join(["</tool_call> </think> <response>", *tool_format.tags])})
        parsed = tool_format.parse(tool_format.render("x", [call], None))
        assert parsed.calls == (call,)
        assert parsed.well_formed


@pytest.mark.parametrize(
    "text",
    [
        "<think>x</think>\n<response> hi <response> </response>",
        "<think><think>x</think>\n<response> hi </response>",
        "<think>x</think>\n<response> hi </think> </response>",
        "<think> <tool_call> </think>\n<response> hi </response>",
        '<think>x</think>\n<tool_call>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>',
    ],
)
def test_an_extra_tag_is_a_violation(text):
    parsed = FORMATS["toolrl"].parse(text)
    assert not parsed.well_formed
    assert any("inside a block" in problem for problem in parsed.problems)
    assert parsed.attempted_call is ("</tool_call>" in text)


def test_text_with_tags_and_values_that_are_not_json_cannot_be_rendered():
    with pytest.raises(UserError, match=r"the thought contains '</think>'"):
        FORMATS["toolrl"].render("a </think> b", [], None)
    with pytest.raises(UserError, match=r"the answer contains '<tool_call>'"):
        FORMATS["hermes"].render(None, [], "see <tool_call>")
    with pytest.raises(UserError, match=r"the call of 'f' is not JSON"):
        FORMATS["toolrl"].render("x", [ToolCall("f", {"a": float("nan")})], None)


UNWRITABLE = [
    ("mistral_v11", ToolCall("f[0]", {}), "tool name"),
    ("mistral_v11", ToolCall(" f", {}), "tool name"),
    ("qwen3_coder", ToolCall("f>", {}), "name 'f>'"),
    ("qwen3_coder", ToolCall("f", {"a\n": 1}), "name 'a"),
    ("pythonic", ToolCall("f(x)", {}), "tool name"),
    ("pythonic", ToolCall("a, b", {}), "tool name"),
    ("pythonic", ToolCall("", {}), "tool name"),
]


@pytest.mark.parametrize(("name", "call", "words"), UNWRITABLE)
def test_a_name_that_the_format_cannot_represent_is_an_error(name, call, words):
    with pytest.raises(UserError, match=words) as refused:
        FORMATS[name].render("x", [call], None)
    assert f"format '{name}'" in refused.value.problem


@pytest.mark.parametrize(
    ("name", "answer"),
    [("llama3", '{"a": 1}'), ("llama3", 'so:\n{"name": "f"}'), ("pythonic", "[f(a=1)]"), ("pythonic", "so\n[f (x) y]")],
)
def test_an_answer_that_looks_like_a_call_is_an_error(name, answer):
    for made in ([], [ToolCall("f", {})]):
        with pytest.raises(UserError, match="looks like a call"):
            FORMATS[name].render(None, made, answer)


@pytest.mark.parametrize("name", ["llama3", "mistral", "mistral_v11", "qwen3_coder", "pythonic"])
def test_values_that_cannot_be_parsed_again_are_an_error(name):
    deep: object = 1
    for _ in range(70):
        deep = [deep]
    for value in (float("nan"), float("inf"), 10**450, deep, object(), {1, 2}):
        with pytest.raises(UserError, match=r"calls? of 'f'"):
            FORMATS[name].render(None, [ToolCall("f", {"a": value})], None)


def test_the_number_of_problems_is_bounded():
    parsed = FORMATS["toolrl"].parse("<think>x</think><tool_call>\n" + "junk\n" * 5_000 + "</tool_call>")
    assert parsed.unreadable_calls == 5_000
    assert len(parsed.problems) <= 20


@pytest.mark.parametrize("name", FORMATS)
def test_instructions_show_every_tool(name):
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}, {"name": "g"}]
    text = FORMATS[name].instructions(tools)
    assert '"name": "f"' in text
    assert '"name": "g"' in text

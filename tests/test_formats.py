from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.formats import FORMATS, get_format
from rest_rl.response import Region, ToolCall
from tests.test_json_spans import json_values

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden" / "responses.jsonl").read_text().splitlines()]

plain_text = (
    st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
)
calls = st.lists(
    st.builds(ToolCall, st.text(min_size=1), st.dictionaries(st.text(), json_values, max_size=3)), max_size=3
)


@pytest.mark.parametrize("name", FORMATS)
@given(thought=plain_text, made=calls, answer=st.none() | plain_text)
def test_parse_reads_back_what_render_wrote(name, thought, made, answer):
    text = FORMATS[name].render(thought, made, answer)
    parsed = FORMATS[name].parse(text)
    assert (parsed.thought, list(parsed.calls), parsed.answer) == (thought, made, answer)
    assert parsed.well_formed
    assert parsed.problems == ()
    assert parsed.unreadable_calls == 0


@pytest.mark.parametrize("name", FORMATS)
@given(
    text=st.lists(
        st.sampled_from(
            [*FORMATS["toolrl"].tags, '{"name": "f", ', '"parameters": {', "}", '"', "\n", "x", "é", "\ud800", "\\"]
        ),
        max_size=25,
    ).map("".join)
)
def test_any_text_parses_into_sorted_disjoint_spans(name, text):
    parsed = FORMATS[name].parse(text)
    quick = FORMATS[name].parse(text, spans=False)
    assert quick == replace(parsed, spans=())
    at = 0
    for span in parsed.spans:
        assert at <= span.start < span.end <= len(text)
        assert span.region is not Region.OTHER
        at = span.end


@pytest.mark.parametrize("row", GOLDEN, ids=[row["title"] for row in GOLDEN])
def test_golden_responses(row):
    text = row["text"]
    parsed = FORMATS[row["format"]].parse(text)
    assert [[call.name, dict(call.arguments)] for call in parsed.calls] == row["calls"]
    assert parsed.answer == row["answer"]
    assert parsed.well_formed is row["well_formed"]
    assert parsed.unreadable_calls == row["unreadable"]
    assert [[span.region.label, text[span.start : span.end]] for span in parsed.spans] == row["spans"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_prefix_of_a_response_parses(name):
    text = FORMATS[name].render("hm 東京", [ToolCall("f", {"a": [1, {"b": "}"}]}), ToolCall("g", {})], "done 😀")
    for end in range(len(text)):
        parsed = FORMATS[name].parse(text[:end])
        assert all(span.end <= end for span in parsed.spans)


def test_a_tag_inside_an_argument_cannot_close_the_block():
    call = ToolCall("say", {"text": "</tool_call> </think> <response>"})
    for tool_format in FORMATS.values():
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
def test_a_tag_more_than_the_blocks_have_is_a_violation(text):
    parsed = FORMATS["toolrl"].parse(text)
    assert not parsed.well_formed
    assert any("inside a block" in problem for problem in parsed.problems)
    assert parsed.attempted_call is ("</tool_call>" in text)


def test_text_that_cannot_be_written_is_refused_by_name():
    with pytest.raises(ValueError, match=r"thought contains '</think>'"):
        FORMATS["toolrl"].render("a </think> b", [], None)
    with pytest.raises(ValueError, match=r"answer contains '<tool_call>'"):
        FORMATS["hermes"].render(None, [], "see <tool_call>")
    with pytest.raises(ValueError, match=r"call of 'f' cannot be written as JSON"):
        FORMATS["toolrl"].render("x", [ToolCall("f", {"a": float("nan")})], None)


def test_an_unknown_format_is_refused_and_an_object_passes_through():
    with pytest.raises(ValueError, match="toolrl, hermes"):
        get_format("xml")
    assert get_format(FORMATS["hermes"]) is FORMATS["hermes"]


def test_problems_are_bounded_however_broken_the_text():
    parsed = FORMATS["toolrl"].parse("<think>x</think><tool_call>\n" + "junk\n" * 5_000 + "</tool_call>")
    assert parsed.unreadable_calls == 5_000
    assert len(parsed.problems) <= 20


@pytest.mark.parametrize("name", FORMATS)
def test_instructions_show_every_tool(name):
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}, {"name": "g"}]
    text = FORMATS[name].instructions(tools)
    assert '"name": "f"' in text
    assert '"name": "g"' in text

"""Formats by name, by the address of an object, and for prompts that open the think block."""

from __future__ import annotations

import sys
import types

import pytest

from rest_rl.errors import UserError
from rest_rl.formats import FORMATS, HermesFormat, OpenedThinkFormat, get_format
from rest_rl.response import Region, ToolCall

THINKS = {name: "[THINK]" if name == "mistral_v11" else "<think>" for name in FORMATS}


def test_get_format_accepts_names_objects_and_addresses(monkeypatch):
    mine = HermesFormat(name="mine")
    module = types.ModuleType("someones_formats")
    module.MINE, module.Class, module.empty = mine, HermesFormat, object()
    monkeypatch.setitem(sys.modules, "someones_formats", module)
    assert get_format("hermes") is FORMATS["hermes"]
    assert get_format(mine) is mine
    assert get_format("someones_formats:MINE") is mine
    assert get_format("someones_formats:MINE+think") == OpenedThinkFormat(mine)
    assert get_format("someones_formats:MINE+think").name == "mine+think"
    with pytest.raises(
        ValueError,
        match=r"someones_formats:empty' lacks the attributes 'name', 'tags', 'parse', 'render', 'instructions'",
    ):
        get_format("someones_formats:empty")
    with pytest.raises(ValueError, match=r"is a class, expected an object; create one with HermesFormat\(\)"):
        get_format("someones_formats:Class")
    with pytest.raises(ValueError, match=r"cannot import format .someones_formats:absent"):
        get_format("someones_formats:absent")


@pytest.mark.parametrize("address", ["no_such_module:X", ":X", "json:", "os.path:no.such", ".:X"])
def test_an_address_that_cannot_be_imported_is_an_error(address):
    with pytest.raises(UserError, match=r"expected package\.module:OBJECT|cannot import format"):
        get_format(address)


@pytest.mark.parametrize("name", ["xml", "xml+think", "", "+think", "hermes+thinking"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="toolrl, hermes, llama3, mistral, mistral_v11, qwen3_coder, pythonic"):
        get_format(name)


def test_an_object_that_is_not_a_format_is_an_error():
    with pytest.raises(ValueError, match="format object int lacks the attributes 'name', 'tags'"):
        get_format(3)  # type: ignore[arg-type]


def test_a_format_without_think_tags_cannot_start_in_a_think_block():
    with pytest.raises(ValueError, match="has no think tags"):
        OpenedThinkFormat(HermesFormat(name="bare", tags=("<tool_call>", "</tool_call>")))


@pytest.mark.parametrize("name", FORMATS)
def test_a_response_can_start_inside_the_think_block(name):
    inner, opened, call = FORMATS[name], get_format(name + "+think"), ToolCall("f", {"a": 1})
    assert opened.tags == inner.tags
    assert opened.opening == THINKS[name]
    text = opened.render("I look.", [call], "Wait.")
    assert text.startswith("I look.")
    whole = inner.parse(opened.opening + text)
    parsed = opened.parse(text)
    assert (parsed.thought, parsed.calls, parsed.answer) == ("I look.", (call,), "Wait.")
    assert parsed.spans[0] == (0, text.index(THINKS[name][0] + "/"), Region.REASONING)
    shift = len(opened.opening)
    assert [(s.start + shift, s.end + shift, s.region) for s in parsed.spans] == list(whole.spans[1:])
    assert opened.parse(text, spans=False).spans == ()
    assert opened.instructions([{"name": "g"}]) == inner.instructions([{"name": "g"}])


def test_the_think_block_is_closed_even_without_a_thought():
    # nothing is thought: what stands before the closing tag is white space
    assert get_format("hermes+think").render(None, [], "ok") == "</think>\n\nok"
    assert get_format("hermes+think").parse("</think>\n\nok").thought == ""


def test_positions_in_problems_count_from_the_response():
    parsed = get_format("hermes+think").parse("x</think>y<tool_call>{}</tool_call></think>")
    # the tags lie at 10 and 35 of the response, and 7 characters further with the opening tag; `{}` at 21
    assert parsed.problems == (
        "call at character 21: expected a key 'name' with a string",
        "unmatched </think> at character 35",
    )

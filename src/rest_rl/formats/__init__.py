"""The tool-call formats: text of a response -> ParsedResponse, and back.

Parsing is total: any string gives a ParsedResponse. A complete block is read; what lies outside complete blocks
belongs to no region (OTHER). Of a call whose arguments are broken, the name and the arguments keep their regions as
far as they can be located and the rest of that call is OTHER.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rest_rl.errors import UserError
from rest_rl.formats.chat_template import detect_template_format
from rest_rl.formats.hermes import HermesFormat
from rest_rl.formats.llama3 import Llama3Format
from rest_rl.formats.mistral import MistralFormat, MistralV11Format
from rest_rl.formats.opened_think import THINK_SUFFIX, OpenedThinkFormat
from rest_rl.formats.protocol import ToolFormat
from rest_rl.formats.pythonic import PythonicFormat
from rest_rl.formats.qwen3_coder import Qwen3CoderFormat
from rest_rl.formats.toolrl import ToolRLFormat
from rest_rl.objects import find_address, load_object, wrap_user_errors
from rest_rl.response import ParsedResponse, ToolCall

__all__ = [
    "FORMATS",
    "HermesFormat",
    "Llama3Format",
    "MistralFormat",
    "MistralV11Format",
    "OpenedThinkFormat",
    "PythonicFormat",
    "Qwen3CoderFormat",
    "ToolFormat",
    "ToolRLFormat",
    "demonstration_format",
    "detect_template_format",
    "format_name",
    "get_format",
]

_ALL: tuple[ToolFormat, ...] = (
    *(ToolRLFormat(), HermesFormat(), Llama3Format(), MistralFormat(), MistralV11Format()),
    *(Qwen3CoderFormat(), PythonicFormat()),
)
FORMATS: dict[str, ToolFormat] = {tool_format.name: tool_format for tool_format in _ALL}
"""The built-in formats by name; a table, not a registry."""


def get_format(tool_format: str | ToolFormat) -> ToolFormat:
    """The format of that name; an object passes through, once it has been tried.

    `NAME+think` is the format for prompts that end with the opening think tag, `package.module:OBJECT` imports an
    object of your own. UserError for an unknown name.
    """
    if not isinstance(tool_format, str):
        return _validate_object(tool_format, f"a format object of type {type(tool_format).__name__}")
    name = tool_format.removesuffix(THINK_SUFFIX)
    if name in FORMATS:
        found = FORMATS[name]
    elif ":" in name:
        found = _validate_object(load_object(name, "format"), f"format {name!r}")
    else:
        raise UserError(
            f"format {tool_format!r}",
            f"one of {', '.join(FORMATS)}, or package.module:OBJECT",
            f"add {THINK_SUFFIX} to a name when the prompt ends with the opening think tag",
        )
    return found if name == tool_format else OpenedThinkFormat(found)


def demonstration_format(tool_format: ToolFormat) -> ToolFormat:
    """The format as its models write it themselves, for demonstrations to learn from.

    Only qwen3_coder differs: its `render` quotes strings that `parse` would take for a number, its models do not.
    """
    if isinstance(tool_format, OpenedThinkFormat):
        return OpenedThinkFormat(demonstration_format(tool_format.inner))
    if isinstance(tool_format, Qwen3CoderFormat):
        return replace(tool_format, quotes_strings=False)
    return tool_format


def format_name(tool_format: str | ToolFormat) -> str:
    """The name or address from which `get_format` makes the format again, for what a checkpoint records.

    UserError for an object that no module holds.
    """
    if isinstance(tool_format, str):
        return tool_format
    if isinstance(tool_format, OpenedThinkFormat):
        return format_name(tool_format.inner) + THINK_SUFFIX
    name = get_format(tool_format).name
    if FORMATS.get(name) == tool_format:
        return name
    if address := find_address(tool_format):
        return address
    raise UserError(
        f"a format object {name!r} that no module holds",
        "one that a checkpoint can record",
        f"define it in a module (MINE = {type(tool_format).__name__}(...) in my_format.py), or set "
        f"rest_rl.FORMATS[{name!r}] to it and pass that name",
    )


_validated: dict[int, Any] = {}
"""The objects that have been tried, by their identity."""
_TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def _validate_object(found: Any, what: str) -> ToolFormat:
    if _validated.get(id(found)) is found:
        return found
    parts = ("name", "tags", "parse", "render", "instructions")
    missing = [part for part in parts if not hasattr(found, part)]
    if isinstance(found, type):
        raise UserError(f"{what}, which is a class", "an object", f"make one with {found.__name__}()")
    if missing:
        raise UserError(f"{what} without {', '.join(missing)}", f"an object with {', '.join(parts)}", "add them")
    with wrap_user_errors(what, "the methods of rest_rl.ToolFormat"):
        _check_round_trip(found, what)
    _validated[id(found)] = found
    return found


def _check_round_trip(found: ToolFormat, what: str) -> None:
    """Write one call, read it back and describe a tool; UserError for what the package could not use."""
    call = ToolCall("f", {"a": 1})
    text = found.render(None, (call,), None)
    read, _ = found.parse(text), found.parse("", spans=False)
    for part, value, kind in (
        ("name", found.name, str),
        ("tags", found.tags, tuple),
        ("render(...)", text, str),
        ("parse(...)", read, ParsedResponse),
        ("instructions(...)", found.instructions([_TOOL]), str),
    ):
        if not isinstance(value, kind):
            raise UserError(f"{what}, whose {part} is a {type(value).__name__}", f"a {kind.__name__}", "correct it")
    if read.calls != (call,) or not read.well_formed:
        read_as = f"{list(read.calls)}, well_formed {read.well_formed} {'; '.join(read.problems)}".rstrip()
        raise UserError(f"{what}, which writes {call} as {text!r} and reads {read_as}", "the same call", "correct it")
    bounds = [bound for span in read.spans for bound in span[:2]]
    if bounds != sorted(bounds) or not read.spans or bounds[0] < 0 or bounds[-1] > len(text):
        got = f"{what}, whose parse of {text!r} has the spans {[tuple(span) for span in read.spans]}"
        raise UserError(got, "sorted, disjoint intervals of the text", "correct it")

"""Tool-call formats: parse the text of a response into a ParsedResponse, and render it back.

Every string can be parsed. Text outside complete blocks has the region OTHER. If the arguments of a call are broken,
its name and arguments keep their regions as far as they can be located, and the rest of the call is OTHER.
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
# The built-in formats by name.
FORMATS: dict[str, ToolFormat] = {tool_format.name: tool_format for tool_format in _ALL}


def get_format(tool_format: str | ToolFormat) -> ToolFormat:
    """Return the format with this name, or validate and return a format object.

    `NAME+think` is the format for prompts that end with the opening think tag; `package.module:OBJECT` imports your own
    object. An unknown name or an object that is not a valid format is a UserError.
    """
    if not isinstance(tool_format, str):
        return _validate_object(tool_format, f"format object {type(tool_format).__name__}")
    name = tool_format.removesuffix(THINK_SUFFIX)
    if name in FORMATS:
        found = FORMATS[name]
    elif ":" in name:
        found = _validate_object(load_object(name, "format"), f"format {name!r}")
    else:
        raise UserError(
            f"unknown format {tool_format!r}",
            f"one of {', '.join(FORMATS)}, or package.module:OBJECT",
            f"choose one, with {THINK_SUFFIX} appended if the chat template opens the think block",
        )
    return found if name == tool_format else OpenedThinkFormat(found)


def demonstration_format(tool_format: ToolFormat) -> ToolFormat:
    """Return the variant of a format for training on demonstrations: text exactly as the models write it.

    Only qwen3_coder differs: its `render` quotes strings such as "5", which the models write without quotes.
    """
    if isinstance(tool_format, OpenedThinkFormat):
        return OpenedThinkFormat(demonstration_format(tool_format.inner))
    if isinstance(tool_format, Qwen3CoderFormat):
        return replace(tool_format, quotes_strings=False)
    return tool_format


def format_name(tool_format: str | ToolFormat) -> str:
    """Return the name or address with which `get_format` finds a format again; checkpoints record it.

    An object that is not an attribute of a module is a UserError.
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
        f"format object {name!r} is not an attribute of a module, so a checkpoint cannot record it",
        remedy=f"define it in a module (MINE = {type(tool_format).__name__}(...) in my_format.py), or set "
        f"rest_rl.FORMATS[{name!r}] and pass that name",
    )


# Objects that passed validation, by id. Keeping a reference ensures that no other object gets the same id.
_validated: dict[int, Any] = {}
_TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def _validate_object(found: Any, what: str) -> ToolFormat:
    if _validated.get(id(found)) is found:
        return found
    parts = ("name", "tags", "parse", "render", "instructions")
    missing = [part for part in parts if not hasattr(found, part)]
    if isinstance(found, type):
        raise UserError(f"{what} is a class", "an object", f"create one with {found.__name__}()")
    if missing:
        raise UserError(f"{what} lacks the attributes {', '.join(map(repr, missing))}", remedy="add them")
    with wrap_user_errors(what, "the methods of rest_rl.ToolFormat"):
        _check_round_trip(found, what)
    _validated[id(found)] = found
    return found


def _check_round_trip(found: ToolFormat, what: str) -> None:
    # Renders a call, parses it and describes a tool once, so that mistakes in a user's format show up before training.
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
            raise UserError(f"{part} of {what} is of type {type(value).__name__}", f"a {kind.__name__}", "correct it")
    if read.calls != (call,) or not read.well_formed:
        result = f"{list(read.calls)}, well_formed {read.well_formed} {'; '.join(read.problems)}".rstrip()
        raise UserError(f"{what} renders {call} as {text!r} and parses that as {result}", "the same call", "correct it")
    bounds = [bound for span in read.spans for bound in span[:2]]
    if bounds != sorted(bounds) or not read.spans or bounds[0] < 0 or bounds[-1] > len(text):
        problem = f"{what} parses {text!r} into the spans {[tuple(span) for span in read.spans]}"
        raise UserError(problem, "sorted, disjoint intervals of the text", "correct it")

"""The tool-call formats: text of a response -> ParsedResponse, and back.

Parsing is total: any string gives a ParsedResponse. A complete block is read; what lies outside complete blocks
belongs to no region (OTHER). Of a call whose arguments are broken, the name and the arguments keep their regions as
far as they can be located and the rest of that call is OTHER.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rest_rl.errors import UserError
from rest_rl.formats.chat_template import format_of_template
from rest_rl.formats.hermes import HermesFormat
from rest_rl.formats.llama3 import Llama3Format
from rest_rl.formats.mistral import MistralFormat, MistralV11Format
from rest_rl.formats.opened_think import SUFFIX, OpenedThinkFormat
from rest_rl.formats.protocol import ToolFormat
from rest_rl.formats.pythonic import PythonicFormat
from rest_rl.formats.qwen3_coder import Qwen3CoderFormat
from rest_rl.formats.toolrl import ToolRLFormat
from rest_rl.objects import load_object

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
    "as_demonstrated",
    "format_of_template",
    "get_format",
]

_ALL: tuple[ToolFormat, ...] = (
    *(ToolRLFormat(), HermesFormat(), Llama3Format(), MistralFormat(), MistralV11Format()),
    *(Qwen3CoderFormat(), PythonicFormat()),
)
FORMATS: dict[str, ToolFormat] = {tool_format.name: tool_format for tool_format in _ALL}
"""The built-in formats by name; a table, not a registry."""


def get_format(tool_format: str | ToolFormat) -> ToolFormat:
    """The format of that name; an object is checked for the parts of a ToolFormat and passes through.

    `NAME+think` is the format for prompts that end with the opening think tag, `package.module:OBJECT` imports an
    object of your own. UserError for an unknown name.
    """
    if not isinstance(tool_format, str):
        return _checked_object(tool_format, f"a format object of type {type(tool_format).__name__}")
    name = tool_format.removesuffix(SUFFIX)
    if name in FORMATS:
        found = FORMATS[name]
    elif ":" in name:
        found = _checked_object(load_object(name, "format"), f"format {name!r}")
    else:
        raise UserError(
            f"format {tool_format!r}",
            f"one of {', '.join(FORMATS)}, or package.module:OBJECT",
            f"add {SUFFIX} to a name when the prompt ends with the opening think tag",
        )
    return found if name == tool_format else OpenedThinkFormat(found)


def as_demonstrated(tool_format: ToolFormat) -> ToolFormat:
    """The format as its models write it themselves, for demonstrations to learn from.

    Only qwen3_coder differs: its `render` quotes strings that `parse` would take for a number, its models do not.
    """
    if isinstance(tool_format, OpenedThinkFormat):
        return OpenedThinkFormat(as_demonstrated(tool_format.inner))
    if isinstance(tool_format, Qwen3CoderFormat):
        return replace(tool_format, quotes_strings=False)
    return tool_format


def _checked_object(found: Any, what: str) -> ToolFormat:
    parts = ("name", "tags", "parse", "render", "instructions")
    missing = [part for part in parts if not hasattr(found, part)]
    if isinstance(found, type):
        raise UserError(f"{what}, which is a class", "an object", f"make one with {found.__name__}()")
    if missing:
        raise UserError(f"{what} without {', '.join(missing)}", f"an object with {', '.join(parts)}", "add them")
    return found

"""The tool-call formats: text of a response -> ParsedResponse, and back.

Parsing is total: any string gives a ParsedResponse. A complete block is read; what lies outside complete blocks
belongs to no region (OTHER). Of a call whose JSON is broken, the name and the arguments keep their regions as far
as they can be located and the rest of that call is OTHER.
"""

from __future__ import annotations

from rest_rl.formats.hermes import HermesFormat
from rest_rl.formats.protocol import ToolFormat
from rest_rl.formats.toolrl import ToolRLFormat

__all__ = ["FORMATS", "HermesFormat", "ToolFormat", "ToolRLFormat", "get_format"]

FORMATS: dict[str, ToolFormat] = {"toolrl": ToolRLFormat(), "hermes": HermesFormat()}
"""The built-in formats by name; a table, not a registry."""


def get_format(tool_format: str | ToolFormat) -> ToolFormat:
    """The format of that name, or the object itself; ValueError for an unknown name."""
    if not isinstance(tool_format, str):
        return tool_format
    if tool_format not in FORMATS:
        raise ValueError(
            f"unknown format {tool_format!r}; expected one of {', '.join(FORMATS)}, or a ToolFormat object"
        )
    return FORMATS[tool_format]

"""Detects the tool-call format of a chat template from its source."""

from __future__ import annotations

import re

_TOOLS = re.compile(r"\btools\b")

# Marks of formats that we do not support; some of these share a tag with a supported format.
_OTHER_FORMATS = re.compile(
    r"""<arg_key>|<tool_calls>|<function_calls>|<\|tool_call|tool▁call|<\|channel\|>|\A(?!.*<parameter=).*<function=""",
    re.DOTALL,
)

# Marks of our formats. The first match wins, so a format must precede all formats whose marks its own marks contain.
_MARKS = (
    ("qwen3_coder", r"<tool_call>.*<function=.*<parameter="),
    ("hermes", r'<tool_call>.*\\?"arguments\\?"\s*:'),
    ("toolrl", r'<tool_call>.*\\?"parameters\\?"\s*:'),
    ("mistral_v11", r"\[TOOL_CALLS\].*\[ARGS\]"),
    ("mistral", r"\[TOOL_CALLS\]"),
    ("pythonic", r"\[\w+\(\w+=\w+"),
    ("llama3", r'<\|(?:start_header_id|header_start)\|>.*\\?"parameters\\?"\s*:'),
)


def detect_template_format(template: str) -> str | None:
    """Return the name of a chat template's format in FORMATS, or None if it renders no tools or another format.

    Example: `"hermes"` for Qwen3's template.
    """
    # We search the source instead of rendering an example: many templates need variables, fail on some message or hide
    # calls behind conditions, but the text of a call always appears literally. Quotes may be escaped in a Jinja string.
    if not _TOOLS.search(template) or _OTHER_FORMATS.search(template):
        return None
    return next((name for name, marks in _MARKS if re.search(marks, template, re.DOTALL)), None)

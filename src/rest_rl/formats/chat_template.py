"""Which format a chat template writes, told by the marks in its source."""

from __future__ import annotations

import re

_TOOLS = re.compile(r"\btools\b")

_OTHER_FORMATS = re.compile(
    r"""<arg_key>|<tool_calls>|<function_calls>|<\|tool_call|tool▁call|<\|channel\|>|\A(?!.*<parameter=).*<function=""",
    re.DOTALL,
)
"""Marks of formats that are not ours, some of which share a tag with one that is."""

_MARKS = (
    ("qwen3_coder", r"<tool_call>.*<function=.*<parameter="),
    ("hermes", r'<tool_call>.*\\?"arguments\\?"\s*:'),
    ("toolrl", r'<tool_call>.*\\?"parameters\\?"\s*:'),
    ("mistral_v11", r"\[TOOL_CALLS\].*\[ARGS\]"),
    ("mistral", r"\[TOOL_CALLS\]"),
    ("pythonic", r"\[\w+\(\w+=\w+"),
    ("llama3", r'<\|(?:start_header_id|header_start)\|>.*\\?"parameters\\?"\s*:'),
)
"""What a template of each format contains; the first that fits is taken."""


def detect_template_format(template: str) -> str | None:
    """The name in FORMATS of the calls that a chat template writes; None when it renders no tools or other calls.

    Reads the source of the template and renders nothing. Example: Qwen3's gives `"hermes"`.
    """
    if not _TOOLS.search(template) or _OTHER_FORMATS.search(template):
        return None
    return next((name for name, marks in _MARKS if re.search(marks, template, re.DOTALL)), None)

"""Which format a chat template writes: all templates that TRL ships, and short ones in the manner of other families."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
import trl

from rest_rl.formats import FORMATS, detect_template_format, get_format
from rest_rl.response import ToolCall

TEMPLATES = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
WRITES = {
    "qwen2_5": "hermes",
    "qwen2_5_vl": None,
    "qwen3": "hermes",
    "qwen3_instruct_2507": "hermes",
    "qwen3_vl": "hermes",
    "qwen3_5_think": "qwen3_coder",
    "qwen3_5_nothink": "qwen3_coder",
    "qwen3_6": "qwen3_coder",
    "qwen3_8": "qwen3_coder",
    "nemotron_3_nano": "qwen3_coder",
    "nemotron_3_super": "qwen3_coder",
    "nemotron_3_ultra": "qwen3_coder",
    "nemotron_3_5_lightning": "qwen3_coder",
    "llama3_1": "llama3",
    "llama3_2": "llama3",
}
"""Families whose calls we write; all other templates of TRL render no tools or calls of other shapes."""


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_formats_of_trls_templates(name):
    assert detect_template_format(TEMPLATES[name]) == WRITES.get(name.removesuffix("_training"))


def test_the_families_in_the_table_exist():
    assert {name for name in WRITES if name in TEMPLATES} >= {"qwen2_5", "qwen3", "llama3_1", "llama3_2"}
    assert {"llama3", "glm4moe", "gptoss", "deepseekv3"} <= set(TEMPLATES)  # these must not be told as one of ours


TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
SHORT = {
    "mistral": TOOLS
    + '{% for call in m.tool_calls %}{{ "[TOOL_CALLS] [" + call.function | tojson + "]" }}{% endfor %}',
    "mistral_v11": TOOLS + '{{ "[TOOL_CALLS]" + call.name + "[ARGS]" + call.arguments | tojson }}',
    "pythonic": TOOLS
    + '{{ "<|header_start|>system" }}Write [first_function(key=value, other=value), second_function()]',
    "llama3": TOOLS + "{{ '<|header_start|>' }}" + """{{ '{"name": "' + call.name + '", "parameters": ' }}""",
    "hermes": TOOLS + '{{ "<tool_call>\\n{\\"name\\": \\"" + call.name + "\\", \\"arguments\\": " }}',
    "toolrl": TOOLS + '{{ "<tool_call>\\n{\\"name\\": \\"" + call.name + "\\", \\"parameters\\": " }}',
    "qwen3_coder": TOOLS + "{{ '<tool_call>\\n<function=' + call.name + '>\\n<parameter=' + key + '>' }}",
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_short_template_of_each_format(name):
    assert detect_template_format(SHORT[name]) == name
    assert detect_template_format(SHORT[name].replace("tools", "items")) is None  # renders no tools


@pytest.mark.parametrize(
    "marks",
    [
        "<tool_call>name\n<arg_key>key</arg_key>",  # GLM
        "<|tool_call_start|>[f(a=1)]<|tool_call_end|>",  # LFM2
        "<|start_header_id|><function=name>{...}</function> or {name, parameters: }",  # Llama 3.1 with tags
        '<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls>',
        "<function_calls>\nf(a=1)\n</function_calls>",
        "<|channel|>commentary to=functions.f",
        "<｜tool▁calls▁begin｜>",
        '[{"name": "f", "arguments": {}}]',
        "",
    ],
)
def test_other_formats_are_not_detected_as_ours(marks):
    assert detect_template_format(TOOLS + marks) is None


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [("qwen2_5", "hermes"), ("qwen3", "hermes"), ("qwen3_5_nothink", "qwen3_coder"), ("qwen3_6", "qwen3_coder")],
)
def test_calls_rendered_by_the_template_can_be_parsed(template, tool_format):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    calls = [ToolCall("f", {"a": 1, "s": "x", "b": True, "n": None, "l": [1, "y"]}), ToolCall("g", {})]
    messages = [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls],
        },
    ]
    text = environment.from_string(TEMPLATES[template]).render(messages=messages, tools=[])
    said = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    parsed = get_format(tool_format).parse(said)
    assert (list(parsed.calls), parsed.answer, parsed.well_formed) == (calls, "I look.", True)
    written = get_format(tool_format).render(parsed.thought, calls, "I look.")
    # Qwen3.6 writes `true` and `null` where Qwen3.5 writes `True` and `None`, as we do
    assert written.split() == said.replace("true\n", "True\n").replace("null\n", "None\n").split()

"""Rows of published shapes -> samples: the table SOURCES, and which shape a row has.

A loader takes a row, the identity for its samples and whether published prompts stay as they are. It returns the
samples with what it found on the way, or raises `RowRejectedError`. Dialogues become one sample per assistant turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rest_rl.data.reading import load_json
from rest_rl.data.reasons import Finding, RowRejectedError
from rest_rl.data.samples import ToolSample, from_json
from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes.api_bank import load_api_bank_training
from rest_rl.data.shapes.chat import in_order_of_calls, load_messages
from rest_rl.data.shapes.toolace import load_toolace, load_xlam, tools_in
from rest_rl.data.shapes.toolrl import load_api_bank, load_toolrl

Loader = Callable[[Mapping[str, Any], str, bool], tuple[list[ToolSample], list[Finding]]]


def load_sample(row: Mapping[str, Any], identity: str, keep_prompts: bool) -> tuple[list[ToolSample], list[Finding]]:
    """One of our own rows; in Parquet its nested fields are JSON text."""
    del keep_prompts
    row = {key: _decoded(row[key], key) for key in row}
    read_tools(row.get("tools"))
    try:
        sample = from_json({"id": identity, **row})
    except ValueError as error:
        raise RowRejectedError("bad_row", str(error)) from error
    messages, found = in_order_of_calls(sample.messages)
    return [replace(sample, messages=tuple(messages))], found


def _decoded(value: Any, key: str) -> Any:
    if key not in ("messages", "tools", "gold") or not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except ValueError as error:
        raise RowRejectedError("bad_row", f"got {key} as text that is not JSON ({error})") from error


SOURCES: dict[str, Loader] = {
    "samples": load_sample,
    "messages": load_messages,
    "toolrl": load_toolrl,
    "toolace": load_toolace,
    "xlam": load_xlam,
    "api_bank": load_api_bank,
    "api_bank_train": load_api_bank_training,
}
"""Loader by name of the shape."""
BENCHMARKS = ("api_bank",)
"""Test sets: their defects are told and left as they are, for every published figure includes them."""


def source_of(row: Mapping[str, Any]) -> str | None:
    """The shape of a row by its keys; None for none that is known."""
    keys = set(row)
    if {"messages", "gold"} <= keys:
        return "samples"
    if {"prompt", "reward_model"} <= keys:
        return "toolrl"
    if {"system", "conversations"} <= keys and not row.get("tools") and tools_in(str(row["system"])):
        return "toolace"
    if keys & {"messages", "conversations", "conversation"}:
        return "messages"
    if {"query", "tools", "answers"} <= keys:
        return "xlam"
    if {"system", "user", "answer"} <= keys:
        return "api_bank"
    if {"instruction", "input"} <= keys and keys & {"output", "expected_output"}:
        return "api_bank_train" if "API-Request" in str(row["instruction"]) else "toolrl"
    return None


def get_loader(source: str) -> Loader:
    """The loader of that name; ValueError for an unknown one."""
    if source not in SOURCES:
        raise ValueError(f"got source {source!r}, expected auto or one of {', '.join(SOURCES)}")
    return SOURCES[source]

"""API-Bank's test samples as ToolRL processed them, in its layout; `answer` is a call or a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import ToolSample
from rest_rl.data.shapes.toolrl import flattened_sample, text_of
from rest_rl.response import Gold, ToolCall

name = "api_bank"


def matches(row: Mapping[str, Any]) -> bool:
    return {"system", "user", "answer"} <= set(row)


def read(row: Mapping[str, Any], context: RowContext) -> list[ToolSample]:
    """All values are text, as published."""
    system, user, answers = text_of(row, "system"), text_of(row, "user"), row.get("answer")
    answers = [answers] if isinstance(answers, Mapping) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise RowRejectedError("bad_gold", f"got answer = {answers!r:.80}, expected a call or a list of calls")
    calls = []
    for answer in answers:
        called, arguments = answer.get("name"), answer.get("parameters")
        if not isinstance(called, str) or not isinstance(arguments, Mapping):
            told = f"got a call of {called!r} with {arguments!r:.80}, expected name and parameters"
            raise RowRejectedError("bad_gold", told)
        calls.append(ToolCall(called, dict(arguments)))
    user = user.removeprefix("*") if user.startswith("***") else user  # a slip in level 2
    return [flattened_sample(context, system, user, Gold(tuple(calls)), kind="api_bank")]

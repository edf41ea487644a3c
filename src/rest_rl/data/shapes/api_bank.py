"""API-Bank's test samples in ToolRL's flattened form; `answer` is a call or a list of calls."""

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
    # Argument values stay text, as published.
    system, user, answers = text_of(row, "system"), text_of(row, "user"), row.get("answer")
    answers = [answers] if isinstance(answers, Mapping) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise RowRejectedError("bad_gold", f"answer is {answers!r:.80}, expected a call or a list of calls")
    calls = []
    for answer in answers:
        called, arguments = answer.get("name"), answer.get("parameters")
        if not isinstance(called, str) or not isinstance(arguments, Mapping):
            problem = (
                f"a call has the name {called!r} and the parameters {arguments!r:.80}, expected text and an object"
            )
            raise RowRejectedError("bad_gold", problem)
        calls.append(ToolCall(called, dict(arguments)))
    user = user.removeprefix("*") if user.startswith("***") else user  # a stray asterisk in level 2
    return [flattened_sample(context, system, user, Gold(tuple(calls)), kind="api_bank")]

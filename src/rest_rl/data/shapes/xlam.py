"""xLAM-function-calling-60k: {query, tools, answers}; the last two are JSON text, with Python's type names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_rl.data.reading import read_literal
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import ToolSample
from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes.toolrl import kind_of, text_of
from rest_rl.response import Gold, ToolCall

name = "xlam"


def matches(row: Mapping[str, Any]) -> bool:
    return {"query", "tools", "answers"} <= set(row)


def read(row: Mapping[str, Any], context: RowContext) -> list[ToolSample]:
    query, answers = text_of(row, "query"), row.get("answers")
    answers = read_literal(answers) if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        raise RowRejectedError("bad_gold", f"answers is {row.get('answers')!r:.80}, expected a JSON list of calls")
    calls = []
    for answer in answers:
        arguments = answer.get("arguments", {}) if isinstance(answer, Mapping) else None
        if not isinstance(arguments, Mapping) or not isinstance(answer.get("name"), str):
            raise RowRejectedError("bad_gold", f"a call is {answer!r:.80}, expected an object with name and arguments")
        calls.append(ToolCall(answer["name"], dict(arguments)))
    gold = Gold(tuple(calls))
    message = {"role": "user", "content": query}
    return [ToolSample(context.id, (message,), read_tools(row.get("tools")), gold, None, kind_of(gold))]

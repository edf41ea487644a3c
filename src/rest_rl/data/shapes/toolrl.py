"""ToolRL's own files (`rlla_sft.json`, the `rlla_4k` parquet) and the API-Bank test samples it made in that layout.

A row is one sample: the dialogue has been cut and flattened into two texts. By default the texts are read back into
messages and tools, so that any chat template can lay them out; with `keep_prompts` they stay as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_rl.data.reasons import Finding, RowRejectedError, finding
from rest_rl.data.samples import ToolSample
from rest_rl.data.shapes.flattened import history_of, tools_of
from rest_rl.formats import get_format
from rest_rl.response import Gold, ToolCall

_THINK, _END = "<think>", "</think>"


def load_toolrl(row: Mapping[str, Any], identity: str, keep_prompts: bool) -> tuple[list[ToolSample], list[Finding]]:
    """The sample of a raw row {instruction, input, output} or of a row of the parquet."""
    if "reward_model" in row:
        system, user = _prompt(row)
        output = _text(row["reward_model"], "ground_truth")
    else:
        system, user, output = (_text(row, key) for key in ("instruction", "input", "output"))
    thought, gold = read_gold(output)
    sample = flattened_sample(identity, system, user, gold, thought, keep_prompts)
    notes = []
    if thought and any(tag in thought for tag in get_format("toolrl").tags):
        notes.append(finding("thought_quotes_tags", f"got a thought that quotes tags: {thought[:60]!r}", identity))
    return [sample], notes


def load_api_bank(row: Mapping[str, Any], identity: str, keep_prompts: bool) -> tuple[list[ToolSample], list[Finding]]:
    """One test sample of API-Bank; `answer` is a call or a list of them, all values text as published."""
    system, user = _text(row, "system"), _text(row, "user")
    answers = row.get("answer")
    answers = [answers] if isinstance(answers, Mapping) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise RowRejectedError("bad_gold", f"got answer = {answers!r:.80}, expected a call or a list of calls")
    calls = tuple(_call(answer.get("name"), answer.get("parameters")) for answer in answers)
    user = user.removeprefix("*") if user.startswith("***") else user  # a slip in level 2
    return [flattened_sample(identity, system, user, Gold(calls), None, keep_prompts, "api_bank")], []


def flattened_sample(
    identity: str, system: str, user: str, gold: Gold, thought: str | None, keep_prompts: bool, kind: str = ""
) -> ToolSample:
    """The sample of two published texts and its gold."""
    tools = tools_of(system)
    kind = kind or kind_of(gold)
    if keep_prompts:
        messages = ({"role": "system", "content": system}, {"role": "user", "content": user})
        return ToolSample(identity, messages, tools, gold, thought, kind, tools_in_prompt=True)
    return ToolSample(identity, tuple(history_of(user)), tools, gold, thought, kind)


def kind_of(gold: Gold) -> str:
    """`answer` for no call, `single` for one, `parallel` for several."""
    return ("answer", "single", "parallel")[min(len(gold.calls), 2)]


def read_gold(output: str) -> tuple[str | None, Gold]:
    """(thought, gold) of a demonstration; RowRejectedError `bad_gold` unless every line of its calls can be read.

    The thought ends at the last `</think>`: many a thought quotes the tags, and blocks in it are no gold.
    """
    end = output.rfind(_END)
    if not output.lstrip().startswith(_THINK) or end < 0:
        raise RowRejectedError("bad_gold", f"got {output[:60]!r}, expected a think block first")
    thought = output[: output.rfind(_END)].lstrip().removeprefix(_THINK).strip()
    parsed = get_format("toolrl").parse(f"{_THINK}{_END}{output[end + len(_END) :]}", spans=False)
    if not parsed.well_formed or parsed.unreadable_calls:
        raise RowRejectedError("bad_gold", "; ".join(parsed.problems) or "got a demonstration that is not well formed")
    return thought or None, Gold(parsed.calls, parsed.answer or None)


def _call(name: Any, arguments: Any) -> ToolCall:
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise RowRejectedError(
            "bad_gold", f"got a call of {name!r} with {arguments!r:.80}, expected name and parameters"
        )
    return ToolCall(name, dict(arguments))


def _prompt(row: Mapping[str, Any]) -> tuple[str, str]:
    messages = row.get("prompt")
    texts = [_text(message, "content") for message in messages] if isinstance(messages, (list, tuple)) else []
    if len(texts) != 2:
        raise RowRejectedError("bad_row", f"got {len(texts)} messages, expected a system and a user message")
    return texts[0], texts[1]


def _text(row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, str):
        raise RowRejectedError("bad_row", f"got {key} of type {type(value).__name__}, expected text")
    return value

"""API-Bank as processed by ToolRL: 597 prompts in three levels with one gold call each, scored by two metrics.

`soft` is the published metric (https://github.com/qiancheng0/ToolRL, benchmarks/API-Bank) with all its quirks: any line
of the response may be the gold call, tags are not required, an object without a name counts as the arguments of the
right tool, and a JSON number, boolean or null on a line ends the search. `strict` requires exactly one call in the
model's format, with the right name and arguments. The gold stores every value as text, so `strict` accepts 5 for "5".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.data.gold import check_against_tools
from rest_rl.data.reading import read_literal
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import ToolSample
from rest_rl.data.shapes import api_bank
from rest_rl.data.shapes.toolrl import FORMAT
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Benchmark, Reply, SingleTurn
from rest_rl.formats import ToolFormat
from rest_rl.formats.opened_think import THINK_SUFFIX
from rest_rl.jsonl import describe_os_error
from rest_rl.response import ParsedResponse, ToolCall
from rest_rl.rewards import json_equal

LEVELS = {1: 399, 2: 67, 3: 131}
"""Published number of samples per level; ten samples of level 1 are exact duplicates of others."""
UNSATISFIABLE = ("unknown_tool", "undocumented_argument")
"""Defects of a gold call; no correct use of the prompt's tools can match a call with one of them."""


class ApiBankSample(NamedTuple):
    """A sample, its published gold call (`answer`), and a `defect` if no correct use of the tools can match it."""

    level: int
    sample: ToolSample
    answer: Mapping[str, Any]
    defect: str


class ApiBank(Benchmark):
    """The API-Bank benchmark, read from level-1-, level-2- and level-3-api_processed.json in one folder."""

    name = "api_bank"
    metrics = ("soft", "strict")
    group_field = "level"

    def __init__(self, folder: str | Path, *, keep_prompts: bool) -> None:
        """Read the samples in `folder`. Raises UserError if a file is missing or invalid.

        With `keep_prompts` the model gets the published prompt texts. Otherwise its chat template renders the prompts.
        """
        digest = hashlib.sha256()
        self.items: dict[str, ApiBankSample] = {}
        for level in LEVELS:
            for index, row in enumerate(read_rows(Path(folder), level, digest)):
                identity = f"Level{level}_{index}"
                self.items[identity] = read_api_bank_sample(row, identity, level, keep_prompts)
        number = f"{len(self.items)} samples, sha256 {digest.hexdigest()[:12]}"
        self.pin = f"API-Bank as processed by ToolRL ({number})"
        self.groups = {identity: item.level for identity, item in self.items.items()}

    def start(self, identity: str, tool_format: ToolFormat) -> SingleTurn:
        item = self.items[identity]
        is_published = tool_format.name.removesuffix(THINK_SUFFIX) == FORMAT
        judge = partial(judge_response, item=item, is_published=is_published)
        return SingleTurn(item.sample, tool_format, judge)

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return `ceilings`: the highest accuracy that correct tool use can reach per level, and the defects."""
        del rows
        ceilings = {}
        for level in LEVELS:
            items = {identity: item for identity, item in self.items.items() if item.level == level}
            defects = {identity: item.defect for identity, item in items.items() if item.defect}
            if items:
                ceilings[f"Level{level}"] = {"accuracy": 1 - len(defects) / len(items), "ids": defects}
        return {"ceilings": ceilings}


def judge_response(reply: Reply, parsed: ParsedResponse, item: ApiBankSample, is_published: bool) -> Mapping[str, Any]:
    """Return the verdicts `soft` and `strict`, and as `reason` why `strict` failed (empty if it did not)."""
    # the published metric parses the text; responses in other formats are converted to its notation first
    reads_text = is_published and reply.calls is None
    lines = parse_published_calls(reply.text) if reads_text else to_published_calls(parsed, item.answer)
    problem = find_strict_problem(parsed, item.answer)
    return {"soft": soft_match(lines, item.answer), "strict": not problem, "reason": problem}


def read_rows(folder: Path, level: int, digest: Any) -> list[Any]:
    path = folder / f"level-{level}-api_processed.json"
    try:
        content = path.read_bytes()
        rows = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        remedy = "pass the folder with ToolRL's level-1-, level-2- and level-3-api_processed.json as --data"
        raise UserError(
            f"cannot read {path} ({describe_os_error(error)})", "a JSON list of API-Bank samples", remedy
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"{path} contains {type(rows).__name__}", "a list of samples", "restore the file")
    digest.update(content)
    return rows


def read_api_bank_sample(row: Any, identity: str, level: int, keep_prompts: bool) -> ApiBankSample:
    if not isinstance(row, Mapping):
        raise UserError(f"{identity} has type {type(row).__name__}", "an object", "restore the file")
    try:
        (sample,) = api_bank.read(row, RowContext(identity, keep_prompts))
    except RowRejectedError as error:
        raise UserError(f"cannot read {identity} ({error})", "the published sample", "restore the file") from error
    found = check_against_tools(sample)[1]
    defect = "; ".join(f"{problem.reason}: {problem.detail}" for problem in found if problem.reason in UNSATISFIABLE)
    answer = row["answer"]
    return ApiBankSample(level, sample, answer[0] if isinstance(answer, list) else answer, defect)


# The soft metric reproduces the published script, bug for bug, so that scores are comparable with the paper. The script
# takes the text after the last <tool_call> up to the next </tool_call> (the whole response if there is no tag), tries
# json.loads on each line, and compares each parsed line with the gold until one matches.
def parse_published_calls(text: str) -> list[Any]:
    """Parse the lines of a response that are JSON; the published script compares each with the gold call."""
    block = text.strip().split("<tool_call>")[-1].split("</tool_call>")[0]
    found = []
    for line in block.strip().split("\n"):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):  # noqa: PERF203 - lines of prose fail at their first character
            continue
    return found


def to_published_calls(parsed: ParsedResponse, answer: Mapping[str, Any]) -> list[Any]:
    """Convert parsed calls to the notation of the published script, `{"name": ..., "parameters": ...}`.

    If the response's format writes all values as text, a value that matches the gold is replaced by the gold's text.
    """
    gold = answer["parameters"] if parsed.text_values else {}
    return [
        {
            "name": call.name,
            "parameters": {
                name: gold[name] if name in gold and matches_gold_value(value, gold[name]) else value
                for name, value in call.arguments.items()
            },
        }
        for call in parsed.calls
    ]


def soft_match(calls: Sequence[Any], answer: Mapping[str, Any]) -> bool:
    for line in calls:
        try:
            call = json.loads(line) if isinstance(line, str) else line
            # quirk: anything without both keys, even a text or a list, counts as the arguments of the right tool
            is_named = "name" in call and "parameters" in call
            name, arguments = (call["name"], call["parameters"]) if is_named else (answer["name"], call)
            if name == answer["name"] and arguments == answer["parameters"]:
                return True
        except (TypeError, ValueError, RecursionError):  # noqa: PERF203 - quirk: a number or null ends the search
            return False
    return False


def find_strict_problem(parsed: ParsedResponse, answer: Mapping[str, Any]) -> str:
    """Return why the response is not exactly the gold call (`answer`), or an empty text if it is."""
    if parsed.unreadable_calls:
        return f"unreadable call: {'; '.join(parsed.problems)[:200]}"
    if len(parsed.calls) != 1:
        return f"{len(parsed.calls)} calls, expected one"
    call = parsed.calls[0]
    if call.name != answer["name"]:
        return f"name {call.name[:80]!r}, expected {answer['name']!r}"
    return find_arguments_problem(call, answer["parameters"])


def find_arguments_problem(call: ToolCall, gold: Mapping[str, Any]) -> str:
    """Return the first difference between a call's arguments and the gold arguments, or an empty text."""
    if missing := [name for name in gold if name not in call.arguments]:
        return f"missing arguments {missing}"
    if extra := [name for name in call.arguments if name not in gold]:
        return f"extra arguments {[name[:80] for name in extra[:5]]}"
    for name, value in gold.items():
        if not matches_gold_value(call.arguments[name], value):
            return f"{name} = {call.arguments[name]!r:.80}, expected {value!r:.80}"
    return ""


def matches_gold_value(value: Any, gold: Any) -> bool:
    """Return whether a value equals the gold value, or the JSON value or Python literal in the gold's text."""
    if json_equal(value, gold) or isinstance(value, str) or not isinstance(gold, str):
        return json_equal(value, gold)
    if value is None:  # `read_literal` also returns None for text that is not a literal
        return gold.strip() in ("null", "None")
    return json_equal(value, read_literal(gold))

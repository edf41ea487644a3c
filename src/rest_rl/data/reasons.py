"""The reasons why a row is rejected, repaired or noted: one table with the meaning and the remedy of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rest_rl.errors import UserError

Severity = Literal["rejected", "repaired", "noted"]


class Reason(NamedTuple):
    """A kind of finding; `rejected` removes the sample, `repaired` changes it, and `noted` leaves it unchanged."""

    severity: Severity
    meaning: str
    remedy: str


REASONS: dict[str, Reason] = {
    # problems of the row itself
    "not_json": Reason("rejected", "the text is not JSON", "fix the row; in JSONL, every line is one complete object"),
    "not_an_object": Reason("rejected", "the JSON is not an object", "write each row as a JSON object"),
    "not_a_number": Reason("rejected", "the row contains NaN or an infinity", "write null or a finite number"),
    "encoding": Reason("rejected", "the bytes are not UTF-8", "convert the file: iconv -f ENCODING -t UTF-8 FILE"),
    "too_deep": Reason(
        "rejected", "JSON nested deeper than 64 levels", "flatten it; the same limit applies to model responses"
    ),
    "row_too_long": Reason("rejected", "the row is longer than 8 MiB", "shorten or split the row"),
    "truncated": Reason("rejected", "the file is incomplete or damaged", "download or write the file again"),
    "unknown_shape": Reason(
        "rejected", "the row has no known shape", "rename its keys, or name the shape with --source"
    ),
    "mixed_shapes": Reason(
        "noted", "the shape differs from that of the first row", "if this is a mistake, set the shape with --source"
    ),
    "null_padding": Reason(
        "repaired",
        "a columnar file added null fields to objects",
        "nothing to do; to avoid it, store arguments and tools as JSON text",
    ),
    # problems found while a row shape reads the row
    "bad_row": Reason("rejected", "a field is missing or has the wrong type", "fix the field"),
    "bad_tool_schema": Reason(
        "rejected",
        "a tool has no valid schema",
        'write {"name", "description", "parameters": {"type": "object", "properties": {...}}}',
    ),
    "bad_gold": Reason("rejected", "the calls of the gold turn cannot be read", "fix the calls or the markup"),
    "bad_history": Reason("rejected", "the earlier turns cannot be separated", "fix the turns, or pass --keep-prompts"),
    "bad_turn": Reason("rejected", "a message cannot be read", "fix the message"),
    "broken_history": Reason("rejected", "an earlier message cannot be read", "fix the earlier message"),
    "no_assistant_turn": Reason("rejected", "the dialogue has no assistant turn", "add the turn to train on"),
    "empty_prompt": Reason("rejected", "nothing comes before the assistant turn", "start with a user message"),
    "empty_turn": Reason("rejected", "the assistant turn has neither calls nor text", "add the calls or the answer"),
    "arguments_as_python": Reason(
        "repaired", "arguments are written as a Python dict", "write JSON: double quotes, true, false and null"
    ),
    "call_as_text": Reason(
        "repaired", "calls are written into the text of a turn", "move them to tool_calls; keep only text in content"
    ),
    "tools_in_system": Reason(
        "repaired",
        "the system message describes the tools (Hermes or Qwen style)",
        "remove the description; the chat template adds its own",
    ),
    "tools_twice": Reason(
        "noted", "tools are listed both in the row and in <tools> of the system message", "remove one of the two lists"
    ),
    "results_reordered": Reason(
        "repaired", "tool results come in another order than their calls", "sort them into the order of the calls"
    ),
    "orphan_result": Reason("noted", "a tool result matches no call of the preceding turn", "fix its tool_call_id"),
    "missing_result": Reason("noted", "a call has no result although the dialogue continues", "add the result"),
    "weight_zero": Reason(
        "noted", "the assistant turn has weight 0 and is not trained on", "to train on it, set its weight to 1"
    ),
    "unquoted_value": Reason("repaired", "values of a call are not quoted", "quote the values"),
    "thought_quotes_tags": Reason(
        "noted", "the reasoning quotes tags of the format", "rephrase it before supervised fine-tuning"
    ),
    "not_laid_out": Reason(
        "rejected",
        "the chat template or the format cannot represent the sample",
        "fix the row, or choose a model or format that can represent it",
    ),
    "beyond_context": Reason(
        "rejected",
        "the prompt leaves too little of the context length for a response",
        "shorten the prompt, lower trl.max_completion_length, or use a model with a longer context",
    ),
    "control_token_in_gold": Reason(
        "rejected", "the gold contains a special token, which no response can contain", "remove the token"
    ),
    # problems of the gold, compared with the tools
    "unknown_tool": Reason("rejected", "the gold turn calls an unknown tool", "add the tool or fix the name"),
    "undocumented_argument": Reason(
        "rejected", "a gold call has an argument that the schema lacks", "add it to the schema or fix its name"
    ),
    "missing_argument": Reason(
        "rejected", "a gold call leaves out a required argument", "add the argument, or remove it from required"
    ),
    "number_as_string": Reason(
        "repaired", "a number or boolean is stored as text", "store it with the type that the schema gives"
    ),
    "json_as_string": Reason(
        "repaired", "an array or object is stored as text", "store it with the type that the schema gives"
    ),
    "broken_value": Reason("rejected", "the text of an array or object is incomplete", "complete the value"),
    "wrong_type": Reason("noted", "the type of a value differs from the schema", "fix the value or the schema"),
    "not_in_enum": Reason("rejected", "a value is not in the enum of the schema", "fix the value or the enum"),
    "breaks_schema": Reason("noted", "a value breaks another rule of the schema", "fix the value or the schema"),
    "duplicate_tool": Reason("rejected", "two different tools have the same name", "rename or remove one of them"),
    "control_token_in_prompt": Reason(
        "rejected",
        "the text spells a special token, which the tokenizer would treat as one",
        "remove it, or pass --allow control_token_in_prompt if you want it",
    ),
    # problems of the sample, compared with other samples and with limits
    "duplicate": Reason("rejected", "an earlier sample has the same prompt and gold", "remove one of them"),
    "other_gold": Reason("noted", "an earlier sample has this prompt but another gold turn", "keep only the right one"),
    "leak": Reason("rejected", "the test file contains the same prompt", "remove it from one of the two files"),
    "prompt_too_long": Reason(
        "rejected", "the prompt is longer than the limit", "shorten the prompt or raise --max-prompt-tokens"
    ),
}

ALLOWABLE_REASONS = tuple(REASONS)[tuple(REASONS).index("unknown_tool") :]
"""Reasons that concern a readable sample (`unknown_tool` and all after it in REASONS); `--allow` makes them notes."""


class RowFinding(NamedTuple):
    """A finding in a row; `sample` is the id of the affected sample, or None if the finding concerns the whole row."""

    reason: str
    detail: str
    severity: Severity
    sample: str | None = None


def make_finding(reason: str, detail: str, sample: str | None = None, allow: Iterable[str] = ()) -> RowFinding:
    """Return a finding with the severity that REASONS has for the reason, or `noted` if `allow` contains the reason."""
    severity: Severity = "noted" if reason in allow else REASONS[reason].severity
    shown = " ".join(detail.split())[:400].encode(errors="replace").decode()  # lone surrogates cannot be printed
    return RowFinding(reason, shown, severity, sample)


class RowRejectedError(UserError):
    """Raised by a row shape for a row that gives no sample; `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail, remedy=REASONS[reason].remedy)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


@dataclass
class RowContext:
    """The id and settings of a row, passed to a row shape with the row; the shape adds its findings with `note`."""

    id: str
    """Id of the row's sample, or the prefix of the ids of its samples."""
    keep_prompts: bool = False
    """Whether published prompts stay word for word."""
    findings: list[RowFinding] = field(default_factory=list)

    def note(self, reason: str, detail: str, sample: str | None = None) -> None:
        """Add a finding; `reason` is a key of REASONS, which defines the severity."""
        self.findings.append(make_finding(reason, detail, sample))

"""Everything that can be said of a row: one table of reasons, each with what it does to the row and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rest_rl.errors import UserError

Severity = Literal["rejected", "repaired", "noted"]


class Reason(NamedTuple):
    """What a finding means: `rejected` costs a sample, `repaired` has changed one, `noted` leaves it as it is."""

    severity: Severity
    meaning: str
    remedy: str


REASONS: dict[str, Reason] = {
    # the row itself
    "not_json": Reason("rejected", "text that is not JSON", "correct the row; JSONL holds one whole object per line"),
    "not_an_object": Reason("rejected", "JSON that is no object", "write each row as an object"),
    "not_a_number": Reason("rejected", "NaN or an infinity", "write null or a number"),
    "encoding": Reason("rejected", "bytes that are not UTF-8", "convert the file: iconv -f ENCODING -t UTF-8 FILE"),
    "too_deep": Reason("rejected", "JSON nested deeper than 64 levels", "flatten it; no response may be deeper either"),
    "row_too_long": Reason("rejected", "a row of over 8 MiB", "shorten or split the row"),
    "truncated": Reason("rejected", "a file that breaks off or is damaged", "download or write the file again"),
    "unknown_shape": Reason("rejected", "a row of no known shape", "rename the keys, or name the shape with --source"),
    "mixed_shapes": Reason(
        "noted", "a row of another shape than the first one", "name one shape with --source if the row is a stray"
    ),
    "null_padding": Reason(
        "repaired", "nulls that a columnar file adds to every object", "keep arguments and tools as JSON text columns"
    ),
    # what a loader reads in it
    "bad_row": Reason("rejected", "a field that is missing or of the wrong type", "correct the field"),
    "bad_tool_schema": Reason(
        "rejected",
        "a tool schema that is no schema",
        'write {"name", "description", "parameters": {"type": "object", "properties": {...}}}',
    ),
    "bad_gold": Reason(
        "rejected", "a demonstration whose calls cannot be read", "correct the calls of the demonstration"
    ),
    "bad_history": Reason(
        "rejected", "earlier turns that cannot be told apart", "correct the turns, or --keep-prompts"
    ),
    "bad_turn": Reason("rejected", "a message that cannot be read", "correct the message"),
    "broken_history": Reason("rejected", "a turn after a message that cannot be read", "correct the earlier message"),
    "no_assistant_turn": Reason("rejected", "a dialogue without an assistant turn", "add the turn to learn"),
    "empty_prompt": Reason("rejected", "an assistant turn with nothing before it", "start with a user message"),
    "empty_turn": Reason("rejected", "an assistant turn with neither calls nor text", "add what should be said"),
    "arguments_as_python": Reason(
        "repaired", "arguments written as a Python dict", "write them as JSON; single quotes and True are no JSON"
    ),
    "call_as_text": Reason(
        "repaired", "a turn that writes its calls into its text", "write calls as tool_calls, and only text as content"
    ),
    "tools_in_system": Reason(
        "repaired", "a system text that describes the tools as Hermes or Qwen do", "leave it to the chat template"
    ),
    "tools_twice": Reason(
        "noted", "a system text that lists tools in <tools> besides the tools of the row", "take one of them out"
    ),
    "results_reordered": Reason(
        "repaired", "tool results whose ids show another order than their calls", "write them in the order of the calls"
    ),
    "orphan_result": Reason("noted", "a tool result that answers no call of the turn before it", "correct its id"),
    "missing_result": Reason("noted", "a call without a result in a dialogue that goes on", "add the result"),
    "weight_zero": Reason("noted", "an assistant turn of weight 0, which is not to be learnt", "raise its weight"),
    "unquoted_value": Reason("repaired", "a call whose values stand without quotes", "quote the values"),
    "thought_quotes_tags": Reason(
        "noted", "a thought that quotes the tags of the format", "rephrase it before supervised fine-tuning"
    ),
    "not_laid_out": Reason(
        "rejected",
        "a sample that the model's chat template or format cannot hold",
        "correct the row, or take a model or format that can",
    ),
    "beyond_context": Reason(
        "rejected",
        "a prompt that leaves no room for a response in the model's context",
        "shorten the prompt, lower trl.max_completion_length, or take a model with a longer context",
    ),
    "control_token_in_gold": Reason(
        "rejected", "a gold with a special token of the tokenizer, which no response can have", "take it out"
    ),
    # the gold against the tools
    "unknown_tool": Reason("rejected", "a call of a tool that is not offered", "add the tool or correct the name"),
    "undocumented_argument": Reason(
        "rejected", "an argument that the tool's schema does not have", "add it to the schema or correct its name"
    ),
    "missing_argument": Reason(
        "rejected", "a required argument that the call leaves out", "add it, or take it off the required ones"
    ),
    "number_as_string": Reason(
        "repaired", "a number or boolean stored as text against the schema", "store it as the schema says"
    ),
    "json_as_string": Reason(
        "repaired", "an array or object stored as text against the schema", "store it as the schema says"
    ),
    "broken_value": Reason(
        "rejected", "the beginning of an array or object as text, where one is due", "complete the value"
    ),
    "wrong_type": Reason("noted", "a value of another type than the schema's", "correct the value or the schema"),
    "not_in_enum": Reason("rejected", "a value that the schema's enum does not have", "correct the value or the enum"),
    "breaks_schema": Reason("noted", "a value that breaks another rule of the schema", "correct one of them"),
    "duplicate_tool": Reason("rejected", "two different tools of one name", "rename or remove one of them"),
    "control_token_in_prompt": Reason(
        "rejected",
        "a text that spells a special token of the tokenizer, which would act as one",
        "take it out, or --allow it if it is meant",
    ),
    # the sample among the others
    "duplicate": Reason("rejected", "the same prompt and gold as an earlier sample", "remove one of them"),
    "other_gold": Reason("noted", "the same prompt as an earlier sample with another gold", "decide for one of them"),
    "leak": Reason("rejected", "a prompt that the test file holds as well", "take it out of one of the files"),
    "prompt_too_long": Reason("rejected", "a prompt over the limit", "raise --max-prompt-tokens or shorten the prompt"),
}

ALLOWABLE_REASONS = tuple(REASONS)[tuple(REASONS).index("unknown_tool") :]
"""Reasons about a sample that exists: these can be kept."""


class RowFinding(NamedTuple):
    """One thing found in a row; `sample` is the id of the sample that it concerns, if it concerns one."""

    reason: str
    detail: str
    severity: Severity
    sample: str | None = None


def make_finding(reason: str, detail: str, sample: str | None = None, allow: Iterable[str] = ()) -> RowFinding:
    """A finding with the severity of its reason, or `noted` for a reason in `keep`."""
    severity: Severity = "noted" if reason in allow else REASONS[reason].severity
    shown = " ".join(detail.split())[:400].encode(errors="replace").decode()  # lone surrogates cannot be printed
    return RowFinding(reason, shown, severity, sample)


class RowRejectedError(UserError):
    """No sample can be read from a row; `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail, "a row of its shape", REASONS[reason].remedy)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


@dataclass
class RowContext:
    """What a row shape gets with the row, and where it records its findings."""

    id: str
    """The id of the row's sample, or the beginning of its samples' ids."""
    keep_prompts: bool = False
    """Published prompts stay word for word."""
    findings: list[RowFinding] = field(default_factory=list)

    def note(self, reason: str, detail: str, sample: str | None = None) -> None:
        """Add a finding; `reason` is a key of REASONS and decides what happens to the row."""
        self.findings.append(make_finding(reason, detail, sample))

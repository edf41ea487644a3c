"""Every row of a data file accounted for: kept, repaired or rejected, with its number and the reasons.

`checked_rows` streams; memory holds one row and 16 to 32 bytes per sample seen (digests that find duplicates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rest_rl.data.mask import masked
from rest_rl.data.reading import Row, RowError, RowReader, load_json, read_literal
from rest_rl.data.reasons import KEEPABLE, REASONS, Finding, RowRejectedError, check_keep, finding
from rest_rl.data.samples import DigestSet, ToolSample, digest_of, gold_digest, leak_digest, prompt_digest
from rest_rl.data.shapes import BENCHMARKS, SOURCES, get_loader, source_of
from rest_rl.errors import UserError
from rest_rl.response import Gold, ToolCall

_OTHER_KEYS = {
    "patternProperties", "propertyNames", "unevaluatedProperties", "dependentSchemas",
    "anyOf", "oneOf", "allOf", "if", "then", "else", "$ref", "$dynamicRef",
}  # fmt: skip
"""Words of JSON schema that may allow arguments beside `properties`."""
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
"""What a tool without parameters takes."""
_PYTHON_WORDS = {"True": True, "False": False}


def checked_gold(sample: ToolSample, keep: Iterable[str]) -> tuple[ToolSample, list[Finding]]:
    """The sample, its values of the schema's types where text spelt them exactly, and what was found.

    Reasons in `keep` are noted and change nothing.
    """
    if not sample.gold.calls:
        problems = [] if sample.gold.answer else [finding("empty_turn", "got neither calls nor text", sample.id, keep)]
        return sample, problems
    functions = map(_function, sample.tools)
    schemas = {function["name"]: function.get("parameters", _NO_ARGUMENTS) or {} for function in functions}
    found: list[Finding] = []
    calls = []
    for call in sample.gold.calls:
        if call.name not in schemas:
            offered = ", ".join(schemas) or "none"
            found.append(finding("unknown_tool", f"got {call.name!r}, offered are {offered}", sample.id, keep))
            calls.append(call)
            continue
        arguments, problems = _checked_arguments(call, schemas[call.name], frozenset(keep))
        found += [finding(reason, f"{call.name}: {detail}", sample.id, keep) for reason, detail in problems]
        calls.append(ToolCall(call.name, arguments))
    return replace(sample, gold=Gold(tuple(calls), sample.gold.answer)), found


def with_repaired_history(sample: ToolSample, repaired: Mapping[int, Gold]) -> ToolSample:
    """The sample with the repaired golds of earlier turns, by their position, in its history too.

    Otherwise its prompt would show calls in the form that was repaired.
    """
    changed = {
        at: _with_calls_of(sample.messages[at], gold) for at, gold in repaired.items() if at < len(sample.messages)
    }
    messages = tuple(changed.get(at, message) for at, message in enumerate(sample.messages))
    return replace(sample, messages=messages) if changed else sample


def _with_calls_of(message: Mapping[str, Any], gold: Gold) -> dict[str, Any]:
    pairs = zip(message["tool_calls"], gold.calls, strict=True)
    calls = [{**call, "function": {"name": new.name, "arguments": dict(new.arguments)}} for call, new in pairs]
    return {**message, "tool_calls": calls}


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool.get("function", tool)


def _checked_arguments(
    call: ToolCall, schema: Mapping[str, Any], keep: frozenset[str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    arguments = dict(call.arguments)
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for name, value in arguments.items():
            if name in properties:
                arguments[name], problem = _checked_value(value, properties[name], name, keep)
                problems += problem
            elif schema.get("additionalProperties") in (None, False) and not _OTHER_KEYS & set(schema):
                known = ", ".join(properties) or "none"
                problems.append(("undocumented_argument", f"got {name!r}, documented are {known}"))
    problems += [
        ("missing_argument", f"got no {name!r}, which is required")
        for name in _list(schema.get("required"))
        if name not in arguments
    ]
    if not all(map(_is_finite, arguments.values())):
        problems.append(("not_a_number", "got NaN or an infinity as a value"))
    return arguments, problems


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _checked_value(value: Any, schema: Any, name: str, keep: frozenset[str]) -> tuple[Any, list[tuple[str, str]]]:
    schema = schema if isinstance(schema, Mapping) else {}
    if _has_type(value, schema) or value in _list(schema.get("enum")):
        return value, list(_outside_enum(value, schema, name))
    shown = f"got {name} = {value!r:.80}, the schema says {schema.get('type')}"
    spelt = _spelt(value) if isinstance(value, str) else None
    if spelt is None or not _has_type(spelt, schema):
        return value, [("broken_value" if _is_fragment(value, spelt) else "wrong_type", shown)]
    reason = "json_as_string" if isinstance(spelt, (list, dict)) else "number_as_string"
    return (value if reason in keep else spelt), [(reason, shown), *_outside_enum(spelt, schema, name)]


def _outside_enum(value: Any, schema: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """For a value, and each one inside it, that its enum does not have; null is left out and fits every schema."""
    enum, items, properties = (schema.get(key) for key in ("enum", "items", "properties"))
    if value is not None and isinstance(enum, list) and enum and value not in enum:
        yield "not_in_enum", f"got {name} = {value!r:.80}, the enum has {', '.join(map(str, enum))}"
    if isinstance(value, (list, tuple)) and isinstance(items, Mapping):
        for number, item in enumerate(value):
            yield from _outside_enum(item, items, f"{name}[{number}]")
    if isinstance(value, Mapping) and isinstance(properties, Mapping):
        for key in value:
            if isinstance(properties.get(key), Mapping):
                yield from _outside_enum(value[key], properties[key], f"{name}.{key}")


def _spelt(text: str) -> Any:
    """The number, boolean, array or object that a text spells, with no white space around it; None for another.

    Arrays and objects may be written as Python's.
    """
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        value = load_json(text) if text == text.strip() else None
    except ValueError:
        value = read_literal(text) if text.startswith(("[", "{", "(")) else None
    return None if isinstance(value, str) or not _is_finite(value) else value


def _is_fragment(value: Any, spelt: Any) -> bool:
    """Whether a value is text that begins as an array or object and does not end as one."""
    return isinstance(value, str) and spelt is None and value.lstrip().startswith(("[", "{"))


def _has_type(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has one of the schema's types; a schema without types takes all, and so does null."""
    names = schema.get("type")
    names = [names] if isinstance(names, str) else names
    if not names or value is None:
        return True
    return any(_is(value, name) for name in names)


def _is(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (name == "number" or isinstance(value, int) or value.is_integer())
    kinds: dict[str, type | tuple[type, ...]] = {
        "string": str, "boolean": bool, "array": (list, tuple), "object": Mapping, "null": type(None)
    }  # fmt: skip
    return isinstance(value, kinds[name]) if name in kinds else True


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, (list, tuple)) else True


Status = Literal["kept", "repaired", "rejected"]
MAX_FINDINGS = 1000
FIRST_ROWS = 5


@dataclass(frozen=True)
class CheckConfig:
    """How a file is read and checked."""

    source: str = "auto"
    """Shape of the rows, one of SOURCES; `auto` tells it from the keys of each row."""
    keep_prompts: bool = False
    """Published prompts stay word for word, with the tools they describe (ToolRL, API-Bank, ToolACE)."""
    keep: tuple[str, ...] = ()
    """Reasons that are only noted: nothing is rejected or repaired for them."""
    mask_names: float = 0.0
    """Share of the samples whose tool and argument names become random strings (Hammer, arXiv 2410.04587)."""
    seed: int = 0
    """Seed of the masking."""
    max_prompt_tokens: int = 0
    """Longer prompts are rejected; 0 for no limit."""

    def __post_init__(self) -> None:
        """ValueError for values that no run can use."""
        if self.source != "auto":
            get_loader(self.source)
        check_keep(self.keep)
        if not 0 <= self.mask_names <= 1:
            raise UserError(f"mask_names {self.mask_names}", "a share in [0, 1]", "0 masks nothing")
        if self.mask_names and self.keep_prompts:
            raise UserError("mask_names with keep_prompts", "one of them", "kept texts hold the names")
        if self.max_prompt_tokens < 0:
            raise UserError(f"max_prompt_tokens {self.max_prompt_tokens}", "a number >= 0", "0 is no limit")


class CheckedRow(NamedTuple):
    """A row, the samples it gives and what was found; `raw` is the row as read, or the beginning of its text."""

    file: str
    number: int
    status: Status
    source: str
    samples: tuple[ToolSample, ...]
    findings: tuple[Finding, ...]
    raw: Any


def outcome(row: CheckedRow, found: Finding) -> str:
    """What a finding did: `row rejected`, `turn rejected` (the row keeps others), `repaired` or `noted`."""
    if found.severity != "rejected":
        return found.severity
    return "row rejected" if row.status == "rejected" else "turn rejected"


class Located(NamedTuple):
    """A finding with its file and row."""

    file: str
    row: int
    finding: Finding


@dataclass
class Report:
    """Counts over a file; `reasons` counts rows, each once per reason, and rows == kept + repaired + rejected."""

    rows: int = 0
    kept: int = 0
    repaired: int = 0
    rejected: int = 0
    samples: int = 0
    lost_turns: int = 0
    """Rows that give samples and lost a turn; they count as repaired."""
    reasons: dict[str, int] = field(default_factory=dict)
    occurrences: dict[str, int] = field(default_factory=dict)
    first_rows: dict[str, list[int]] = field(default_factory=dict)
    outcomes: dict[str, set[str]] = field(default_factory=dict)
    """What became of rows or turns for a reason, in the words of `outcome`."""
    sources: dict[str, int] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    findings: list[Located] = field(default_factory=list)
    findings_left_off: int = 0

    def add(self, row: CheckedRow) -> None:
        """Count one row."""
        self.rows += 1
        setattr(self, row.status, getattr(self, row.status) + 1)
        self.samples += len(row.samples)
        self.lost_turns += bool(row.samples) and any(found.severity == "rejected" for found in row.findings)
        self.files.add(row.file)
        if row.source:
            self.sources[row.source] = self.sources.get(row.source, 0) + 1
        for found in row.findings:
            self.outcomes.setdefault(found.reason, set()).add(outcome(row, found))
            self.occurrences[found.reason] = self.occurrences.get(found.reason, 0) + 1
            if len(self.findings) < MAX_FINDINGS:
                self.findings.append(Located(row.file, row.number, found))
            else:
                self.findings_left_off += 1
        for reason in {found.reason for found in row.findings}:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            first = self.first_rows.setdefault(reason, [])
            first += [row.number] if len(first) < FIRST_ROWS else []

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "repaired": self.repaired,
            "rejected": self.rejected,
            "samples": self.samples,
            "lost_turns": self.lost_turns,
            "reasons": {reason: self.reasons[reason] for reason in REASONS if reason in self.reasons},
            "occurrences": {reason: self.occurrences[reason] for reason in REASONS if reason in self.occurrences},
            "first_rows": {reason: self.first_rows[reason] for reason in REASONS if reason in self.first_rows},
            "source": self.sources,
            "findings": [
                {"file": file, "row": row, **found._asdict(), "remedy": REASONS[found.reason].remedy}
                for file, row, found in self.findings
            ],
            "findings_left_off": self.findings_left_off,
        }


def read_checked(
    path: str,
    config: CheckConfig | None = None,
    *,
    prompt_tokens: Callable[[ToolSample], int] | None = None,
    refusal: Callable[[ToolSample], str | None] | None = None,
    test_prompts: Collection[int] | DigestSet = frozenset(),
) -> tuple[list[ToolSample], Report]:
    """All samples of a file, and the report; see `checked_rows`."""
    report, samples = Report(), []
    for row in checked_rows(path, config, prompt_tokens=prompt_tokens, refusal=refusal, test_prompts=test_prompts):
        report.add(row)
        samples += row.samples
    return samples, report


def prompts_of(path: str, config: CheckConfig | None = None) -> DigestSet:
    """Digests of all prompts of a test file, for `test_prompts`; its histories are repaired as the config says."""
    prompts = DigestSet()
    config = config or CheckConfig()
    keep = tuple(reason for reason in KEEPABLE if reason in config.keep or REASONS[reason].severity != "repaired")
    everything = replace(config, keep=keep, mask_names=0.0, max_prompt_tokens=0, source="auto")
    for row in checked_rows(path, everything):
        for sample in row.samples:
            prompts.add(leak_digest(sample))
    return prompts


def checked_rows(
    path: str | RowReader,
    config: CheckConfig | None = None,
    *,
    prompt_tokens: Callable[[ToolSample], int] | None = None,
    refusal: Callable[[ToolSample], str | None] | None = None,
    test_prompts: Collection[int] | DigestSet = frozenset(),
) -> Iterator[CheckedRow]:
    """Each row of a file with its samples and findings, in order.

    `prompt_tokens` counts the tokens of a prompt (needed for `max_prompt_tokens`), `refusal` tells why a model cannot
    be given a sample (None if it can), and `test_prompts` are the digests of `prompts_of`. ValueError for an input
    that does not exist; a row that cannot be read is a finding.
    """
    config = config or CheckConfig()
    if config.max_prompt_tokens and prompt_tokens is None:
        raise UserError("max_prompt_tokens without a tokenizer", "both", "name a model or --tokenizer")
    checker = _Checker(config, prompt_tokens, refusal, test_prompts)
    for row in path if isinstance(path, RowReader) else RowReader(path):
        yield checker.check(row)


class _Checker:
    """What is remembered from row to row."""

    def __init__(
        self,
        config: CheckConfig,
        prompt_tokens: Callable[[ToolSample], int] | None,
        refusal: Callable[[ToolSample], str | None] | None,
        test_prompts: Collection[int] | DigestSet,
    ) -> None:
        self.config, self.test_prompts = config, test_prompts
        self.prompt_tokens, self.refusal = prompt_tokens, refusal
        self.seen = DigestSet()
        self.first_source = ""

    def check(self, row: Row) -> CheckedRow:
        if isinstance(row.value, RowError):
            found = finding(row.value.reason, row.value.detail)
            return CheckedRow(row.file, row.number, "rejected", "", (), (found,), row.value.raw)
        value, padded = _without_padding(row.value) if row.is_columnar else (row.value, False)
        source = self.config.source if self.config.source != "auto" else source_of(value) or ""
        try:
            loaded, found = self._loaded(value, row, source)
        except RowRejectedError as error:
            found = finding(error.reason, error.detail)
            return CheckedRow(row.file, row.number, "rejected", source, (), (found,), row.value)
        if padded:
            found.insert(0, finding("null_padding", "got null arguments or schema fields and left them out"))
        self.first_source = self.first_source or source
        if source != self.first_source:
            found.append(finding("mixed_shapes", f"got shape {source}, the first row has shape {self.first_source}"))
        samples: list[ToolSample] = []
        repaired: dict[int, Gold] = {}
        for sample in loaded:
            checked, problems = self._checked(sample, source, repaired)
            found += problems
            samples += [] if any(problem.severity == "rejected" for problem in problems) else [checked]
        changed = any(problem.severity != "noted" for problem in found)
        status: Status = ("repaired" if changed else "kept") if samples else "rejected"
        return CheckedRow(row.file, row.number, status, source, tuple(samples), tuple(found), row.value)

    def _loaded(self, value: Mapping[str, Any], row: Row, source: str) -> tuple[list[ToolSample], list[Finding]]:
        if not source:
            keys = ", ".join(map(str, value)) or "no keys"
            raise RowRejectedError("unknown_shape", f"got the keys {keys:.200}, expected one of {', '.join(SOURCES)}")
        given = value.get("id")
        identity = str(given) if isinstance(given, (str, int)) and str(given) else f"{Path(row.file).stem}-{row.number}"
        return get_loader(source)(value, identity, self.config.keep_prompts)

    def _checked(self, sample: ToolSample, source: str, repaired: dict[int, Gold]) -> tuple[ToolSample, list[Finding]]:
        """The sample, and what was found; `repaired` are the golds of its dialogue by the position of their turn."""
        keep = KEEPABLE if source in BENCHMARKS else self.config.keep
        published = sample.gold
        sample, found = checked_gold(with_repaired_history(sample, repaired), keep)
        if sample.gold != published:
            repaired[len(sample.messages)] = sample.gold
        if not sample.messages:
            found.append(finding("empty_prompt", "got no message before the turn", sample.id))
        found += [finding(reason, detail, sample.id, keep) for reason, detail in self._among_others(sample)]
        if self.config.mask_names:
            sample = masked(sample, self.config.mask_names, self.config.seed)
        if self.refusal is not None and not any(problem.severity == "rejected" for problem in found):
            problem = self.refusal(sample)
            found += [] if problem is None else [finding("not_laid_out", problem, sample.id)]
        return sample, found

    def _among_others(self, sample: ToolSample) -> Iterator[tuple[str, str]]:
        prompt = prompt_digest(sample)
        is_new_prompt = self.seen.add(prompt)
        if not self.seen.add(digest_of([prompt, gold_digest(sample)])):
            yield "duplicate", "got a sample that has been there before"
        elif not is_new_prompt:
            yield "other_gold", "got a prompt that has been there before with another gold"
        if self.test_prompts and leak_digest(sample) in self.test_prompts:
            yield "leak", "got a prompt that the test file has as well"
        if self.config.max_prompt_tokens and self.prompt_tokens is not None:
            count = self.prompt_tokens(sample)
            if count > self.config.max_prompt_tokens:
                yield "prompt_too_long", f"got {count} tokens, the limit is {self.config.max_prompt_tokens}"


def _without_padding(row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row without the nulls that Arrow gives to objects of different keys, and whether it held any in its calls."""
    cleaned = {key: _without_nulls(value) for key, value in row.items() if value is not None}
    inside = ("messages", "conversations", "conversation", "tools", "functions", "gold", "answers")
    return cleaned, any(_has_padded_call(row.get(key)) for key in inside)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _has_padded_call(value: Any, *, inside: bool = False) -> bool:
    """Whether there is a null below `arguments`, `parameters` or `properties`."""
    if isinstance(value, Mapping):
        below = ("arguments", "parameters", "properties")
        return any(
            (item is None and inside) or _has_padded_call(item, inside=inside or key in below)
            for key, item in value.items()
        )
    return isinstance(value, list) and any(_has_padded_call(item, inside=inside) for item in value)

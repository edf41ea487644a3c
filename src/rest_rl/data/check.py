"""Check every row of a data file, and report whether the row is kept, repaired or rejected, and why.

`check_rows` streams: it keeps one row in memory, and two hashes per sample to detect duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rest_rl.data.gold import check_against_tools, repair_history
from rest_rl.data.mask import mask_names
from rest_rl.data.reading import Row, RowError, RowReader
from rest_rl.data.reasons import ALLOWABLE_REASONS, REASONS, RowContext, RowFinding, RowRejectedError, make_finding
from rest_rl.data.samples import (
    Dialogue,
    ToolSample,
    compute_digest,
    compute_leak_digest,
    decompose_readable,
    from_json,
    to_json,
)  # fmt: skip
from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes import AUTO, BENCHMARKS, SHAPES, RowShape, find_shape, get_shapes
from rest_rl.errors import UserError
from rest_rl.response import TURNS, Gold, Turn
from rest_rl.runlog import SILENT, Observer

Status = Literal["kept", "repaired", "rejected"]
MAX_FINDINGS = 1000
MAX_FIRST_ROWS = 5
MAX_ANSWER_SHARE = 0.3
"""Share of answer turns above which `warn_about_answers` warns."""
ROWS_PER_PROGRESS = 256


@dataclass(frozen=True)
class CheckConfig:
    """Settings for reading and checking a file; invalid values raise UserError."""

    source: str | RowShape = AUTO
    """Shape of the rows: a name in `shapes.SHAPES`, `package.module:OBJECT`, or `auto` to detect it from the keys."""
    keep_prompts: bool = False
    """Keep published prompts word for word, including the tools they describe (ToolRL, API-Bank, ToolACE)."""
    allow: Sequence[str] = ()
    """Reasons (keys of `reasons.REASONS`) to note only, without a rejection or repair."""
    mask_names: float = 0.0
    """Share of samples whose tool and argument names are replaced by random strings (Hammer, arXiv 2410.04587)."""
    seed: int = 0
    """Seed of the masking."""
    max_prompt_tokens: int = 0
    """Reject prompts with more tokens; 0 for no limit. Only `prepare_row` checks this, with the model's tokenizer."""
    max_response_tokens: int = 1
    """If the model's context length is known, reject prompts that leave fewer tokens than this for a response."""

    def __post_init__(self) -> None:
        get_shapes(self.source)
        if unknown := [name for name in self.allow if name not in ALLOWABLE_REASONS]:
            raise UserError(f"allow contains {unknown[0]!r}", f"one of {', '.join(ALLOWABLE_REASONS)}")
        if not 0 <= self.mask_names <= 1:
            raise UserError(f"the fraction mask_names is {self.mask_names}", "a number between 0 and 1")
        if self.mask_names and self.keep_prompts:
            raise UserError(
                "mask_names and keep_prompts cannot be combined: kept prompts still show the tools' names",
                remedy="remove one of the two settings",
            )
        if self.max_prompt_tokens < 0:
            raise UserError(f"max_prompt_tokens is {self.max_prompt_tokens}", "at least 0", "use 0 for no limit")
        if self.max_response_tokens < 1:
            raise UserError(f"max_response_tokens is {self.max_response_tokens}", "at least 1")


class CheckedRow(NamedTuple):
    """A row, its samples and its findings; `raw` is the row as read, or the start of its text if it is unreadable."""

    file: str
    number: int
    source: str
    samples: tuple[ToolSample, ...]
    findings: tuple[RowFinding, ...]
    raw: Any

    @property
    def status(self) -> Status:
        """`rejected` if no sample remains, `repaired` if some were changed or rejected, otherwise `kept`."""
        is_changed = any(found.severity != "noted" for found in self.findings)
        return ("repaired" if is_changed else "kept") if self.samples else "rejected"

    def with_findings(self, found: Iterable[RowFinding]) -> CheckedRow:
        """Return the row with `found` added to its findings, and without the samples that these findings reject."""
        found = tuple(found)
        lost = {each.sample for each in found if each.severity == "rejected"}
        samples = tuple(sample for sample in self.samples if sample.id not in lost)
        return self._replace(samples=samples, findings=(*self.findings, *found))

    def reasons_to_allow(self, config: CheckConfig) -> Collection[str]:
        """Return reasons that cannot reject or change a row: `config.allow`, or ALLOWABLE_REASONS for benchmarks."""
        return ALLOWABLE_REASONS if self.source in BENCHMARKS else config.allow


def describe_outcome(row: CheckedRow, found: RowFinding) -> str:
    """Return the effect of a finding: `row rejected`, `turn rejected` (other turns remain), `repaired` or `noted`."""
    if found.severity != "rejected":
        return found.severity
    return "row rejected" if row.status == "rejected" else "turn rejected"


class LocatedFinding(NamedTuple):
    """A finding, and the file and row number where it occurred."""

    file: str
    row: int
    finding: RowFinding


@dataclass
class DataReport:
    """Counts over all files, with rows == kept + repaired + rejected; `reasons` counts each row once per reason."""

    rows: int = 0
    kept: int = 0
    repaired: int = 0
    rejected: int = 0
    samples: int = 0
    turns: Counter[Turn] = field(default_factory=Counter)
    """Number of samples on call turns (the gold turn calls a tool) and on answer turns (it does not)."""
    lost_turns: int = 0
    """Rows that lost a turn but still give samples; they count as repaired."""
    reasons: Counter[str] = field(default_factory=Counter)
    occurrences: Counter[str] = field(default_factory=Counter)
    first_rows: dict[str, list[int]] = field(default_factory=dict)
    outcomes: dict[str, set[str]] = field(default_factory=dict)
    """For each reason, the effects that its findings had: strings that `describe_outcome` returns."""
    sources: Counter[str] = field(default_factory=Counter)
    files: set[str] = field(default_factory=set)
    findings: list[LocatedFinding] = field(default_factory=list)
    """The first `MAX_FINDINGS` findings."""
    findings_left_off: int = 0

    def add(self, row: CheckedRow) -> None:
        """Add a row to the counts."""
        self.rows += 1
        setattr(self, row.status, getattr(self, row.status) + 1)
        self.samples += len(row.samples)
        self.turns.update(sample.gold.turn for sample in row.samples)
        self.lost_turns += bool(row.samples) and any(found.severity == "rejected" for found in row.findings)
        self.files.add(row.file)
        self.sources.update([row.source] if row.source else ())
        self.occurrences.update(found.reason for found in row.findings)
        self.findings += [LocatedFinding(row.file, row.number, found) for found in row.findings]
        self.findings_left_off += max(0, len(self.findings) - MAX_FINDINGS)
        del self.findings[MAX_FINDINGS:]
        for found in row.findings:
            self.outcomes.setdefault(found.reason, set()).add(describe_outcome(row, found))
        # A reason may occur several times in a row but counts the row once; `occurrences` counts every finding.
        for reason in {found.reason for found in row.findings}:
            self.reasons[reason] += 1
            first = self.first_rows.setdefault(reason, [])
            first += [row.number] if len(first) < MAX_FIRST_ROWS else []

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        counts = ("rows", "kept", "repaired", "rejected", "samples", "lost_turns")
        by_reason = {name: getattr(self, name) for name in ("reasons", "occurrences", "first_rows")}
        return {
            **{name: getattr(self, name) for name in counts},
            "turns": {turn: self.turns[turn] for turn in TURNS},
            **{name: {key: each[key] for key in REASONS if key in each} for name, each in by_reason.items()},
            "source": self.sources,
            "findings": [
                {"file": file, "row": row, **found._asdict(), "remedy": REASONS[found.reason].remedy}
                for file, row, found in self.findings
            ],
            "findings_left_off": self.findings_left_off,
        }


def format_turn_mix(turns: Mapping[Turn, int]) -> str:
    """Return a line such as `453 call turns, 510 answer turns (53 %)`."""
    share = turns["answers"] / max(1, sum(turns.values()))
    names = {turn: name.removesuffix("s") if turns[turn] == 1 else name for turn, name in TURNS.items()}
    return f"{turns['calls']} {names['calls']}, {turns['answers']} {names['answers']} ({share:.0%})"


def warn_about_answers(turns: Mapping[Turn, int]) -> str | None:
    """Return a warning if more than `MAX_ANSWER_SHARE` of the samples are answer turns, otherwise None."""
    if turns["answers"] <= MAX_ANSWER_SHARE * sum(turns.values()):
        return None
    return (
        f"{turns['answers'] / sum(turns.values()):.0%} of the samples are answer turns, for which any complete text "
        'without a tool call gets the full reward; set data.turns = "calls" (--set data.turns=calls) to train only on '
        "calls, or set rest.reward.answer to a function that scores answers (docs/training.md)"
    )


def check_rows(
    paths: str | Sequence[str],
    config: CheckConfig | None = None,
    *,
    test: str | None = None,
    limit: int = 0,
    observer: Observer = SILENT,
) -> Iterator[CheckedRow]:
    """Yield each row of files, folders or hub datasets with its samples and findings, in order.

    Samples whose prompt is also in the file `test` are rejected. `limit` is the number of rows to read, 0 for all.

    Raises:
        UserError: An input does not exist. A row that cannot be read is a finding, not an error.
    """
    reader = RowReader(*([paths] if isinstance(paths, str) else paths))
    checker = _RowChecker(config or CheckConfig(), collect_prompt_digests(test, config) if test else frozenset())
    with observer.track("reading", reader.total_bytes or None) as advance:
        for count, row in enumerate(reader, 1):
            yield checker.check(row)
            if count == limit:
                return
            if count % ROWS_PER_PROGRESS == 0:
                advance(min(reader.read_bytes, reader.total_bytes), note=f"{count} rows")


def collect_prompt_digests(path: str, config: CheckConfig | None = None) -> set[int]:
    """Return the digests of all prompts of a test file."""
    config = config or CheckConfig()
    # A defective test row can also occur in the training data, so no row is rejected here. Repairs stay on: they change
    # histories, and the training prompts that are compared with these prompts are repaired too.
    allow = tuple(
        reason for reason in ALLOWABLE_REASONS if reason in config.allow or REASONS[reason].severity != "repaired"
    )
    source = AUTO if isinstance(config.source, str) and config.source in SHAPES else config.source
    everything = replace(config, allow=allow, mask_names=0.0, source=source)
    return {compute_leak_digest(sample) for row in check_rows(path, everything) for sample in row.samples}


class _RowChecker:
    def __init__(self, config: CheckConfig, test_prompts: Collection[int]) -> None:
        self.config, self.test_prompts = config, test_prompts
        self.shapes = get_shapes(config.source)
        self.seen: set[int] = set()
        self.first_source = ""

    def check(self, row: Row) -> CheckedRow:
        if isinstance(row.value, RowError):
            error = row.value
            return CheckedRow(row.file, row.number, "", (), (make_finding(error.reason, error.detail),), error.raw)
        value, is_padded = _remove_padding(row.value) if row.is_columnar else (row.value, False)
        checked = CheckedRow(row.file, row.number, "", (), (), row.value)
        given = value.get("id")
        has_id = isinstance(given, str | int) and str(given)
        context = RowContext(str(given) if has_id else f"{Path(row.file).stem}-{row.number}", self.config.keep_prompts)
        try:
            shape = self._shape_of(value)
            checked = checked._replace(source=shape.name)
            samples = _read_samples(shape, value, context)
        except RowRejectedError as error:
            return checked.with_findings([make_finding(error.reason, error.detail)])
        if is_padded:
            context.findings.insert(0, make_finding("null_padding", "null arguments or schema fields were left out"))
        self.first_source = self.first_source or shape.name
        if shape.name != self.first_source:
            context.note(
                "mixed_shapes", f"the shape is {shape.name}, but the first row has the shape {self.first_source}"
            )
        repaired: dict[int, Gold] = {}
        kept: list[ToolSample] = []
        for read in samples:
            sample, found = self._check_sample(read, checked.reasons_to_allow(self.config), repaired)
            context.findings += found
            kept += [] if any(each.severity == "rejected" for each in found) else [sample]
        return checked._replace(samples=tuple(kept), findings=tuple(context.findings))

    def _shape_of(self, value: Mapping[str, Any]) -> RowShape:
        shape = find_shape(value, self.shapes)
        if shape is None:
            keys, known = ", ".join(map(repr, value)) or "none", ", ".join(shape.name for shape in self.shapes)
            raise RowRejectedError("unknown_shape", f"no shape matches the row's keys ({keys:.200}); shapes: {known}")
        return shape

    def _check_sample(
        self, sample: ToolSample, allow: Collection[str], repaired: dict[int, Gold]
    ) -> tuple[ToolSample, list[RowFinding]]:
        # `repaired` maps the position of a turn in its dialogue to its repaired gold. Later samples of the dialogue
        # have that turn in their history, where the repaired calls must replace the published ones.
        published = sample.gold
        sample, found = check_against_tools(repair_history(sample, repaired), allow)
        if sample.gold != published:
            repaired[len(sample.messages)] = sample.gold
        if not sample.messages:
            found.append(make_finding("empty_prompt", "the turn has no message before it", sample.id))
        found += [make_finding(reason, detail, sample.id, allow) for reason, detail in self._among_others(sample)]
        return mask_names(sample, self.config.mask_names, self.config.seed), found

    def _among_others(self, sample: ToolSample) -> Iterator[tuple[str, str]]:
        # Each sample adds two digests to one set: that of its prompt, and that of prompt and gold together. The two
        # kinds can share the set, because digests of different kinds are equal only if two 64-bit hashes collide.
        prompt = compute_digest([sample.messages, sample.tools])
        gold = [[(call.name, call.arguments) for call in sample.gold.calls], sample.gold.answer]
        whole = compute_digest([prompt, gold])
        if whole in self.seen:
            yield "duplicate", "an earlier sample has the same prompt and gold"
        elif prompt in self.seen:
            yield "other_gold", "an earlier sample has this prompt but another gold turn"
        self.seen |= {prompt, whole}
        if self.test_prompts and compute_leak_digest(sample) in self.test_prompts:
            yield "leak", "the test file contains the same prompt"


def _read_samples(shape: RowShape, value: Mapping[str, Any], context: RowContext) -> list[ToolSample]:
    # Built-in shapes raise RowRejectedError for bad rows; any other exception is a bug in this package. The output of
    # a user's shape is converted to JSON and back, which validates it as if it came from a file.
    if shape in SHAPES.values():
        return [sample for each in shape.read(value, context) for sample in _split_dialogue(each, context)]
    samples: list[ToolSample] = []
    try:
        for each in shape.read(value, context):
            tools = read_tools(list(each.tools))
            samples += [from_json(to_json(sample)) for sample in _split_dialogue(replace(each, tools=tools), context)]
    except RowRejectedError:
        raise
    except Exception as error:  # user code: a bug in it for one row must not stop the whole file
        problem = f"the shape {shape.name} raised {type(error).__name__}: {error}"
        raise RowRejectedError("bad_row", problem) from error
    return samples


def _split_dialogue(read: Dialogue | ToolSample, context: RowContext) -> list[ToolSample]:
    if isinstance(read, ToolSample):
        return [read]
    samples, bad = decompose_readable(read)
    for turn in bad:
        context.note(turn.reason, turn.problem)
    if not samples and not bad:
        problem = "none of the messages is an assistant turn to train on" if read.messages else "there are no messages"
        raise RowRejectedError("no_assistant_turn", problem)
    return samples


def _remove_padding(row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    # Arrow stores a list of objects with the union of their keys and fills the missing ones with null. Returns the row
    # without any nulls, and whether a null was inside a call or schema, where removing it is a repair to report.
    inside = ("messages", "conversations", "conversation", "tools", "functions", "gold", "answers")
    return _remove_nulls(row), any(_has_padded_call(row.get(key)) for key in inside)


def _remove_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _remove_nulls(item) for key, item in value.items() if item is not None}
    return [_remove_nulls(item) for item in value] if isinstance(value, list) else value


def _has_padded_call(value: Any, *, inside: bool = False) -> bool:
    if isinstance(value, Mapping):
        below = ("arguments", "parameters", "properties")
        return any(
            (item is None and inside) or _has_padded_call(item, inside=inside or key in below)
            for key, item in value.items()
        )
    return isinstance(value, list) and any(_has_padded_call(item, inside=inside) for item in value)

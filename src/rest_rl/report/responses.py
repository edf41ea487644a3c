"""Recorded responses for the HTML report: tokens with region, weight, entropy and log-probability; scores; mistakes.

If a run recorded no tokens, the page shows words, colored by the regions into which the text parses. A field of a row
that has the wrong type or length counts as missing. The tokens of all responses are stored in shared columns, one
response after the other, because creating thousands of small arrays is slow in a browser.
"""

from __future__ import annotations

import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from rest_rl.config import parse_recorded_run
from rest_rl.formats import ToolFormat, get_format
from rest_rl.report.diagnosis.history import step_of
from rest_rl.report.tables import is_number
from rest_rl.response import NUM_REGIONS, Gold, ParsedResponse, Region, gold_from_json
from rest_rl.rewards import ScoreFinding, judge_parsed
from rest_rl.runlog import Row, Run

# Numbers are stored as uint16 in thousandths; the largest code marks a missing number. data.js reads the same code.
MISSING_CODE, MAX_CODE = 65535, 65534
MAX_PIECES, MAX_CHARACTERS, MAX_PROMPT_CHARACTERS = 20_000, 200_000, 40_000
"""Limits for one response and one prompt; the page says how much it leaves out."""
MAX_CHANGES = 100
"""Lines of the difference between two states."""
WORD_PATTERN = re.compile(r"\s{1,40}|\S{1,40}\s?")

Flag = Literal["format", "tool", "missing", "extra", "argument", "unreadable", "truncated", "exact"]
FLAG_LABELS: Mapping[Flag, str] = {
    "format": "format violation",
    "tool": "wrong tool",
    "argument": "wrong argument",
    "extra": "extra call",
    "missing": "missing call",
    "unreadable": "unreadable call",
    "truncated": "truncated",
    "exact": "exact match",
}
"""The filters of the list of responses, with their labels."""


class Pieces(NamedTuple):
    """A response as tokens, or as words if no tokens were recorded; lists of unrecorded values are empty."""

    texts: list[str]
    regions: list[int]
    weights: list[float | None]
    entropies: list[float | None]
    logps: list[float | None]

    def truncate(self, count: int) -> Pieces:
        numbers = (values[:count] for values in (self.weights, self.entropies, self.logps))
        return Pieces(self.texts[:count], self.regions[:count], *numbers)


class TokenColumns:
    """The tokens of all responses: index of the text, thousandths of weight, entropy and -log-probability, region."""

    def __init__(self) -> None:
        self.words = array("I")
        self.weights, self.entropies, self.surprises = array("H"), array("H"), array("H")
        self.regions = bytearray()

    def add(self, pieces: Pieces, table: StringTable) -> int:
        """Append a response, and return the index of its first token."""
        start, count = len(self.words), len(pieces.texts)
        self.words.extend(table.index_of(text) for text in pieces.texts)
        surprises = [None if value is None else -value for value in pieces.logps]
        for column, values in zip(self.numbers, (pieces.weights, pieces.entropies, surprises), strict=True):
            column.extend(to_thousandths(value) for value in values or [None] * count)
        self.regions.extend(pieces.regions)
        return start

    @property
    def numbers(self) -> tuple[array[int], array[int], array[int]]:
        return self.weights, self.entropies, self.surprises

    def as_bytes(self) -> bytes:
        """Return all columns, little-endian: text indices as uint32, thousandths as uint16, regions as uint8."""
        columns = (self.words, *self.numbers)
        assert [column.itemsize for column in columns] == [4, 2, 2, 2]
        if sys.byteorder == "big":
            for column in columns:
                column.byteswap()
        return b"".join([*(column.tobytes() for column in columns), self.regions])


class StringTable:
    """Texts that many responses share, each stored once."""

    def __init__(self) -> None:
        self.indices: dict[str, int] = {}

    def index_of(self, text: str) -> int:
        return self.indices.setdefault(text, len(self.indices))

    @property
    def texts(self) -> list[str]:
        return list(self.indices)


def pack_responses(runs: Sequence[Run], limit: int) -> tuple[Row, bytes]:
    """Return at most about `limit` responses and their shared texts as values for JSON, and their tokens as bytes."""
    words, prompts, golds, columns = StringTable(), StringTable(), StringTable(), TokenColumns()
    packed: list[Row] = []
    for index, run in enumerate(runs):
        tool_format = find_format(run)
        prompt_indices: dict[tuple[Any, Any], int] = {}
        for row in select_rows(run.responses, limit // len(runs)):
            key = (row.get("step"), str(row.get("id")))
            if isinstance(prompt := row.get("prompt"), str):
                prompt_indices[key] = prompts.index_of(shorten(prompt, MAX_PROMPT_CHARACTERS))
            head = {"r": index, "p": prompt_indices.get(key, -1)}
            facts, pieces = pack_response(row, tool_format, golds)
            packed.append(head | facts | {"o": columns.add(pieces, words)})
    tables = {"words": words.texts, "prompts": prompts.texts, "golds": golds.texts}
    return {"responses": packed, **tables}, columns.as_bytes()


def select_rows(rows: Sequence[Row], limit: int) -> list[Row]:
    """Return at most `limit` rows, from evenly spaced steps, and all rows of a step if possible."""
    # The steps are evenly spaced by their index. Each keeps equally many rows, all if `limit` allows.
    if len(rows) <= limit:
        return list(rows)
    steps = sorted({step_of(row) for row in rows})
    count = max(1, min(limit, len(steps) * limit // len(rows)))
    kept = {steps[(len(steps) - 1) * i // max(count - 1, 1)] for i in range(count)}
    per_step = limit // count
    taken: Counter[int] = Counter()
    chosen: list[Row] = []
    for row in rows:
        if step_of(row) in kept and taken[step_of(row)] < per_step:
            taken[step_of(row)] += 1
            chosen.append(row)
    return chosen


def find_format(run: Run) -> ToolFormat | None:
    # None for a format of the user's whose module is not installed here: the page then has no scores.
    try:
        return get_format(str(parse_recorded_run(run.config, str(run.folder)).get("rest", {}).get("format")))
    except (ValueError, ImportError, AttributeError):
        return None


def pack_response(row: Row, tool_format: ToolFormat | None, golds: StringTable) -> tuple[Row, Pieces]:
    # One-letter keys, because the page has thousands of responses: s step, i id, g index of the gold, R reward, A
    # advantage, F [S_format, S_acc], k flags, e mistakes, n tokens, m tokens in the page, u whether they are tokens and
    # not words.
    text = row.get("response")
    text = text if isinstance(text, str) else ""
    parsed = tool_format.parse(text) if tool_format else None
    gold = read_gold(row)
    pieces = split_into_pieces(row, text, parsed)
    flags, findings, scores = judge_row(row, parsed, gold)
    shown = limit_pieces(pieces)
    facts = {
        "s": step_of(row),
        "i": str(row.get("id", "")),
        "g": golds.index_of(format_gold(gold)) if gold else -1,
        "R": round_number(row.get("reward")),
        "A": round_number(row.get("advantage")),
        "F": scores,
        "k": flags,
        "e": [[finding.kind, finding.message, round(finding.cost, 4)] for finding in findings],
        "n": len(pieces.texts),
        "m": len(shown.texts),
        "u": int(bool(shown.weights)),
    }
    if isinstance(row.get("turns"), list):
        facts |= pack_rollout(row)
    return facts, shown


def pack_rollout(row: Row) -> Row:
    # T turns: [first token, end, reward, credit, mean weight, calls as text, errors]; E why the rollout ended; D the
    # lines of the difference between the states at its start and end.
    credits, weights = row.get("advantages"), row.get("weights")
    turns = []
    for turn in row["turns"]:
        start, end = turn.get("start", 0), turn.get("end", 0)
        own = [values[start:end] if isinstance(values, list) else [] for values in (credits, weights)]
        means = [
            round(sum(values) / len(values), 4) if values and all(map(is_number, values)) else None for values in own
        ]
        credit = round_number(row.get("advantage")) if means[0] is None else means[0]
        calls = ", ".join(str(call.get("name")) for call in turn.get("calls") or ())
        errors = [str(result.get("error")) for result in turn.get("results") or () if result.get("error")]
        turns.append([start, end, round_number(turn.get("reward")), credit, means[1], calls, errors])
    states = row.get("states")
    changes = diff_states(*states) if isinstance(states, list) and len(states) == 2 else []
    flags = ["exact"] if row.get("success") is True else []
    why = str(row.get("failure") or row.get("stop") or "")
    return {
        "T": turns,
        "E": why,
        "D": changes[:MAX_CHANGES],
        "k": [*(["truncated"] * bool(row.get("truncated"))), *flags],
    }


def diff_states(before: Any, after: Any, path: str = "") -> list[str]:
    """Return what changed between two JSON values, one line for each place: `path: old → new`."""
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        lines = []
        for key in dict.fromkeys([*before, *after]):
            place = f"{path}.{key}".lstrip(".")
            if key not in before:
                lines.append(f"{place}: new, {json.dumps(after[key], ensure_ascii=False)[:200]}")
            elif key not in after:
                lines.append(f"{place}: removed")
            else:
                lines += diff_states(before[key], after[key], place)
        return lines
    old, new = (json.dumps(value, ensure_ascii=False)[:200] for value in (before, after))
    return [f"{path or 'state'}: {old} → {new}"]


def round_number(value: Any) -> float | None:
    return round(float(value), 5) if is_number(value) else None


def read_gold(row: Row) -> Gold | None:
    try:
        return gold_from_json(row.get("gold"))
    except ValueError:
        return None


def format_gold(gold: Gold) -> str:
    calls = [{"name": call.name, "arguments": call.arguments} for call in gold.calls]
    lines = [json.dumps(call, ensure_ascii=False, default=str) for call in calls] or ["no call"]
    return "\n".join([*lines, *([f"answer: {gold.answer}"] if gold.answer is not None else [])])


def judge_row(
    row: Row, parsed: ParsedResponse | None, gold: Gold | None
) -> tuple[list[Flag], tuple[ScoreFinding, ...], list[float] | None]:
    # Returns the flags, the mistakes with their costs, and [S_format, S_acc], or None without a format or a gold turn.
    is_cut = row.get("truncated") is True
    flags: list[Flag] = ["truncated"] if is_cut else []
    if parsed is None or gold is None:
        return flags, (), None
    judgement = judge_parsed(parsed, gold, truncated=is_cut)
    flags += find_call_flags(parsed, gold, {finding.kind for finding in judgement.explanation})
    if judgement.exact_match:
        flags.append("exact")
    return flags, judgement.explanation, [judgement.format, round(judgement.accuracy, 5)]


def find_call_flags(parsed: ParsedResponse, gold: Gold, kinds: set[str]) -> Iterator[Flag]:
    wanted, made = Counter(call.name for call in gold.calls), Counter(call.name for call in parsed.calls)
    num_made = len(parsed.calls) + parsed.unreadable_calls
    if "format" in kinds:
        yield "format"
    if gold.calls and made - wanted and wanted - made:
        yield "tool"
    if kinds & {"keys", "missing_argument", "value"}:
        yield "argument"
    if num_made > len(gold.calls) or "unneeded_call" in kinds:
        yield "extra"
    if num_made < len(gold.calls):
        yield "missing"
    if parsed.unreadable_calls:
        yield "unreadable"


def split_into_pieces(row: Row, text: str, parsed: ParsedResponse | None) -> Pieces:
    # The recorded token lengths must add up to the text; if they do not, the text is split into words instead.
    lengths, regions = parse_counts(row.get("lengths")), parse_counts(row.get("regions"))
    if not lengths or len(lengths) != len(regions) or sum(lengths) != len(text) or max(regions) >= NUM_REGIONS:
        return split_into_words(text, parsed)
    characters = iter(text)
    texts = ["".join(islice(characters, length)) for length in lengths]
    return Pieces(
        texts, regions, *(parse_numbers(row.get(name), len(texts)) for name in ("weights", "entropies", "logps"))
    )


def parse_counts(values: Any) -> list[int]:
    if not isinstance(values, list):
        return []
    return values if all(type(value) is int and value >= 0 for value in values) else []


def parse_numbers(values: Any, length: int) -> list[float | None]:
    if not isinstance(values, list) or len(values) != length:
        return []
    return [value if is_number(value) else None for value in values]


def split_into_words(text: str, parsed: ParsedResponse | None) -> Pieces:
    texts: list[str] = []
    regions: list[int] = []
    for piece, region in split_by_region(text, parsed):
        found = WORD_PATTERN.findall(piece)
        texts += found
        regions += [int(region)] * len(found)
    return Pieces(texts, regions, [], [], [])


def split_by_region(text: str, parsed: ParsedResponse | None) -> Iterable[tuple[str, Region]]:
    end = 0
    for span in parsed.spans if parsed else ():
        yield text[end : span.start], Region.OTHER
        yield text[span.start : span.end], span.region
        end = span.end
    yield text[end:], Region.OTHER


def limit_pieces(pieces: Pieces) -> Pieces:
    total, keep = 0, 0
    for piece in pieces.texts[:MAX_PIECES]:
        total += len(piece)
        if total > MAX_CHARACTERS:
            break
        keep += 1
    if keep == min(len(pieces.texts), MAX_PIECES):
        return pieces.truncate(keep)
    shown = pieces.truncate(keep + 1)  # the last one is shortened to what still fits
    shown.texts[-1] = shown.texts[-1][: MAX_CHARACTERS - sum(map(len, shown.texts[:-1]))]
    return shown


def to_thousandths(value: float | None) -> int:
    # Values beyond the range of the code become its nearest end.
    return MISSING_CODE if value is None else min(max(round(1000 * value), 0), MAX_CODE)


def shorten(text: str, max_length: int) -> str:
    if len(text) <= max_length:
        return text
    half = max_length // 2
    return f"{text[:half]}\n\n[... {len(text) - 2 * half} characters left out ...]\n\n{text[-half:]}"

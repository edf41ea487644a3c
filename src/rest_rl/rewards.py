"""The rule reward: format score, accuracy score, their rescaling by progress, and what cost what.

The rules are ToolRL's (arXiv 2504.13958, section 3.3) with the best instead of a greedy assignment of calls. Not
judged here: the text of an answer, the truth of the reasoning, argument types against a tool's schema.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple

from rest_rl.json_spans import bare_value
from rest_rl.response import Gold, ParsedResponse, ToolCall

_Equality = Callable[[Any, Any], bool]
FindingKind = Literal["format", "unneeded_call", "names", "missing_call", "keys", "missing_argument", "value"]


@dataclass(frozen=True)
class RewardConfig:
    """How the two scores make up the reward: R = beta_acc S_acc nu' + beta_fmt S_format (1 - nu')."""

    accuracy_scale: float = 1.0
    """beta_acc"""
    format_scale: float = 1.0
    """beta_fmt"""
    accuracy_share_start: float = 0.3
    """nu' at progress 0 (ours: some accuracy from the start, or a group that all formats well has no spread)."""
    accuracy_share_end: float = 0.8
    """nu' at progress 1 (ours: format stays worth something)."""
    random: bool = False
    """Train on `random_rewards` instead (a control: what is learnt without a signal). The two scores stay the rule's,
    and `score` knows nothing of it."""

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy_share_start <= self.accuracy_share_end <= 1:
            raise ValueError(
                f"got accuracy_share_start {self.accuracy_share_start}, accuracy_share_end {self.accuracy_share_end}; "
                "expected 0 <= start <= end <= 1"
            )
        if not (0 <= self.accuracy_scale < float("inf") and 0 <= self.format_scale < float("inf")):
            raise ValueError(f"got scales {self.accuracy_scale} and {self.format_scale}, expected finite numbers >= 0")


class Finding(NamedTuple):
    """One thing that cost something: `cost` is its share of S_format (kind format) or of S_acc (all others).

    The costs of the accuracy findings add up to 1 - S_acc.
    """

    kind: FindingKind
    message: str
    cost: float


class Reward(NamedTuple):
    """The reward of one response, its two scores in [0, 1], and why they are not 1."""

    total: float
    format: float
    accuracy: float
    explanation: tuple[Finding, ...]


def score(parsed: ParsedResponse, gold: Gold, progress: float = 0.0, config: RewardConfig | None = None) -> Reward:
    """Score a response against gold at training progress nu in [0, 1]: in [0, max(beta_acc, beta_fmt)].

    R = beta_acc S_acc nu' + beta_fmt S_format (1 - nu'), nu' rising linearly with nu (ResT's rescaled reward).
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"got progress {progress}, expected a number in [0, 1]: step / (total steps - 1)")
    config = config or RewardConfig()
    share = config.accuracy_share_start + (config.accuracy_share_end - config.accuracy_share_start) * progress
    well_formatted, format_findings = format_score(parsed, gold)
    accuracy, accuracy_findings = accuracy_score(parsed, gold)
    total = config.accuracy_scale * accuracy * share + config.format_scale * well_formatted * (1 - share)
    return Reward(total, well_formatted, accuracy, format_findings + accuracy_findings)


def random_rewards(count: int, seed: int, step: int, first: int = 0) -> list[float]:
    """Rewards in [0, 1) that know nothing of the responses: positions `first` to `first + count` of a batch.

    They depend on the seed, the step and the position alone, so a resumed run draws the same ones:
    `random_rewards(2, s, k, first=3) == random_rewards(5, s, k)[3:]`.
    """
    draws = random.Random(f"{seed} {step}")
    return [draws.random() for _ in range(first + count)][first:]


def exact_match(parsed: ParsedResponse, gold: Gold) -> bool:
    """Full marks in both scores: the right blocks and exactly the gold calls."""
    return format_score(parsed, gold)[0] == 1.0 and accuracy_score(parsed, gold)[0] == 1.0


def format_score(parsed: ParsedResponse, gold: Gold) -> tuple[float, tuple[Finding, ...]]:
    """S_format in {0, 1}: the blocks that gold needs and no others, each once, complete, in order.

    Where the answer is untagged text, text beside calls is allowed. What the blocks hold is not judged here.
    """
    problem = _format_problem(parsed, gold)
    return (1.0, ()) if problem is None else (0.0, (Finding("format", problem, 1.0),))


def _format_problem(parsed: ParsedResponse, gold: Gold) -> str | None:
    if not parsed.well_formed:
        return "; ".join(parsed.problems[:3]) or "the blocks are not complete and in order"
    if (parsed.attempted_call or bool(parsed.calls)) != bool(gold.calls):
        return "a call block is missing" if gold.calls else "a call block is not needed"
    if gold.answer is not None and parsed.answer is None:
        return "the answer is missing"
    if gold.answer is None and parsed.answer is not None and not parsed.untagged_answer:
        return "an answer block is not needed"
    return None


def accuracy_score(parsed: ParsedResponse, gold: Gold) -> tuple[float, tuple[Finding, ...]]:
    """S_acc in [0, 1] = (r_name + r_keys + r_values) / (1 + |Gold| + sum_j |keys(G_j)|).

    r_name is the multiset Jaccard of tool names, r_keys the sum of Jaccards of argument names, r_values the number of
    equal argument values, under the best one-to-one assignment of predicted to gold calls of the same name. Stretches
    of a call block that are not a call count as calls of no known name. Where the format writes values as text, a gold
    string also equals the value that its text spells. Without gold calls: 1 if no call was attempted, else 0.
    """
    if not gold.calls:
        if not parsed.attempted_call:
            return 1.0, ()
        return 0.0, (Finding("unneeded_call", "a call was made where none is needed", 1.0),)
    points = 1 + len(gold.calls) + sum(len(call.arguments) for call in gold.calls)
    findings: list[Finding] = []
    names = _name_score(parsed, gold, points, findings)
    equal = text_equal if parsed.text_values else json_equal
    matched = 0.0
    for call, partner in zip(gold.calls, _assign(gold.calls, parsed.calls, equal), strict=True):
        if partner is None:
            cost = (1 + len(call.arguments)) / points
            findings.append(Finding("missing_call", f"no call of {_show(call.name)} was made for a gold call", cost))
        else:
            matched += _call_score(call, partner, points, findings, equal)
    return (names + matched) / points, tuple(findings)


def _name_score(parsed: ParsedResponse, gold: Gold, points: int, findings: list[Finding]) -> float:
    wanted, made = [call.name for call in gold.calls], [call.name for call in parsed.calls]
    if not parsed.unreadable_calls and sorted(wanted) == sorted(made):
        return 1.0
    wanted, made = Counter(wanted), Counter(made)
    common = sum((wanted & made).values())
    union = len(gold.calls) + len(parsed.calls) + parsed.unreadable_calls - common
    parts = _differences(list((wanted - made).elements()), list((made - wanted).elements()))
    parts += [f"{parsed.unreadable_calls} unreadable"] * bool(parsed.unreadable_calls)
    findings.append(Finding("names", "tool names: " + ", ".join(parts), (1 - common / union) / points))
    return common / union


def _call_score(gold: ToolCall, made: ToolCall, points: int, findings: list[Finding], equal: _Equality) -> float:
    """Jaccard of the argument names plus the number of equal values, each loss recorded."""
    wanted, given = gold.arguments, made.arguments
    keys = 1.0
    if wanted.keys() != given.keys():
        keys = _jaccard(wanted, given)
        missing = [key for key in wanted if key not in given]
        parts = _differences(missing, [key for key in given if key not in wanted])
        findings.append(Finding("keys", f"arguments of {_show(gold.name)}: " + ", ".join(parts), (1 - keys) / points))
        for key in missing:
            message = f"{_show(gold.name)}: no value for {_show(key)}, expected {_show(wanted[key])}"
            findings.append(Finding("missing_argument", message, 1 / points))
    values = 0
    for key, value in wanted.items():
        if key not in given:
            continue
        if equal(value, given[key]):
            values += 1
        else:
            message = f"{_show(gold.name)}: {_show(key)} got {_show(given[key])}, expected {_show(value)}"
            findings.append(Finding("value", message, 1 / points))
    return keys + values


def _similarity(gold: ToolCall, made: ToolCall, equal: _Equality) -> float:
    wanted, given = gold.arguments, made.arguments
    values = sum(key in given and equal(value, given[key]) for key, value in wanted.items())
    return _jaccard(wanted, given) + values


def _jaccard(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    common = len(left.keys() & right.keys())
    union = len(left) + len(right) - common
    return common / union if union else 1.0


def _assign(gold: Sequence[ToolCall], made: Sequence[ToolCall], equal: _Equality) -> list[ToolCall | None]:
    """For each gold call its partner among the calls of the same name: the assignment of the highest total score."""
    partners: list[ToolCall | None] = [None] * len(gold)
    rows_of: dict[str, list[int]] = {}
    columns_of: dict[str, list[ToolCall]] = {}
    for row, call in enumerate(gold):
        rows_of.setdefault(call.name, []).append(row)
    for call in made:
        columns_of.setdefault(call.name, []).append(call)
    for name, rows in rows_of.items():
        columns = columns_of.get(name, [])
        if len(rows) == len(columns) == 1:
            partners[rows[0]] = columns[0]
        elif columns:
            for row, column in _best_pairs([[_similarity(gold[i], call, equal) for call in columns] for i in rows]):
                partners[rows[row]] = columns[column]
    return partners


def _best_pairs(scores: list[list[float]]) -> list[tuple[int, int]]:
    if len(scores) == 1:
        return [(0, max(range(len(scores[0])), key=scores[0].__getitem__))]
    from scipy.optimize import linear_sum_assignment  # only here: its import costs more than a thousand scores

    rows, columns = linear_sum_assignment(scores, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def json_equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 == 1.0, true != 1, the order of keys is irrelevant, that of lists is not."""
    if left != right:  # equal JSON values are equal Python values, but not the other way round: True == 1
        return False
    if isinstance(left, str):
        return True
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool)
    if isinstance(left, Mapping):
        return all(json_equal(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)):
        return all(json_equal(a, b) for a, b in zip(left, right, strict=True))
    return True


def text_equal(wanted: Any, given: Any) -> bool:
    """`json_equal`, or `wanted` is a string that spells the value `given`, for formats that write all values as text.

    Example: wanted `"12345"` equals given `12345`, for `<parameter=zip>12345` may mean either.
    """
    if json_equal(wanted, given):
        return True
    return isinstance(wanted, str) and not isinstance(given, str) and json_equal(bare_value(wanted), given)


def _differences(missing: list[str], extra: list[str]) -> list[str]:
    return [f"{word} {_show(items[:8])}" for word, items in (("missing", missing), ("extra", extra)) if items]


def _show(value: Any) -> str:
    text = (
        encode_basestring(value[:80]) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    )
    return text if len(text) <= 80 else text[:77] + "..."

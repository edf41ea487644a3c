"""Judging a response against gold: format score, accuracy score, what each mistake cost, and the reward made of them.

The rules are ToolRL's (arXiv 2504.13958, section 3.3) with the best instead of a greedy assignment of calls. Not
judged here: the text of an answer (`RewardConfig.answer` can), the truth of the reasoning, argument types against a
tool's schema.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, Protocol

from rest_rl.errors import UserError
from rest_rl.formats import ToolFormat, get_format
from rest_rl.json_spans import parse_bare_value
from rest_rl.objects import UserObject, check_signature, display_name, wrap_user_errors
from rest_rl.response import Gold, ParsedResponse, ToolCall, check_progress

_Equality = Callable[[Any, Any], bool]
FindingKind = Literal["format", "unneeded_call", "names", "missing_call", "keys", "missing_argument", "value", "answer"]


class ScoreFinding(NamedTuple):
    """One thing that cost something: `cost` is its share of S_format (kind format) or of S_acc (all others).

    The costs of the accuracy findings add up to 1 - S_acc.
    """

    kind: FindingKind
    message: str
    cost: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a response is worth against gold at any training progress: S_format and S_acc, and why they are not 1."""

    text: str
    gold: Gold
    parsed: ParsedResponse
    format: float
    """S_format in {0, 1}."""
    accuracy: float
    """S_acc in [0, 1]."""
    explanation: tuple[ScoreFinding, ...]
    truncated: bool = False
    """The response was cut off before its end, which leaves it without S_format."""

    @property
    def exact_match(self) -> bool:
        """Full marks in both scores: complete, the right blocks and exactly the gold calls."""
        return self.format == self.accuracy == 1


class Reward(NamedTuple):
    """The reward of one response, the two scores it is made of, and why they are not at their best."""

    total: float
    format: float
    accuracy: float
    explanation: tuple[ScoreFinding, ...]


class RewardRule(Protocol):
    """How a judged response is rewarded; pass your own function or object wherever a name is accepted.

    `progress` is the training progress nu in [0, 1]; `step` is the number of the batch of responses, counted from 1, or
    None outside training. Return the reward, or a `Reward` to replace the two scores that are shown with it.
    """

    def __call__(self, judgement: Judgement, progress: float, step: float | None = None) -> float | Reward: ...


@dataclass(frozen=True)
class RewardConfig:
    """ResT's rescaled reward, R = beta_acc S_acc nu' + beta_fmt S_format (1 - nu'), nu' linear in the progress nu."""

    accuracy_scale: float = 1.0
    """beta_acc"""
    format_scale: float = 1.0
    """beta_fmt"""
    accuracy_share_start: float = 0.3
    """nu' at progress 0 (ours: some accuracy from the start, or a group that all formats well has no spread)."""
    accuracy_share_end: float = 0.8
    """nu' at progress 1 (ours: format stays worth something)."""
    answer: str = "presence"
    """What S_acc of an answer turn without a call is in the reward: `presence`, ToolRL's rule, gives any text 1;
    `overlap` is `token_overlap` with gold; `package.module:OBJECT` a function of (response text, gold) in [0, 1]. An
    answer that was cut off is worth 0 by each."""
    random: bool = False
    """Train on `random_rewards` instead (a control: what is learnt without a signal). The two scores stay the rule's,
    and a call of the rule knows nothing of it."""

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy_share_start <= self.accuracy_share_end <= 1:
            raise UserError(
                f"accuracy_share_start {self.accuracy_share_start}, accuracy_share_end {self.accuracy_share_end}",
                "0 <= start <= end <= 1",
                "change one of them",
            )
        if not (0 <= self.accuracy_scale < float("inf") and 0 <= self.format_scale < float("inf")):
            raise UserError(
                f"scales {self.accuracy_scale} and {self.format_scale}", "finite numbers >= 0", "change the scale"
            )
        load_answer_function(self.answer)

    def __call__(self, judgement: Judgement, progress: float, step: float | None = None) -> Reward:
        check_progress(progress)
        share = self.accuracy_share_start + (self.accuracy_share_end - self.accuracy_share_start) * progress
        accuracy, explanation = judgement.accuracy, judgement.explanation
        if judgement.gold.turn == "answers" and judgement.gold.answer is not None and accuracy == 1:
            accuracy = self._answer_score(judgement, judgement.gold.answer)
            if accuracy < 1:
                explanation += (ScoreFinding("answer", f"the answer is worth {accuracy:.2f} of 1", 1 - accuracy),)
        total = self.accuracy_scale * accuracy * share + self.format_scale * judgement.format * (1 - share)
        return Reward(total, judgement.format, accuracy, explanation)

    def _answer_score(self, judgement: Judgement, wanted: str) -> float:
        if judgement.truncated:
            return 0.0
        if (own := load_answer_function(self.answer)) is None:
            return 1.0 if self.answer == "presence" else token_overlap(judgement.parsed.answer or "", wanted)
        worth = own(judgement.text, judgement.gold)
        try:
            number = float(worth)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise UserError(f"{worth!r:.80} from the answer reward {self.answer}", "a number in [0, 1]", "scale it")
        return number


@dataclass(frozen=True)
class AuthorsReward:
    """The published code's reward, whose schedule counts batches of responses: `step`, or progress * 150.

    Its format and accuracy are that code's raw scores, which add up to the reward. Like that code it reads the text
    only and does not know whether it was cut off.
    """

    rule: Literal["authors-code"] = "authors-code"

    def __call__(self, judgement: Judgement, progress: float, step: float | None = None) -> Reward:
        from rest_rl.authors_code import authors_reward, authors_step  # numpy, which no other reward needs

        step = authors_step(progress) if step is None else step
        if not 0 <= step < float("inf"):
            raise UserError(f"step {step}", "a number >= 0", "count the batches of responses from 0")
        well_formatted, correctness = authors_reward(judgement.text, judgement.gold, step)
        findings = (
            ScoreFinding("format", f"published format score {well_formatted:g}", 0.0),
            ScoreFinding("value", f"published correctness score {correctness:g}", 0.0),
        )
        return Reward(well_formatted + correctness, well_formatted, correctness, findings)


@cache
def load_answer_function(name: str) -> UserObject | None:
    """The function of (response text, gold) that `RewardConfig.answer` names; None for `presence` and `overlap`."""
    if name in ("presence", "overlap"):
        return None
    if ":" not in name:
        expected = "presence, overlap, or package.module:OBJECT"
        raise UserError(f"rest.reward.answer = {name!r}", expected, "choose one of them")
    own = UserObject(name, "answer reward", {})
    check_signature(own.target, f"answer reward {name!r}", "text", "gold")
    return own


def token_overlap(text: str, wanted: str) -> float:
    """F1 of the lower-cased word tokens of two texts, counted as multisets; 1 for equal texts.

    Example: `token_overlap("It is Paris", "Paris") == 2 * 1 / (3 + 1)`.
    """
    if text.strip() == wanted.strip():
        return 1.0
    made, gold = (Counter(re.findall(r"\w+", each.lower())) for each in (text, wanted))
    return 2 * (made & gold).total() / ((made.total() + gold.total()) or 1)


def judge(
    text: str, gold: Gold, format: str | ToolFormat = "toolrl", *, spans: bool = False, truncated: bool = False
) -> Judgement:
    """Read a response and score it against gold; malformed text scores low and never raises.

    `spans` also locates the regions (`judgement.parsed.spans`), which takes longer. `truncated`: the response does not
    end with an end of sequence, so it has no S_format and is no exact match.
    """
    parsed = get_format(format).parse(text, spans=spans)
    return judge_parsed(parsed, gold, text, truncated=truncated)


def judge_parsed(parsed: ParsedResponse, gold: Gold, text: str = "", *, truncated: bool = False) -> Judgement:
    """Score a response that has been read already; `text` is kept for rewards that look at it."""
    well_formatted, format_findings = format_score(parsed, gold)
    if truncated:
        messages = ("the response is cut off before its end", *(found.message for found in format_findings))
        well_formatted, format_findings = 0.0, (ScoreFinding("format", "; ".join(messages), 1.0),)
    accuracy, accuracy_findings = accuracy_score(parsed, gold)
    return Judgement(text, gold, parsed, well_formatted, accuracy, format_findings + accuracy_findings, truncated)


def apply_reward(rule: RewardRule, judgement: Judgement, progress: float, step: float | None = None) -> Reward:
    """The rule's reward; a rule that returns a plain number keeps the judgement's own scores beside it."""
    found = rule(judgement, progress, step)
    total = found.total if isinstance(found, Reward) else found
    try:
        number = float(total)
    except (TypeError, ValueError):
        raise UserError(
            f"a {type(total).__name__} from the reward {display_name(rule)}",
            "a number",
            "return a float from the function",
        ) from None
    if not math.isfinite(number):  # TRL takes NaN for a reward of 0
        raise UserError(
            f"{number} from the reward {display_name(rule)}", "a finite number", "guard the function against it"
        )
    if isinstance(found, Reward):
        return found._replace(total=number)
    return Reward(number, judgement.format, judgement.accuracy, judgement.explanation)


@cache
def try_reward(rule: RewardRule) -> None:
    """Reward a right call, a response without the call, and an answer; UserError for a rule that fails on one."""
    call, answer = Gold((ToolCall("f", {"a": 1}),)), Gold(answer="It rains.")
    right = get_format("hermes").render(None, call.calls, None)
    with wrap_user_errors(
        f"reward {display_name(rule)!r}", "a function (judgement, progress, step) that returns a number"
    ):
        for text, gold in ((right, call), ("", call), ("It rains.", answer)):
            apply_reward(rule, judge(text, gold, "hermes"), 0.0, 1)


def uses_random_rewards(rule: RewardRule) -> bool:
    """Whether training learns from `random_rewards` instead of what the rule returns."""
    return isinstance(rule, RewardConfig) and rule.random


def random_rewards(count: int, seed: int, step: int, first: int = 0) -> list[float]:
    """Rewards in [0, 1) that know nothing of the responses: positions `first` to `first + count` of a batch.

    They depend on the seed, the step and the position only, so a resumed run draws the same ones:
    `random_rewards(2, s, k, first=3) == random_rewards(5, s, k)[3:]`.
    """
    draws = random.Random(f"{seed} {step}")
    return [draws.random() for _ in range(first + count)][first:]


def format_score(parsed: ParsedResponse, gold: Gold) -> tuple[float, tuple[ScoreFinding, ...]]:
    """S_format in {0, 1}: the blocks that gold needs and no others, each once, complete, in order.

    Where the answer is untagged text, text beside calls is allowed. What the blocks hold is not judged here.
    """
    problem = _format_problem(parsed, gold)
    return (1.0, ()) if problem is None else (0.0, (ScoreFinding("format", problem, 1.0),))


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


def accuracy_score(parsed: ParsedResponse, gold: Gold) -> tuple[float, tuple[ScoreFinding, ...]]:
    """S_acc in [0, 1] = (r_name + r_keys + r_values) / (1 + |Gold| + sum_j |keys(G_j)|).

    r_name is the multiset Jaccard of tool names, r_keys the sum of Jaccards of argument names, r_values the number of
    equal argument values, under the best one-to-one assignment of predicted to gold calls of the same name. Stretches
    of a call block that are not a call count as calls of no known name. Where the format writes values as text, a gold
    string also equals the value that its text spells. Without gold calls: 1 if no call was attempted, else 0.
    """
    if not gold.calls:
        if not parsed.attempted_call:
            return 1.0, ()
        return 0.0, (ScoreFinding("unneeded_call", "a call was made where none is needed", 1.0),)
    points = 1 + len(gold.calls) + sum(len(call.arguments) for call in gold.calls)
    findings: list[ScoreFinding] = []
    names = _name_score(parsed, gold, points, findings)
    equal = text_equal if parsed.text_values else json_equal
    matched = 0.0
    for call, partner in zip(gold.calls, _match_calls(gold.calls, parsed.calls, equal), strict=True):
        if partner is None:
            cost = (1 + len(call.arguments)) / points
            findings.append(
                ScoreFinding("missing_call", f"no call of {_show(call.name)} was made for a gold call", cost)
            )
        else:
            matched += _call_score(call, partner, points, findings, equal)
    return (names + matched) / points, tuple(findings)


def _name_score(parsed: ParsedResponse, gold: Gold, points: int, findings: list[ScoreFinding]) -> float:
    wanted, made = [call.name for call in gold.calls], [call.name for call in parsed.calls]
    if not parsed.unreadable_calls and sorted(wanted) == sorted(made):
        return 1.0
    wanted, made = Counter(wanted), Counter(made)
    common = sum((wanted & made).values())
    union = len(gold.calls) + len(parsed.calls) + parsed.unreadable_calls - common
    parts = _describe_differences(list((wanted - made).elements()), list((made - wanted).elements()))
    parts += [f"{parsed.unreadable_calls} unreadable"] * bool(parsed.unreadable_calls)
    findings.append(ScoreFinding("names", "tool names: " + ", ".join(parts), (1 - common / union) / points))
    return common / union


def _call_score(gold: ToolCall, made: ToolCall, points: int, findings: list[ScoreFinding], equal: _Equality) -> float:
    """Jaccard of the argument names plus the number of equal values, each loss recorded."""
    wanted, given = gold.arguments, made.arguments
    keys = 1.0
    if wanted.keys() != given.keys():
        keys = _jaccard(wanted, given)
        missing = [key for key in wanted if key not in given]
        parts = _describe_differences(missing, [key for key in given if key not in wanted])
        findings.append(
            ScoreFinding("keys", f"arguments of {_show(gold.name)}: " + ", ".join(parts), (1 - keys) / points)
        )
        for key in missing:
            message = f"{_show(gold.name)}: no value for {_show(key)}, expected {_show(wanted[key])}"
            findings.append(ScoreFinding("missing_argument", message, 1 / points))
    values = 0
    for key, value in wanted.items():
        if key not in given:
            continue
        if equal(value, given[key]):
            values += 1
        else:
            message = f"{_show(gold.name)}: {_show(key)} got {_show(given[key])}, expected {_show(value)}"
            findings.append(ScoreFinding("value", message, 1 / points))
    return keys + values


def _similarity(gold: ToolCall, made: ToolCall, equal: _Equality) -> float:
    wanted, given = gold.arguments, made.arguments
    values = sum(key in given and equal(value, given[key]) for key, value in wanted.items())
    return _jaccard(wanted, given) + values


def _jaccard(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    common = len(left.keys() & right.keys())
    union = len(left) + len(right) - common
    return common / union if union else 1.0


def _match_calls(gold: Sequence[ToolCall], made: Sequence[ToolCall], equal: _Equality) -> list[ToolCall | None]:
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
            for row, column in _best_assignment(
                [[_similarity(gold[i], call, equal) for call in columns] for i in rows]
            ):
                partners[rows[row]] = columns[column]
    return partners


def _best_assignment(scores: list[list[float]]) -> list[tuple[int, int]]:
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
    return isinstance(wanted, str) and not isinstance(given, str) and json_equal(parse_bare_value(wanted), given)


def _describe_differences(missing: list[str], extra: list[str]) -> list[str]:
    return [f"{word} {_show(items[:8])}" for word, items in (("missing", missing), ("extra", extra)) if items]


def _show(value: Any) -> str:
    text = (
        encode_basestring(value[:80]) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    )
    return text if len(text) <= 80 else text[:77] + "..."

"""Scores responses against gold turns: format, accuracy, what each mistake costs, and the reward.

The scores follow ToolRL (arXiv 2504.13958, section 3.3), with an optimal instead of a greedy assignment of calls.
They ignore the text of an answer (see `RewardConfig.answer`), the content of the reasoning, and the types in a tool's
schema.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, pairwise
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, Protocol

from rest_rl.errors import UserError
from rest_rl.formats import ToolFormat, get_format
from rest_rl.json_spans import parse_bare_value, scan_object
from rest_rl.objects import UserObject, check_signature, display_name, wrap_user_errors
from rest_rl.response import Gold, ParsedResponse, Region, Span, ToolCall, check_progress

_Equality = Callable[[Any, Any], bool]
FindingKind = Literal["format", "unneeded_call", "names", "missing_call", "keys", "missing_argument", "value", "answer"]


# Gold turns on which `AuthorsReward.check` tries a format: one call, two calls, a call without arguments, an answer.
EXAMPLE_GOLDS = (
    Gold((ToolCall("f", {"a": 1}),)),
    Gold((ToolCall("f", {"a": "x", "b": [1]}), ToolCall("g", {"c": True}))),
    Gold((ToolCall("f", {}),)),
    Gold(answer="It rains."),
)


# Later decisions of a response share its last stage, which bounds the time that a hostile response takes.
MAX_DECISIONS = 64


class ScoreFinding(NamedTuple):
    """A mistake in a response and what it costs.

    `cost` is a share of S_format for the kind `format`, and of S_acc for other kinds, whose costs add up to 1 - S_acc.
    """

    kind: FindingKind
    message: str
    cost: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """The scores of a response, which do not depend on the training progress, and the mistakes that lowered them."""

    text: str
    gold: Gold
    parsed: ParsedResponse
    format: float
    """S_format in {0, 1}."""
    accuracy: float
    """S_acc in [0, 1]."""
    explanation: tuple[ScoreFinding, ...]
    truncated: bool = False
    """Whether the response was cut off at the length limit; S_format is then 0."""

    @property
    def exact_match(self) -> bool:
        """Whether the response is complete, has the required blocks and exactly the gold calls."""
        return self.format == self.accuracy == 1


class Reward(NamedTuple):
    """The reward of a response, the two scores it combines, and the mistakes that lowered them."""

    total: float
    format: float
    accuracy: float
    explanation: tuple[ScoreFinding, ...]


class RewardRule(Protocol):
    """Turns a judgement into a reward; you can pass your own function wherever a name is accepted.

    `progress` is the curriculum progress nu in [0, 1]. `step` counts the batches of responses from 1 and is None
    outside training. Return the reward, or a `Reward` to also replace the scores that are reported with it.

    Optional attribute: `check(format)` raises `UserError` if the rule cannot score responses in this `ToolFormat`.
    """

    def __call__(self, judgement: Judgement, progress: float, step: float | None = None) -> float | Reward: ...


@dataclass(frozen=True)
class RewardConfig:
    """ResT's reward R = beta_acc S_acc nu' + beta_fmt S_format (1 - nu'), with nu' linear in the progress nu.

    The sources on the paper disagree about nu', and its constants are not published (docs/method.md). The defaults
    follow the published code, in which accuracy makes up 1/2 of the reward's range at step 0 and 3/4 at step 150. The
    equation on the paper's poster is nu' = 1 - nu (shares 1 and 0). Equal shares give a static reward.
    """

    accuracy_scale: float = 1.0
    """beta_acc (not published; ours)"""
    format_scale: float = 1.0
    """beta_fmt (not published; ours)"""
    accuracy_share_start: float = 0.5
    """nu' at progress 0 (not published; ours)"""
    accuracy_share_end: float = 0.75
    """nu' at progress 1 (not published; ours); it may be lower than at the start"""
    answer: str = "presence"
    """How to score an answer turn if the response calls no tool: `presence` sets S_acc to 1 for any text (as in
    ToolRL), `overlap` to the `token_overlap` with the gold answer, and `package.module:OBJECT` to the result of your
    function of (response text, gold), in [0, 1]. S_acc is 0 if the response was cut off."""
    random: bool = False
    """Train on `random_rewards` as a control. The trainer replaces the rewards; this rule still returns the real
    reward, and the reported scores stay correct."""

    def __post_init__(self) -> None:
        for name in ("accuracy_share_start", "accuracy_share_end"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise UserError(f"{name} is {share}", "a number in [0, 1]", "change it")
        if not (0 <= self.accuracy_scale < float("inf") and 0 <= self.format_scale < float("inf")):
            scales = f"accuracy_scale is {self.accuracy_scale} and format_scale {self.format_scale}"
            raise UserError(scales, "finite numbers, at least 0", "change them")
        load_answer_function(self.answer)

    def __call__(self, judgement: Judgement, progress: float, step: float | None = None) -> Reward:
        share = self.accuracy_share(progress)
        accuracy, explanation = judgement.accuracy, judgement.explanation
        # An answer was expected, and no call was attempted. The extra finding keeps the sum of the costs at 1 - S_acc.
        if judgement.gold.turn == "answers" and judgement.gold.answer is not None and accuracy == 1:
            accuracy = self._answer_score(judgement, judgement.gold.answer)
            if accuracy < 1:
                explanation += (ScoreFinding("answer", f"the answer scores {accuracy:.2f} of 1", 1 - accuracy),)
        total = self.accuracy_scale * accuracy * share + self.format_scale * judgement.format * (1 - share)
        return Reward(total, judgement.format, accuracy, explanation)

    def accuracy_share(self, progress: float) -> float:
        """Return nu', the share of the accuracy in the reward at this progress."""
        check_progress(progress)
        return self.accuracy_share_start + (self.accuracy_share_end - self.accuracy_share_start) * progress

    def _answer_score(self, judgement: Judgement, wanted: str) -> float:
        if judgement.truncated:
            return 0.0
        if (own := load_answer_function(self.answer)) is None:
            return 1.0 if self.answer == "presence" else token_overlap(judgement.parsed.answer or "", wanted)
        value = own(judgement.text, judgement.gold)
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= 1:
            problem = f"the answer reward {self.answer} returned {value!r:.80}"
            raise UserError(problem, "a number in [0, 1]", "rescale it")
        return score


@dataclass(frozen=True)
class AuthorsReward:
    """The reward of the ResT authors' published code; it depends on the batch number (`step`, or progress * 150).

    `format` and `accuracy` of the result are that code's two scores, whose sum is the reward. As in that code,
    responses that were cut off are scored like all others.
    """

    rule: Literal["authors-code"] = "authors-code"

    def check(self, format: ToolFormat) -> None:
        """Raise UserError if a gold response in this format does not get full marks.

        The published code reads the tags of `toolrl` and the key `parameters`. In any other format, training would
        reward the wrong text.
        """
        if not _gets_full_marks(format):
            raise UserError(
                f"the reward of 'authors-code' gives gold responses in the format {format.name!r} less than full marks",
                "the format toolrl",
                "set rest.format = 'toolrl', or choose another preset",
            )

    def __call__(self, judgement: Judgement, progress: float, step: float | None = None) -> Reward:
        from rest_rl.authors_code import authors_reward, authors_step  # numpy, which no other reward needs

        step = authors_step(progress) if step is None else step
        if not 0 <= step < float("inf"):
            raise UserError(f"step is {step}", "a number, at least 0", "pass the number of the batch")
        well_formatted, correctness = authors_reward(judgement.text, judgement.gold, step)
        findings = (
            ScoreFinding("format", f"published format score {well_formatted:g}", 0.0),
            ScoreFinding("value", f"published correctness score {correctness:g}", 0.0),
        )
        return Reward(well_formatted + correctness, well_formatted, correctness, findings)


@cache  # `score_response` asks for every response
def _gets_full_marks(tool_format: ToolFormat) -> bool:
    from rest_rl.authors_code import HIGHEST_SCORES, authors_reward

    best_format, best_call = HIGHEST_SCORES
    return all(
        authors_reward(tool_format.render("a thought", gold.calls, gold.answer), gold, 0)
        == (best_format, best_call if gold.calls else 0.0)
        for gold in EXAMPLE_GOLDS
    )


@cache
def load_answer_function(name: str) -> UserObject | None:
    # The user's function of (response text, gold), or None for the two built-in ways.
    if name in ("presence", "overlap"):
        return None
    if ":" not in name:
        expected = "presence, overlap, or package.module:OBJECT"
        raise UserError(f"rest.reward.answer is {name!r}", expected, "change it")
    own = UserObject(name, "answer reward", {})
    check_signature(own.target, f"answer reward {name!r}", "text", "gold")
    return own


def token_overlap(text: str, wanted: str) -> float:
    """Return the F1 score of the lower-cased words of two texts, as multisets; 1 for equal texts.

    Example: `token_overlap("It is Paris", "Paris") == 2 * 1 / (3 + 1)`.
    """
    if text.strip() == wanted.strip():
        return 1.0
    made, gold = (Counter(re.findall(r"\w+", each.lower())) for each in (text, wanted))
    return 2 * (made & gold).total() / ((made.total() + gold.total()) or 1)


def judge(
    text: str, gold: Gold, format: str | ToolFormat = "toolrl", *, spans: bool = False, truncated: bool = False
) -> Judgement:
    """Parse a response and score it against gold; malformed text scores low and never raises.

    `spans` also locates the regions (`judgement.parsed.spans`), which takes longer. Set `truncated` for a response
    that was cut off; S_format is then 0.
    """
    parsed = get_format(format).parse(text, spans=spans)
    return judge_parsed(parsed, gold, text, truncated=truncated)


def judge_parsed(parsed: ParsedResponse, gold: Gold, text: str = "", *, truncated: bool = False) -> Judgement:
    """Score a parsed response; `text` is the response itself, which some reward rules need."""
    well_formatted, format_findings = format_score(parsed, gold)
    if truncated:
        messages = ("the response was cut off", *(found.message for found in format_findings))
        well_formatted, format_findings = 0.0, (ScoreFinding("format", "; ".join(messages), 1.0),)
    accuracy, accuracy_findings = accuracy_score(parsed, gold)
    return Judgement(text, gold, parsed, well_formatted, accuracy, format_findings + accuracy_findings, truncated)


def apply_reward(rule: RewardRule, judgement: Judgement, progress: float, step: float | None = None) -> Reward:
    """Apply a reward rule; if the rule returns a plain number, take the other fields from the judgement."""
    found = rule(judgement, progress, step)
    total = found.total if isinstance(found, Reward) else found
    try:
        number = float(total)
    except (TypeError, ValueError):
        problem = f"the reward {display_name(rule)} returned a value of type {type(total).__name__}"
        raise UserError(problem, "a number", "return a float") from None
    if not math.isfinite(number):  # TRL 1.x adds up rewards with nansum: NaN would silently be 0
        problem = f"the reward {display_name(rule)} returned {number}"
        raise UserError(problem, "a finite number", "handle this case in the function")
    if isinstance(found, Reward):
        return found._replace(total=number)
    return Reward(number, judgement.format, judgement.accuracy, judgement.explanation)


def check_reward_rule(rule: RewardRule, format: ToolFormat) -> None:
    """Raise UserError if the reward rule cannot score responses in this format."""
    if check := getattr(rule, "check", None):
        check(format)


@cache
def try_reward(rule: RewardRule) -> None:
    """Try a reward rule on a correct call, a missing call and an answer; UserError if it fails on any of them."""
    call, answer = Gold((ToolCall("f", {"a": 1}),)), Gold(answer="It rains.")
    right = get_format("hermes").render(None, call.calls, None)
    with wrap_user_errors(
        f"reward {display_name(rule)!r}", "a function (judgement, progress, step) that returns a number"
    ):
        for text, gold in ((right, call), ("", call), ("It rains.", answer)):
            apply_reward(rule, judge(text, gold, "hermes"), 0.0, 1)


def uses_random_rewards(rule: RewardRule) -> bool:
    """Whether the trainer replaces the rule's rewards by `random_rewards`."""
    return isinstance(rule, RewardConfig) and rule.random


def random_rewards(count: int, seed: int, step: int, first: int = 0) -> list[float]:
    """Return uniform random rewards in [0, 1) for positions `first` to `first + count` of a batch.

    They depend only on the seed, the step and the position, so a resumed run draws the same ones:
    `random_rewards(2, s, k, first=3) == random_rewards(5, s, k)[3:]`.
    """
    draws = random.Random(f"{seed} {step}")
    return [draws.random() for _ in range(first + count)][first:]


def format_score(parsed: ParsedResponse, gold: Gold) -> tuple[float, tuple[ScoreFinding, ...]]:
    """Return S_format in {0, 1} and the mistakes that lowered it.

    S_format is 1 if the response has exactly the blocks that the gold turn requires, complete and in order. Formats
    with untagged answers allow text next to calls. The content of the blocks does not matter.
    """
    problem = _format_problem(parsed, gold)
    return (1.0, ()) if problem is None else (0.0, (ScoreFinding("format", problem, 1.0),))


def _format_problem(parsed: ParsedResponse, gold: Gold) -> str | None:
    if not parsed.well_formed:
        return "; ".join(parsed.problems[:3]) or "the blocks are incomplete or out of order"
    if (parsed.attempted_call or bool(parsed.calls)) != bool(gold.calls):
        return "the call block is missing" if gold.calls else "no call block was expected"
    if gold.answer is not None and parsed.answer is None:
        return "the answer is missing"
    if gold.answer is None and parsed.answer is not None and not parsed.untagged_answer:
        return "no answer block was expected"
    return None


def accuracy_score(parsed: ParsedResponse, gold: Gold) -> tuple[float, tuple[ScoreFinding, ...]]:
    """Return S_acc in [0, 1] = (r_name + r_keys + r_values) / (1 + |Gold| + sum_j |keys(G_j)|), and the mistakes.

    G_j are the gold calls. r_name is the Jaccard index of the multisets of tool names. Under the best one-to-one
    assignment of predicted to gold calls of the same name, r_keys sums the Jaccard indices of the argument names, and
    r_values counts the equal values. Unreadable calls count as calls of an unknown tool. If the format writes values as
    text, `text_equal` compares them. Without gold calls, S_acc is 1 if no call was attempted and 0 otherwise.
    """
    if not gold.calls:
        if not parsed.attempted_call:
            return 1.0, ()
        return 0.0, (ScoreFinding("unneeded_call", "a tool was called, but no call was expected", 1.0),)
    # The maximum: 1 point for the tool names; for each gold call 1 for its argument names and 1 per value.
    points = 1 + len(gold.calls) + sum(len(call.arguments) for call in gold.calls)
    findings: list[ScoreFinding] = []
    names = _name_score(parsed, gold, points, findings)
    equal = text_equal if parsed.text_values else json_equal
    matched = 0.0
    for call, partner in zip(gold.calls, _match_calls(gold.calls, parsed.calls, equal), strict=True):
        if partner is None:
            cost = (1 + len(call.arguments)) / points
            findings.append(ScoreFinding("missing_call", f"no call matches the gold call of {_show(call.name)}", cost))
        else:
            matched += _call_score(call, partner, points, findings, equal)
    return (names + matched) / points, tuple(findings)


def match_calls_by_stage(calls_by_stage: Sequence[Sequence[ToolCall]], gold_calls: Sequence[ToolCall]) -> list[float]:
    """Return what the calls of each stage of a trajectory add to the S_acc of all calls so far.

    The sum is the S_acc of all calls, in [0, 1]. A superfluous call makes it smaller, so a reward can be negative.
    Without gold calls the first stage has 1, and the first stage with a call has -1 (0 if it is the same one).
    """
    # MatchTIR (arXiv 2601.10712) assigns all calls at once. The reward of a turn then depends on later turns, whose
    # return-to-go leaves it out, and the credit is biased. These differences depend only on calls up to their stage.
    gold, made = Gold(tuple(gold_calls)), list[ToolCall]()
    scores = [0.0]
    for calls in calls_by_stage:
        made.extend(calls)
        scores.append(_score_calls(made, gold))
    return [after - before for before, after in pairwise(scores)]


def _score_calls(calls: Sequence[ToolCall], gold: Gold, text_values: bool = False) -> float:
    parsed = ParsedResponse(calls=tuple(calls), attempted_call=bool(calls), text_values=text_values)
    return accuracy_score(parsed, gold)[0]


class SplitReward(NamedTuple):
    """The stages of a response and the reward of each; `rewards` adds up to the response's reward."""

    ends: tuple[int, ...]
    """Stage k has the characters from `ends[k - 1]` (0 for the first stage) to `ends[k]`."""
    rewards: tuple[float, ...]


def split_reward(
    judgement: Judgement, format: str | ToolFormat, rule: RewardRule, progress: float, step: float | None = None
) -> SplitReward:
    """Split the reward of a response into stages, each of which ends where the response decides a part of S_acc.

    The parts are each tool name and each argument's name and value. The reward of a stage is the change of the reward's
    accuracy term, for the calls as far as they are decided. The last stage gets the rest: S_format, the score of an
    answer, unreadable calls. There is only one stage if no part can be located and for rules other than `RewardConfig`.
    If the format does not write arguments as JSON, they belong to the stage of the next name.
    """
    total = apply_reward(rule, judgement, progress, step).total
    ends, values = list[int](), [0.0]
    if isinstance(rule, RewardConfig):
        scale = rule.accuracy_scale * rule.accuracy_share(progress)
        for end, calls in islice(_find_decisions(judgement, get_format(format)), MAX_DECISIONS):
            ends.append(end)
            values.append(scale * _score_calls(calls, judgement.gold, judgement.parsed.text_values))
    rewards = [after - before for before, after in pairwise([*values, total])]
    return SplitReward((*ends, len(judgement.text)), tuple(rewards))


_UNDECIDED = object()  # equals no gold value


def _find_decisions(judgement: Judgement, tool_format: ToolFormat) -> Iterator[tuple[int, list[ToolCall]]]:
    # The position after each decision, and the calls as far as they are decided there. A position includes one
    # character after the decided part, because `12` is final only with the comma after it. All of this may depend only
    # on the text before the position, even if the response breaks later; otherwise the credit is biased.
    text, last_end = judgement.text, 0
    decided: list[ToolCall] = []
    parsed = list(judgement.parsed.calls)
    for name, arguments in _locate_calls(text, judgement.parsed.well_formed, tool_format):
        call = ToolCall(text[name.start : name.end], {})
        decided.append(call)
        # A name ends with its quote, parenthesis or tag; in mistral_v11, only the arguments show where it ends.
        name_end = name.end if text[name.end : name.end + 1] in '">(' else arguments.start if arguments else len(text)
        for end, values in chain([(name_end, {})], _find_arguments(text, arguments)):
            decided[-1] = ToolCall(call.name, values)
            if last_end <= end < len(text):
                last_end = end + 1
                yield last_end, decided
        if parsed and parsed[0].name == call.name:
            decided[-1] = parsed.pop(0)


def _locate_calls(text: str, well_formed: bool, tool_format: ToolFormat) -> list[tuple[Span, Span | None]]:
    # The spans of the name and the arguments of each call, or none if arguments come before names. A block that is
    # never closed has no spans; therefore we try the format's tags as its end.
    tails = ("",) if well_formed else ("", *tool_format.tags)
    parts = [
        [span for span in tool_format.parse(text + tail).spans if span.region in (Region.NAME, Region.ARGUMENTS)]
        for tail in tails
    ]
    found: list[tuple[Span, Span | None]] = []
    spans = max(parts, key=len)
    for span in spans if spans and spans[0].region is Region.NAME else ():
        if span.region is Region.NAME:
            found.append((span, None))
        elif found and found[-1][1] is None:
            found[-1] = (found[-1][0], span)
    return found


def _find_arguments(text: str, span: Span | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # The end of each argument's name and value in a JSON object, and the arguments as far as they are decided there.
    if span is None or not text.startswith("{", span.start):
        return
    scan, values = scan_object(text, span.start), dict[str, Any]()
    for entry in scan.entries:
        values = {**values, entry.key: _UNDECIDED}
        yield text.rfind(":", span.start, entry.start), values
        if scan.end > entry.start:  # otherwise the error is in this value
            values = {**values, entry.key: entry.value}
            yield entry.end, values


def _name_score(parsed: ParsedResponse, gold: Gold, points: int, findings: list[ScoreFinding]) -> float:
    # Jaccard index of two multisets. Sorting two short lists is faster than counting, and usually they are equal.
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
    # Jaccard index of the argument names plus the number of equal values; appends what lowered them to `findings`.
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
            message = f"{_show(gold.name)}: {_show(key)} is {_show(given[key])}, expected {_show(value)}"
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
    # For each gold call, its partner among the predicted calls of the same name, or None. Calls of different names
    # never match, so the assignment splits into one problem per name. A single pair needs no scores; other groups are
    # solved optimally by their matrix of similarities (O(n^3), with n rarely above 3).
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
    from scipy.optimize import linear_sum_assignment  # importing scipy takes longer than scoring 1000 responses

    rows, columns = linear_sum_assignment(scores, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def json_equal(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal: 1 == 1.0 but true != 1; the order of keys does not matter."""
    # Python's == is the fast path, because unequal Python values are always unequal JSON values. The reverse does not
    # hold, since True == 1, so equal values are compared again by type.
    if left != right:
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
    """Whether two values are equal in a format that writes all values as text.

    They are if they are `json_equal`, or if the wanted one is a string that spells the given value: `"12345"` equals
    `12345`, because `<parameter=zip>12345` can mean either.
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

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rest_rl.errors import UserError
from rest_rl.formats import FORMATS
from rest_rl.response import Gold, ToolCall, gold_from_json
from rest_rl.rewards import Reward, RewardConfig, accuracy_score, apply_reward, format_score, json_equal, judge
from tests.scores import exact_match, score
from tests.test_formats import calls, calls_for, plain_text, writable
from tests.test_json_spans import json_values

TOOLRL, HERMES = FORMATS["toolrl"], FORMATS["hermes"]


def respond(*made, answer=None, tool_format=TOOLRL):
    return tool_format.parse(tool_format.render("hm", made, answer))


def call(name, **arguments):
    return ToolCall(name, arguments)


def accuracy(gold_calls, made_calls):
    return accuracy_score(respond(*made_calls), Gold(tuple(gold_calls)))[0]


def test_accuracy_by_hand():
    gold = [call("f", a=1, b="x"), call("g")]
    # points: 1 + 2 calls + 2 keys = 5
    assert accuracy(gold, gold) == 1.0
    assert accuracy(gold, gold[::-1]) == 1.0
    # one value wrong: names 1, keys 1 + 1, values 1 -> 4/5
    assert accuracy(gold, [call("f", a=2, b="x"), call("g")]) == pytest.approx(4 / 5)
    # key b missing, c extra: Jaccard 1/3; values 1 (a): names 1 + keys 1/3 + 1 + values 1 = 10/3 of 5
    assert accuracy(gold, [call("f", a=1, c=9), call("g")]) == pytest.approx(2 / 3)
    # g missing: names 1/2, keys 1, values 2 -> 3.5/5
    assert accuracy(gold, [gold[0]]) == pytest.approx(0.7)
    # an extra h: names 2/3, keys 2, values 2 -> 4 2/3 of 5
    assert accuracy(gold, [*gold, call("h")]) == pytest.approx(14 / 15)
    # the wrong tool: names 0, nothing matched
    assert accuracy(gold, [call("h", a=1, b="x")]) == 0.0
    assert accuracy(gold, []) == 0.0


def test_the_assignment_is_optimal_where_a_greedy_one_is_not():
    gold = [call("f", a=1, b=2), call("f", a=1, b=3)]
    made = [call("f", a=1, b=3), call("f", a=5, b=2)]
    # greedy pairs gold 1 with made 1 (value a) on a tie with made 2 (value b), leaving gold 2 with made 2: no value
    # best: gold 1 - made 2 (1 value), gold 2 - made 1 (2 values): names 1 + keys 2 + values 3 = 6 of 1 + 2 + 4 = 7
    assert accuracy(gold, made) == pytest.approx(6 / 7)


@given(
    st.lists(st.builds(call, st.just("f"), a=st.integers(0, 2), b=st.integers(0, 2)), min_size=1, max_size=4), st.data()
)
def test_assignment_equals_the_best_of_all_permutations(gold, data):
    made = data.draw(st.lists(st.builds(call, st.just("f"), a=st.integers(0, 2), c=st.integers(0, 2)), max_size=4))

    def similarity(wanted, given_call):
        keys = wanted.arguments.keys() & given_call.arguments.keys()
        union = wanted.arguments.keys() | given_call.arguments.keys()
        return len(keys) / len(union) + sum(wanted.arguments[k] == given_call.arguments[k] for k in keys)

    padded = [*made, *[None] * max(0, len(gold) - len(made))]
    best = max(
        sum(similarity(wanted, other) for wanted, other in zip(gold, order, strict=False) if other)
        for order in permutations(padded, len(gold))
    )
    common = min(len(gold), len(made))
    names = common / (len(gold) + len(made) - common)
    points = 1 + len(gold) + 2 * len(gold)
    assert accuracy(gold, made) == pytest.approx((names + best) / points)


def test_unreadable_lines_count_as_extra_calls():
    text = '<think> a </think>\n<tool_call>\n{"name": "f", "parameters": {}}\n{"name": "f", "para\n</tool_call>'
    # names 1 / (1 + 1 + 1 - 1) = 1/2, keys 1, points 2 -> 3/4
    value, findings = accuracy_score(TOOLRL.parse(text), Gold((call("f"),)))
    assert value == pytest.approx(3 / 4)
    assert "1 unreadable" in findings[0].message


def test_without_gold_calls_any_call_is_wrong():
    no_calls = Gold((), "sorry")
    assert accuracy_score(respond(answer="sorry"), no_calls)[0] == 1.0
    assert accuracy_score(respond(call("f")), no_calls)[0] == 0.0
    assert accuracy_score(TOOLRL.parse("<think> a </think>\n<tool_call>\n{"), no_calls)[0] == 0.0
    assert accuracy_score(TOOLRL.parse("rubbish"), no_calls)[0] == 1.0


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("<think>a</think><tool_call>\nx\n</tool_call>", Gold((call("f"),)), 1),
        ("<think>a</think><response>b</response>", Gold((), "c"), 1),
        ("<think>a</think>", Gold(), 1),
        ("<think>a</think><tool_call>\nx\n</tool_call><response>b</response>", Gold((call("f"),), "c"), 1),
        ("<think>a</think><tool_call>\nx\n</tool_call>", Gold((call("f"),), "c"), 0),
        ("<think>a</think><tool_call>\nx\n</tool_call><response>b</response>", Gold((call("f"),)), 0),
        ("<think>a</think><response>b</response>", Gold((call("f"),)), 0),
        ("<think>a</think><tool_call>\nx\n</tool_call>", Gold((), "c"), 0),
        ("<tool_call>\nx\n</tool_call>", Gold((call("f"),)), 0),
        ("<think>a</think><response>b</response><tool_call>\nx\n</tool_call>", Gold((call("f"),), "c"), 0),
        ("<think>a</think><think>a</think><response>b</response>", Gold((), "c"), 0),
        ("<think>a</think><response>b", Gold((), "c"), 0),
    ],
)
def test_format_score_requires_the_blocks_of_gold_complete_and_in_order(text, gold, expected):
    assert format_score(TOOLRL.parse(text), gold)[0] == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Sure. <tool_call>\nx\n</tool_call>", Gold((call("f"),)), 1),
        ("<think>a</think>b", Gold((), "c"), 1),
        ("", Gold((), "c"), 0),
        ("b", Gold((call("f"),)), 0),
        ("<tool_call>\nx\n</tool_call>", Gold((), "c"), 0),
        ("b <think>a</think>", Gold((), "c"), 0),
    ],
)
def test_format_score_of_hermes(text, gold, expected):
    assert format_score(HERMES.parse(text), gold)[0] == expected


def test_rescaling_by_hand():
    config = RewardConfig(accuracy_scale=3, format_scale=2, accuracy_share_start=0.25, accuracy_share_end=0.75)
    gold = Gold((call("f", a=1),))
    right_form = respond(call("g", a=1))  # S_format 1, S_acc 0
    # nu = 1/2: nu' = 1/2 -> 3 * 0 * .5 + 2 * 1 * .5 = 1; nu = 0: 2 * .75; nu = 1: 2 * .25
    assert [score(right_form, gold, nu, config).total for nu in (0, 0.5, 1)] == [1.5, 1.0, 0.5]
    # full marks: 3 nu' + 2 (1 - nu')
    assert [score(respond(*gold.calls), gold, nu, config).total for nu in (0, 0.5, 1)] == [2.25, 2.5, 2.75]


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data(), thought=plain_text, answer=st.none() | plain_text, progress=st.floats(0, 1))
def test_gold_scores_full_marks_in_every_format(name, data, thought, answer, progress):
    made = data.draw(calls_for(name))
    assume(writable(name, answer))
    tool_format, gold = FORMATS[name], Gold(tuple(made), answer)
    parsed = tool_format.parse(tool_format.render(thought, made, answer))
    if name != "toolrl" and not made and answer is None:
        return  # an empty response is no answer
    reward = score(parsed, gold, progress)
    assert (reward.format, reward.accuracy, reward.explanation) == (1.0, 1.0, ())
    assert reward.total == pytest.approx(1.0)
    assert exact_match(parsed, gold)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data(), wanted=calls, answer=st.none() | plain_text, progress=st.floats(0, 1))
def test_scores_stay_in_their_bounds_and_costs_add_up(name, data, wanted, answer, progress):
    made = data.draw(calls_for(name))
    assume(writable(name, answer))
    tool_format = FORMATS[name]
    reward = score(tool_format.parse(tool_format.render("a", made, answer)), Gold(tuple(wanted)), progress)
    assert 0 <= reward.total <= 1
    assert reward.format in (0, 1)
    assert 0 <= reward.accuracy <= 1
    assert sum(f.cost for f in reward.explanation if f.kind == "format") == 1 - reward.format
    lost = sum(finding.cost for finding in reward.explanation if finding.kind != "format")
    assert lost == pytest.approx(1 - reward.accuracy, abs=1e-9)


QWEN = FORMATS["qwen3_coder"]


def in_tags(**values: str):
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return QWEN.parse(f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>")


@pytest.mark.parametrize(
    ("gold", "text", "equal"),
    [
        ("12345", "12345", True),  # a string that looks like a number, written without quotes
        ("12345", '"12345"', True),
        ("00501", "00501", True),
        (12345, "12345", True),
        (12345, '"12345"', False),
        (12345, "12345.0", True),  # 1 == 1.0
        ("12345", "12345.0", True),  # both texts spell the same number
        ("12345", "12346", False),
        (True, "True", True),
        (True, "true", True),
        (True, "1", False),  # true != 1
        ("True", "True", True),
        ("True", "1", False),
        ("None", "None", True),
        (None, "None", True),
        ("[1, 2]", "[1, 2]", True),
        ([1, 2], "[1, 2]", True),
        (["1"], "[1]", False),  # inside a list strings have quotes
        ("hello", "hello", True),
        ("hello", '"hello"', False),
    ],
)
def test_a_value_written_as_text_equals_the_string_and_the_value_that_it_spells(gold, text, equal):
    wanted = Gold((call("f", a=gold),))
    parsed = in_tags(a=text)
    # points 1 + 1 call + 1 key = 3: the name, the key and, where equal, the value
    assert accuracy_score(parsed, wanted)[0] == pytest.approx(3 / 3 if equal else 2 / 3)
    assert exact_match(parsed, wanted) is equal


def test_strings_equal_the_values_that_they_spell_only_in_formats_with_text_values():
    gold = Gold((call("f", a="5"),))
    made = FORMATS["hermes"].parse('<tool_call>\n{"name": "f", "arguments": {"a": 5}}\n</tool_call>')
    assert accuracy_score(made, gold)[0] == pytest.approx(2 / 3)


def test_the_assignment_compares_values_as_text():
    gold = Gold((call("f", a="1", b="2"), call("f", a="1", b="3")))
    text = "".join(QWEN.render(None, [call("f", a=1, b=b)], None) for b in (3, 2))
    # written in the other order and without quotes; points 1 + 2 calls + 4 keys, nothing is lost
    assert accuracy_score(QWEN.parse(text), gold)[0] == 1.0


def test_the_explanation_lists_each_mistake():
    gold = Gold((call("f", city="Paris", n=1), call("g")))
    reward = score(respond(call("f", city="Rome", m=1), call("h"), answer="x"), gold)
    messages = {finding.kind: finding.message for finding in reward.explanation}
    assert messages["format"] == "no answer block was expected"
    assert messages["names"] == 'tool names: missing ["g"], extra ["h"]'
    assert messages["keys"] == 'arguments of "f": missing ["n"], extra ["m"]'
    assert messages["missing_argument"] == '"f": no value for "n", expected 1'
    assert messages["value"] == '"f": "city" is "Rome", expected "Paris"'
    assert messages["missing_call"] == 'no call matches the gold call of "g"'


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (False, 0.0, False),
        (True, True, True),
        ({"a": 1, "b": [2.0]}, {"b": [2], "a": 1.0}, True),
        ([1, 2], [2, 1], False),
        ({"a": [True]}, {"a": [1]}, False),
        ("1", 1, False),
        (None, False, False),
        (math.inf, math.inf, True),
        (10**300, 1e300, False),
    ],
)
def test_json_equality(left, right, equal):
    assert json_equal(left, right) is equal
    assert json_equal(right, left) is equal


@given(json_values)
def test_json_equality_is_reflexive(value):
    assert json_equal(value, value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "NoneType"),
        ([], "list"),
        ({}, "calls, answer"),
        ({"call": []}, "calls, answer"),
        ({"calls": {}}, "expected a list"),
        ({"calls": [{"name": "f"}]}, "gold call 1 \\('f'\\)"),
        ({"calls": [{"name": 1, "arguments": {}}]}, "gold call 1"),
        ({"calls": [], "answer": 3}, "string or null"),
    ],
)
def test_invalid_gold_is_an_error(value, message):
    with pytest.raises(ValueError, match=message):
        gold_from_json(value)


def test_gold_from_json():
    assert gold_from_json({"calls": [{"name": "f", "arguments": {"a": 1}}]}) == Gold((call("f", a=1),), None)
    assert gold_from_json({"answer": "x"}) == Gold((), "x")
    assert gold_from_json({"calls": [], "answer": " "}) == Gold()  # no format can tell a blank answer from none


@pytest.mark.parametrize("number", [math.nan, math.inf, "high", None])
@pytest.mark.parametrize("wrap", [lambda number: number, lambda number: Reward(number, 1.0, 1.0, ())])
def test_a_reward_must_be_a_finite_number(number, wrap):
    def own(judgement, progress, step=None):
        return wrap(number)

    with pytest.raises(UserError, match="own"):
        apply_reward(own, judge("", Gold((), "b")), 0.0)


def test_invalid_reward_settings_and_progress_are_errors():
    with pytest.raises(ValueError, match="accuracy_share_end"):
        RewardConfig(accuracy_share_start=0.9, accuracy_share_end=1.1)
    with pytest.raises(ValueError, match="format_scale -1"):
        RewardConfig(format_scale=-1)
    with pytest.raises(ValueError, match="progress"):
        score(respond(), Gold(), 2.0)

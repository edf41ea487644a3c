"""Parts of BFCL samples: tools from function documents, gold from alternatives, averages of categories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from rest_rl.envs.bfcl_sandbox.entries import coerce_value, find_call_problem, parameter_schemas, to_tools
from rest_rl.evaluate.benchmarks.bfcl import groups
from rest_rl.evaluate.benchmarks.bfcl.gold import build_gold, java_literal, javascript_literal, plausible_call
from rest_rl.evaluate.benchmarks.bfcl.groups import Version, official_averages, select_categories
from rest_rl.response import Gold, ToolCall

TYPES = {"dict": "object", "float": "number", "string": "string", "integer": "integer", "array": "array",
         "tuple": "array", "any": "string", "boolean": "boolean"}  # fmt: skip


def test_function_documents_become_tools() -> None:
    doc = {
        "name": "trip.plan",
        "description": "Plan.",
        "parameters": {
            "type": "dict",
            "properties": {
                "stops": {
                    "type": "array",
                    "items": {"type": "dict", "properties": {"at": {"type": "float"}}, "required": ["at"]},
                },
                "mode": {"type": "any", "description": "How.", "default": "car"},
            },
            "required": ["stops"],
        },
        "response": {"type": "dict"},
    }
    stops = {"type": "array", "items": {"type": "object", "properties": {"at": {"type": "number"}}, "required": ["at"]}}
    mode = {"type": "string", "description": "How.", "default": "car"}
    parameters = {"type": "object", "properties": {"stops": stops, "mode": mode}, "required": ["stops"]}
    function = {"name": "trip.plan", "description": "Plan.", "parameters": parameters, "response": {"type": "dict"}}
    assert to_tools([doc], TYPES) == ({"type": "function", "function": function},)
    assert parameter_schemas(to_tools([doc], TYPES)) == {"trip.plan": {"stops": stops, "mode": mode}}


@pytest.mark.parametrize(
    ("value", "kind", "meant"),
    [
        (5, "string", "5"), (True, "string", "true"), ([1], "string", "[1]"), ("5", "string", "5"), ("5", "integer", 5),
        ("2.5", "integer", "2.5"), ("2.5", "number", 2.5), ("true", "integer", "true"), ("true", "boolean", True),
        ("True", "boolean", True), ("['a']", "array", ["a"]), ("{'a': 1}", "object", {"a": 1}), ("x", "array", "x"),
        (7, "number", 7), ("7", None, "7"), ("__import__('os')", "object", "__import__('os')"),
    ],
)  # fmt: skip
def test_text_is_converted_by_the_schema(value: Any, kind: str | None, meant: Any) -> None:
    found = coerce_value(value, {"type": kind} if kind else {})
    assert (found, type(found)) == (meant, type(meant))


def test_problems_of_a_call_are_described() -> None:
    tools = {"cat": {"file_name": {"type": "string"}}, "pwd": {}}
    assert find_call_problem(ToolCall("cat", {"file_name": "x"}), tools) == ""
    assert find_call_problem(ToolCall("dog", {}), tools) == "there is no tool named 'dog'"
    assert (
        find_call_problem(ToolCall("cat", {"name": 1}), tools)
        == "cat has no argument 'name'; its arguments are file_name"
    )
    assert find_call_problem(ToolCall("pwd", {"x": 1}), tools) == "pwd has no argument 'x'; its arguments are none"
    assert "too large" in find_call_problem(ToolCall("cat", {"file_name": "x" * 1_000_001}), tools)


def test_the_first_alternative_is_the_gold() -> None:
    properties = {name: {"type": "string"} for name in "abcde"}
    doc = {"name": "f", "parameters": {"type": "dict", "properties": properties, "required": ["a"]}}
    answer = {
        "a": ["", "needed"],
        "b": ["one", ""],
        "c": [{"x": ["", 1], "y": [2, 3]}],
        "d": [[{"x": [1, 2]}, {"x": [3]}]],
        "e": ["first", "second"],
    }
    entry = {"category": "multiple", "checked": [doc], "ground_truth": [{"f": answer}]}
    expected = {"a": "needed", "c": {"y": 2}, "d": [{"x": 1}, {"x": 3}], "e": "first"}
    assert build_gold(entry) == Gold((ToolCall("f", expected),))
    assert build_gold({**entry, "category": "irrelevance"}).calls == ()
    assert build_gold({**entry, "category": "live_relevance"}).calls == (ToolCall("f", {"a": "text"}),)
    numbers = {"type": "dict", "properties": {"n": {"type": "integer"}, "l": {"type": "array"}}, "required": ["n", "l"]}
    assert plausible_call({"name": "g", "parameters": numbers}).arguments == {"n": 1, "l": []}


@pytest.mark.parametrize(
    ("value", "schema", "literal"),
    [
        (42, {"type": "long"}, "42L"),
        (42, {"type": "integer"}, "42"),
        (0.5, {"type": "double"}, "0.5"),
        (0.5, {"type": "float"}, "0.5f"),
        (True, {"type": "boolean"}, "true"),
        ("name", {"type": "String"}, "name"),
        ([1, 2], {"type": "Array", "items": {"type": "integer"}}, "new int[]{1, 2}"),
        (["a", "b"], {"type": "Array", "items": {"type": "String"}}, "new String[]{a, b}"),
        (["a"], {"type": "ArrayList", "items": {"type": "String"}}, 'new ArrayList<>(Arrays.asList("a"))'),
        ([5], {"type": "ArrayList", "items": {"type": "long"}}, "new ArrayList<>(Arrays.asList(5L))"),
        ({"k": "v", "n": 1}, {"type": "HashMap"}, 'new HashMap<String, Object>() {{ put("k", "v"); put("n", 1); }}'),
    ],
)  # fmt: skip
def test_java_literals(value: Any, schema: Mapping[str, Any], literal: str) -> None:
    assert java_literal(value, schema) == literal


@pytest.mark.parametrize(
    ("value", "schema", "literal"),
    [
        (5, {"type": "Bigint"}, "5n"),
        (5.0, {"type": "float"}, "5.0"),
        (True, {"type": "Boolean"}, "true"),
        ("x", {"type": "String"}, "x"),
        (["a", 1], {"type": "array"}, '["a", 1]'),
        ({"a": [True]}, {"type": "dict"}, '{"a": [true]}'),
        ({}, {"type": "dict"}, "{}"),
    ],
)
def test_javascript_literals(value: Any, schema: Mapping[str, Any], literal: str) -> None:
    assert javascript_literal(value, schema) == literal


def test_categories_are_selected_by_name_or_group() -> None:
    assert len(select_categories("v3", None)) == len(select_categories("v4", ["all"])) == 17
    assert select_categories("v3", ["live_simple", "java"]) == ("java", "live_simple")
    assert select_categories("v4", ["multi_turn"]) == groups.MULTI_TURN
    assert len(select_categories("v4", ["non_live", "multiple"])) == 7
    with pytest.raises(ValueError, match=r"BFCL v4 has no category 'simple_pyton'.*did you mean simple_python\?"):
        select_categories("v4", ["simple_pyton"])
    with pytest.raises(ValueError, match="no category"):
        select_categories("v4", [])


NON_LIVE_CORRECT = [(380, 400), (60, 100), (25, 50), (180, 200), (160, 200), (140, 200), (120, 240)]
LIVE_CORRECT = [(200, 258), (800, 1053), (8, 16), (12, 24), (221, 884), (9, 16)]
MULTI_TURN_CORRECT = [(100, 200), (80, 200), (60, 200), (40, 200)]


def scores_of(version: Version) -> dict[str, tuple[int, int]]:
    pairs = [*NON_LIVE_CORRECT, *LIVE_CORRECT, *MULTI_TURN_CORRECT]
    return dict(zip(select_categories(version, None), pairs, strict=True))


def test_official_averages_of_v3() -> None:
    # Simple (0.95 + 0.6 + 0.5) / 3 = 0.683333; Non-Live (0.683333 + 0.9 + 0.8 + 0.7 + 0.5) / 5 = 0.716667
    # Live (200 + 800 + 8 + 12 + 221 + 9) / (258 + 1053 + 16 + 24 + 884 + 16) = 1250 / 2251 = 0.555309
    # Multi-Turn (0.5 + 0.4 + 0.3 + 0.2) / 4 = 0.35; Overall (0.716667 + 0.555309 + 0.35) / 3 = 0.540658
    found = official_averages("v3", scores_of("v3"))
    expected = {"Non-Live": 0.716667, "Live": 0.555309, "Multi-Turn": 0.35, "Overall": 0.540658}
    assert {name: average["accuracy"] for name, average in found.items()} == pytest.approx(expected, abs=1e-6)
    assert [len(average["of"]) for average in found.values()] == [7, 6, 4, 17]


def test_official_averages_of_v4() -> None:
    # Non-Live (0.683333 + 0.9 + 0.8 + 0.7) / 4 = 0.770833; Live (200 + 800 + 8 + 12) / 1351 = 0.754996
    # Irrelevance (120 / 240 + 221 / 884) / 2 = 0.375
    found = official_averages("v4", scores_of("v4"))
    expected = {"Non-Live": 0.770833, "Live": 0.754996, "Irrelevance": 0.375, "Multi-Turn": 0.35}
    assert {name: average["accuracy"] for name, average in found.items()} == pytest.approx(expected, abs=1e-6)
    assert "irrelevance" not in found["Non-Live"]["of"]


def test_weights_of_the_official_averages() -> None:
    weights = {name: average["weights"] for name, average in official_averages("v3", scores_of("v3")).items()}
    # a fifth, Simple's in three; samples of all; a quarter; then a third of each
    single, simple = dict.fromkeys(groups.NON_LIVE["v3"], 1 / 5), ("simple", "java", "javascript")
    assert weights["Non-Live"] == pytest.approx({**single, **dict.fromkeys(simple, 1 / 15)})
    assert weights["Live"]["live_multiple"] == pytest.approx(1053 / 2251)
    assert set(weights["Multi-Turn"].values()) == {0.25}
    overall = {"java": 1 / 45, "irrelevance": 1 / 15, "live_multiple": 1053 / 6753, "multi_turn_base": 1 / 12}
    assert {name: weights["Overall"][name] for name in overall} == pytest.approx(overall)
    fourth = {name: average["weights"] for name, average in official_averages("v4", scores_of("v4")).items()}
    names = groups.NON_LIVE["v4"]
    assert fourth["Non-Live"] == pytest.approx({**dict.fromkeys(names[:3], 1 / 12), **dict.fromkeys(names[3:6], 1 / 4)})
    assert fourth["Live"]["live_multiple"] == pytest.approx(1053 / 1351)
    assert fourth["Irrelevance"] == {"irrelevance": 0.5, "live_irrelevance": 0.5}
    for own in (*weights.values(), *fourth.values()):
        assert sum(own.values()) == pytest.approx(1)


@pytest.mark.parametrize("right", [0.0, 1.0, None])
def test_official_averages_have_intervals(right: float | None) -> None:
    scores = scores_of("v3")
    if right is not None:
        scores = {name: (round(right * number), number) for name, (_, number) in scores.items()}
    found = official_averages("v3", scores)
    for average in found.values():
        assert 0 <= average["low"] <= average["accuracy"] <= average["high"] <= 1
        assert average["low"] < average["high"]
        assert right is None or average["accuracy"] == right
    # Wilson's limits of 100, 80, 60, 40 of 200 lie 0.0686, 0.0654, 0.0593, 0.0495 below the shares and 0.0686, 0.0692,
    # 0.0668, 0.0609 above; a quarter of the roots of the sums of squares: 0.0306 and 0.0332
    if right is None:
        limits = (found["Multi-Turn"]["low"], found["Multi-Turn"]["high"])
        assert limits == pytest.approx((0.35 - 0.0306, 0.35 + 0.0332), abs=1e-4)


@pytest.mark.parametrize(
    ("missing", "gone"), [("java", "Non-Live"), ("live_relevance", "Live"), ("multi_turn_base", "Multi-Turn")]
)
def test_incomplete_averages_are_omitted(missing: str, gone: str) -> None:
    scores = {name: score for name, score in scores_of("v3").items() if name != missing}
    assert {"Non-Live", "Live", "Multi-Turn", "Overall"} - set(official_averages("v3", scores)) == {gone, "Overall"}

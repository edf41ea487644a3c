"""BFCL as conversations: requests, gold that passes, responses that must fail; both releases of bfcl-eval."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from rest_rl.envs.bfcl_sandbox import sandbox as sandbox_module
from rest_rl.envs.bfcl_sandbox.entries import parameter_schemas
from rest_rl.envs.bfcl_sandbox.package import Version
from rest_rl.evaluate.benchmarks.bfcl import groups
from rest_rl.evaluate.benchmarks.bfcl.benchmark import Bfcl
from rest_rl.evaluate.conversation import Conversation, Reply, Request
from rest_rl.formats import get_format
from rest_rl.response import Gold, ToolCall

FORMATS = ["toolrl", "hermes", "qwen3_coder"]
LIVE_IMPOSSIBLE = ["live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3", "live_multiple_964-207-0"]
IMPOSSIBLE: Mapping[Version, set[str]] = {
    "v3": {*LIVE_IMPOSSIBLE, "java_36", "java_64", "java_65"},
    "v4": {*LIVE_IMPOSSIBLE, "simple_java_36", "simple_java_64", "simple_java_65"},
}
"""No correct answer passes: required arguments have no answer, or the checker cannot read it."""
ODD = ["multi_turn_miss_func_49", "live_multiple_552-153-1", "live_multiple_595-158-1", "live_multiple_1038-265-0"]
"""A gold that needs a function before its turn; golds that are not strings although their schemas require strings."""


def opened(version: Version, categories: Sequence[str] | None = None, **limits: Any) -> Bfcl:
    try:
        return Bfcl(version, categories, **limits)
    except ValueError as error:
        if "install it with" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded() -> Iterator[Callable[[Version], Bfcl]]:
    """All samples of a version, read once."""
    found: dict[Version, Bfcl] = {}

    def load(version: Version) -> Bfcl:
        if version not in found:
            found[version] = opened(version)
        return found[version]

    yield load
    for benchmark in found.values():
        benchmark.close()


@pytest.fixture(params=["v3", "v4"])
def bfcl(request: pytest.FixtureRequest, loaded: Callable[[Version], Bfcl]) -> Bfcl:
    return loaded(request.param)


@pytest.fixture
def v4(loaded: Callable[[Version], Bfcl]) -> Bfcl:
    return loaded("v4")


def started(benchmark: Bfcl, identity: str, tool_format: str = "toolrl") -> Conversation:
    return benchmark.start(identity, get_format(tool_format))


def oracle(benchmark: Bfcl, identity: str, tool_format: str = "toolrl") -> Mapping[str, Any]:
    """The outcome if every request is answered with the gold, as text."""
    talk = started(benchmark, identity, tool_format)
    while (request := talk.request()) is not None:
        talk.receive(Reply(text=written(request.sample.gold, tool_format)))
    try:
        return talk.outcome()
    finally:
        talk.close()


def written(gold: Gold, tool_format: str = "toolrl") -> str:
    return get_format(tool_format).render(None, gold.calls, gold.answer)


def calling(*calls: Mapping[str, Any]) -> Reply:
    return Reply(text=written(Gold(tuple(ToolCall(call["name"], call["arguments"]) for call in calls))))


def asked(talk: Conversation) -> Request:
    request = talk.request()
    assert request is not None
    return request


def answered(benchmark: Bfcl, identity: str, text: str) -> Mapping[str, Any]:
    """The outcome if every request is answered with the same text."""
    talk = started(benchmark, identity)
    while talk.request() is not None:
        talk.receive(Reply(text=text))
    try:
        return talk.outcome()
    finally:
        talk.close()


def subset(benchmark: Bfcl, number: int) -> list[str]:
    """The first samples of every category, and those that cannot pass."""
    by_category = groupby(benchmark.groups, lambda identity: benchmark.groups[identity])
    firsts = [identity for _, members in by_category for identity in list(members)[:number]]
    return [*firsts, *sorted(IMPOSSIBLE[benchmark.version] - set(firsts)), *ODD]


@pytest.mark.parametrize("tool_format", FORMATS)
def test_the_gold_passes(bfcl: Bfcl, tool_format: str) -> None:
    names = subset(bfcl, 3)
    failed = {name for name in names if not oracle(bfcl, name, tool_format)["correct"]}
    assert len(names) == 17 * 3 + 7 + len(ODD)
    assert failed == IMPOSSIBLE[bfcl.version]


@pytest.mark.slow
@pytest.mark.parametrize("tool_format", FORMATS)
def test_all_gold_passes_except_known_defects(bfcl: Bfcl, tool_format: str) -> None:
    rows = [
        {"category": category, **oracle(bfcl, name, tool_format), "id": name} for name, category in bfcl.groups.items()
    ]
    assert len(rows) == 4441
    assert {row["id"] for row in rows if not row["correct"]} == IMPOSSIBLE[bfcl.version]
    assert bfcl.extras(rows)["official"]["Multi-Turn"]["accuracy"] == 1.0


def test_calls_that_differ_from_the_gold_are_wrong(bfcl: Bfcl) -> None:
    for category in ("multiple", "parallel", "live_simple", "live_parallel_multiple"):
        name = next(name for name, group in bfcl.groups.items() if group == category)
        gold = asked(started(bfcl, name)).sample.gold
        first, rest = gold.calls[0], gold.calls[1:]
        changed = dict.fromkeys(first.arguments, "quite another")
        renamed = ToolCall(first.name + "_", first.arguments)
        for calls in ([ToolCall(first.name, changed), *rest], [renamed, *rest], gold.calls[:-1], [*gold.calls, first]):
            assert calls != list(gold.calls)
            outcome = answered(bfcl, name, written(Gold(tuple(calls), None if calls else "Nothing.")))
            assert outcome["correct"] is False
            assert 0 < len(outcome["reason"]) <= 300


def test_relevance_accepts_any_call_to_an_offered_tool(bfcl: Bfcl) -> None:
    call, prose = written(Gold((ToolCall("whatever", {}),))), "<think></think>\n<response>No.</response>"
    broken = "<think></think>\n<tool_call>\n{broken\n</tool_call>"
    verdicts = {
        "irrelevance": (False, True, True),
        "live_irrelevance": (False, True, True),
        "live_relevance": (False, False, False),
    }
    for category, expected in verdicts.items():
        name = next(name for name, group in bfcl.groups.items() if group == category)
        assert tuple(answered(bfcl, name, text)["correct"] for text in (call, prose, broken)) == expected
    name = next(name for name, group in bfcl.groups.items() if group == "live_relevance")
    gold = asked(started(bfcl, name)).sample.gold
    assert answered(bfcl, name, written(Gold((ToolCall("whatever", {}), *gold.calls))))["correct"] is True
    odd = ToolCall(gold.calls[0].name, {"__import__('os').system('true')": 1})
    assert answered(bfcl, name, written(Gold((odd,))))["correct"] is False


def test_the_outcome_of_a_single_turn(v4: Bfcl) -> None:
    outcome = oracle(v4, "parallel_0")
    assert set(outcome) == {"response", "calls", "correct", "reason"}
    assert outcome["response"].startswith("<think>")
    assert [set(call) for call in outcome["calls"]] == [{"name", "arguments"}] * 2
    assert (outcome["correct"], outcome["reason"]) == (True, "")
    talk = started(v4, "parallel_0")
    calls = asked(talk).sample.gold.calls
    talk.receive(Reply(text="", calls=calls))  # parsed by a server
    assert talk.outcome()["correct"] is True
    assert answered(v4, "parallel_0", "no call")["reason"].startswith("no_call")


def test_every_sample_is_listed_by_its_category(bfcl: Bfcl) -> None:
    assert len(bfcl.groups) == 4441
    assert list(dict.fromkeys(bfcl.groups.values())) == list(groups.select_categories(bfcl.version, None))
    assert ("live_relevance_3-3-0#2" in bfcl.groups) == (bfcl.version == "v3")  # two samples have this id there
    with pytest.raises(ValueError, match=r"unknown id 'simple_python_0x', expected one of the 4441"):
        started(bfcl, "simple_python_0x")


def test_questions_keep_system_message_and_history(bfcl: Bfcl) -> None:
    live = [asked(started(bfcl, name)).sample for name, group in bfcl.groups.items() if str(group).startswith("live")]
    roles = [tuple(message["role"] for message in sample.messages) for sample in live]
    assert sum(each[0] == "system" for each in roles) == 92
    assert sum("assistant" in each for each in roles) == 8
    assert all(
        message["content"].strip() for sample in live for message in sample.messages if message["role"] == "system"
    )


def test_every_tool_is_a_json_schema(bfcl: Bfcl) -> None:
    known = {"string", "integer", "number", "boolean", "array", "object"}
    dotted = lists_required = 0
    for name in subset(bfcl, 20):
        for tool in asked(started(bfcl, name)).sample.tools:
            function = tool["function"]
            assert function["parameters"]["type"] == "object"
            assert set(kinds(function["parameters"])) <= known
            dotted += "." in function["name"]
            lists_required += bool(function["parameters"].get("required"))
    assert dotted > 20
    assert lists_required > 300


def kinds(schema: Mapping[str, Any]) -> Iterator[str]:
    if "type" in schema:
        yield schema["type"]
    for part in (schema.get("properties") or {}).values():
        yield from kinds(part)
    if isinstance(schema.get("items"), Mapping):
        yield from kinds(schema["items"])


def test_each_step_enters_the_history(v4: Bfcl) -> None:
    talk = started(v4, "multi_turn_base_0")
    first = asked(talk)
    assert (first.turn, first.step, len(first.sample.messages)) == (0, 0, 1)
    talk.receive(calling({"name": "pwd", "arguments": {}}, {"name": "ls", "arguments": {"a": True}}))
    second = asked(talk)
    said, *results = second.sample.messages[1:]
    assert (second.turn, second.step) == (0, 1)
    assert [call["function"]["name"] for call in said["tool_calls"]] == ["pwd", "ls"]
    assert [(result["role"], result["name"]) for result in results] == [("tool", "pwd"), ("tool", "ls")]
    assert [result["tool_call_id"] for result in results] == [call["id"] for call in said["tool_calls"]]
    assert "current_working_directory" in results[0]["content"]
    talk.receive(Reply(text="<think>secret</think>\n<response>Done.</response>"))
    third = asked(talk)
    assert (third.turn, third.step) == (1, 0)
    assert [message["role"] for message in third.sample.messages[-2:]] == ["assistant", "user"]
    assert third.sample.messages[-2]["content"] == "Done."
    talk.close()
    assert first.sample.messages[0]["role"] == "user"  # earlier requests have not changed
    assert len(first.sample.messages) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>secret</think>\n<response>Done.</response>", "Done."),
        ("<think>secret</think>\nDone without a block.", "Done without a block."),
        ("No block at all.", "No block at all."),
        ("<think>secret without an end", ""),
        ("", ""),
    ],
)
def test_thoughts_are_separate_from_the_content(v4: Bfcl, text: str, said: str) -> None:
    talk = started(v4, "multi_turn_base_0")
    talk.receive(Reply(text=text))
    message = dict(asked(talk).sample.messages[-2])
    assert message.pop("reasoning_content", None) == ("secret" if "</think>" in text else None)
    assert message == {"role": "assistant", "content": said}
    talk.close()


def test_invalid_calls_are_not_executed(v4: Bfcl) -> None:
    talk = started(v4, "multi_turn_base_0")
    offered = {tool["function"]["name"] for tool in asked(talk).sample.tools}
    assert "pwd" in offered
    assert "add_to_watchlist" not in offered
    talk.receive(
        calling(
            {"name": "add_to_watchlist", "arguments": {"stock": "X"}},
            {"name": "pwd", "arguments": {"where": 1}},
            {"name": "pwd", "arguments": {}},
        )
    )
    *_, stranger, odd, good = asked(talk).sample.messages
    assert stranger["content"] == "Error: there is no tool named 'add_to_watchlist'; the call was not executed."
    assert odd["content"].startswith("Error: pwd has no argument 'where'; its arguments are none")
    assert "current_working_directory" in good["content"]
    talk.close()


def test_an_invalid_call_does_not_fail_a_correct_conversation(v4: Bfcl) -> None:
    talk = started(v4, "multi_turn_base_0")
    talk.receive(calling({"name": "no_such_tool", "arguments": {}}))
    assert asked(talk).step == 1
    talk.receive(Reply(text=written(asked(started(v4, "multi_turn_base_0")).sample.gold)))
    talk.receive(Reply(text="That was the first turn."))
    while (request := talk.request()) is not None:
        talk.receive(Reply(text=written(request.sample.gold)))
    outcome = talk.outcome()
    talk.close()
    assert outcome["correct"] is True
    assert outcome["calls"][0][0] == [{"name": "no_such_tool", "arguments": {}}]
    assert [len(turn) for turn in outcome["calls"]] == [len(turn) - 1 for turn in outcome["response"]]


def test_held_out_functions_appear_in_their_turn(bfcl: Bfcl) -> None:
    talk = started(bfcl, "multi_turn_miss_func_0")
    tools_by_turn: list[set[str]] = []
    spoken = []
    while (request := talk.request()) is not None:
        tools_by_turn.append({tool["function"]["name"] for tool in request.sample.tools})
        spoken.append(request.sample.messages[-1]["content"])
        talk.receive(Reply(text="Nothing."))
    talk.close()
    turn = next(turn for turn, names in enumerate(tools_by_turn) if names != tools_by_turn[0])
    assert turn > 0
    assert all(names == tools_by_turn[0] for names in tools_by_turn[:turn])
    assert all(names == tools_by_turn[turn] > tools_by_turn[0] for names in tools_by_turn[turn:])
    assert "updated some more functions" in spoken[turn]
    assert spoken[turn] not in spoken[:turn]
    assert talk.outcome()["reason"].startswith("multi_turn:empty_turn_model_response")
    talk.close()


def test_an_endless_turn_stops_after_the_official_steps(v4: Bfcl) -> None:
    talk = started(v4, "multi_turn_base_0")
    requests = 0
    while talk.request() is not None:
        talk.receive(calling({"name": "pwd", "arguments": {}}))
        requests += 1
    outcome = talk.outcome()
    talk.close()
    assert requests == 21  # upstream counts to more than 20
    assert (len(outcome["response"]), outcome["correct"]) == (1, False)
    assert outcome["reason"].startswith("multi_turn:force_terminated")


@pytest.mark.parametrize("idle", ["pwd", "rm_everything"])
def test_an_endless_last_turn_is_still_judged(v4: Bfcl, idle: str) -> None:
    talk = started(v4, "multi_turn_base_1")
    while (request := talk.request()) is not None and request.turn < 3:
        gold = request.sample.gold
        talk.receive(Reply(text=get_format("toolrl").render(None, gold.calls, gold.answer)))
    requests = 0
    while (request := talk.request()) is not None:
        gold = request.sample.gold
        right = get_format("toolrl").render(None, gold.calls, None) if request.step == 0 else None
        talk.receive(Reply(text=right) if right else calling({"name": idle, "arguments": {}}))
        requests += 1
    outcome = talk.outcome()
    talk.close()
    assert (requests, outcome["correct"], outcome["reason"]) == (21, True, "")  # as upstream's runner judges it


def test_a_killed_process_does_not_cost_a_verdict(v4: Bfcl) -> None:
    talk = started(v4, "multi_turn_base_1")
    while (request := talk.request()) is not None:
        talk.receive(Reply(text=written(request.sample.gold)))
        if request.step == 0 and request.turn in (0, 2):
            os.kill(talk._sandbox._process.pid, signal.SIGKILL)
    os.kill(talk._sandbox._process.pid, signal.SIGKILL)
    outcome = talk.outcome()
    talk.close()
    assert (outcome["correct"], outcome["reason"]) == (True, "")
    with v4._pool.borrow() as sandbox:
        sandbox.constants()
        os.kill(sandbox._process.pid, signal.SIGKILL)
        assert len(sandbox.gold_calls("multi_turn_base_1")) == 4
        os.kill(sandbox._process.pid, signal.SIGKILL)
        assert sandbox.check_calls("multiple_0", "multiple", [{"f": {}}]).error_type.startswith(
            "simple_function_checker"
        )


def test_a_process_that_keeps_dying_is_an_error(v4: Bfcl, monkeypatch) -> None:
    def killed(process: Any, request: Any, seconds: float) -> Any:
        if request is not None:
            os.kill(process.pid, signal.SIGKILL)
        return exchange(process, request, seconds)

    exchange = sandbox_module._exchange
    talk, single = started(v4, "multi_turn_base_0"), started(v4, "multiple_0")
    gold = asked(talk).sample.gold
    monkeypatch.setattr(sandbox_module, "_exchange", killed)
    talk.receive(Reply(text=written(gold)))
    single.receive(Reply(text=written(asked(started(v4, "multiple_1")).sample.gold)))
    for outcome in (talk.outcome(), single.outcome()):
        assert "ended without an answer" in outcome["error"]
        assert "correct" not in outcome
    talk.close()
    with pytest.raises(ValueError, match="continue with --resume"):
        v4.start("multi_turn_base_1", get_format("toolrl"))


def test_a_failed_conversation_leaves_no_state(v4: Bfcl) -> None:
    talk = started(v4, "multi_turn_base_0")
    talk.receive(calling({"name": "mkdir", "arguments": {"dir_name": "left_over"}}))
    while talk.request() is not None:
        talk.receive(Reply(text="Nothing."))
    assert talk.outcome()["correct"] is False
    talk.close()
    abandoned = started(v4, "multi_turn_base_0")
    abandoned.receive(calling({"name": "cd", "arguments": {"folder": "document"}}))
    abandoned.close()
    abandoned.close()
    assert oracle(v4, "multi_turn_base_0")["correct"] is True


def test_parallel_conversations_are_isolated(v4: Bfcl) -> None:
    names = ["multi_turn_base_0", "parallel_0", "multi_turn_base_1", "multi_turn_base_0", "simple_python_3"] * 3
    with ThreadPoolExecutor(5) as threads:
        outcomes = list(threads.map(lambda name: oracle(v4, name), names))
    assert [outcome["correct"] for outcome in outcomes] == [True] * len(names)


def hostile(folder: Path) -> dict[str, str]:
    """Responses that try to do harm by their content or their length."""
    touch = f"__import__('os').system('touch {folder}/touched')"
    write = f"open('{folder}/touched', 'w').write('x')"

    def call(name: str, arguments: str) -> str:
        return f'<think></think>\n<tool_call>\n{{"name": "{name}", "parameters": {arguments}}}\n</tool_call>'

    return {
        "name": call(touch, "{}"),
        "dotted name": call("pwd.__globals__", "{}"),
        "argument name": call("cat", f"{{\"file_name='x', y={touch}\": 1}}"),
        "value": call("cat", f'{{"file_name": "{touch}"}}'),
        "quoted value": call("cat", f'{{"file_name": "\') or {write} or (\'"}}'),
        "long value": call("cat", f'{{"file_name": "{"x" * 5_000_000}"}}'),
        "long name": call("x" * 5_000_000, "{}"),
        "deep value": call("cat", '{"file_name": ' + "[" * 60 + "]" * 60 + "}"),
        "too deep value": call("cat", '{"file_name": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "long number": call("cat", '{"file_name": ' + "9" * 5000 + "}"),
        "half a character": call("cat", '{"file_name": "\\ud800"}'),
        "tags": "<tool_call>" * 20_000,
        "nothing": "",
    }


@pytest.mark.parametrize("kind", list(hostile(Path())))
def test_hostile_responses_are_wrong_and_have_no_effect(v4: Bfcl, tmp_path: Path, kind: str) -> None:
    text = hostile(tmp_path)[kind]
    for name in ("simple_python_0", "parallel_0", "multi_turn_base_0"):
        outcome = answered(v4, name, text)
        assert outcome["correct"] is False
        assert 0 < len(outcome["reason"]) <= 300
    assert list(tmp_path.iterdir()) == []
    assert oracle(v4, "multi_turn_base_0")["correct"] is True


def test_an_endless_call_makes_its_sample_wrong() -> None:
    benchmark = opened("v4", ["multi_turn_base"], seconds=1.0)
    talks = ((name, started(benchmark, name)) for name in benchmark.groups)
    name, talk = next((name, talk) for name, talk in talks if "power" in parameter_schemas(asked(talk).sample.tools))
    talk.receive(calling({"name": "power", "arguments": {"base": 7, "exponent": 10**9}}))
    assert talk.request() is None
    outcome = talk.outcome()
    talk.close()
    assert outcome["correct"] is False
    assert outcome["reason"].startswith("multi_turn:sandbox: ")
    assert oracle(benchmark, name)["correct"] is True
    benchmark.close()


def test_only_complete_categories_are_averaged() -> None:
    live = opened("v4", ["live"])
    rows = [{"id": name, "category": group, "correct": True} for name, group in live.groups.items()]
    official = live.extras(rows)["official"]
    assert list(official) == ["Live"]
    assert (official["Live"]["accuracy"], official["Live"]["of"]) == (1.0, list(groups.LIVE[:4]))
    assert live.extras(rows[1:])["official"] == {}
    assert live.extras([{**rows[0], "correct": None, "error": "down"}, *rows[1:]])["official"] == {}
    assert live.pin == "bfcl-eval 2026.3.23 (BFCL v4)"
    live.close()

"""Endpoints against a real server in a thread: correct responses, failures of every kind, user errors."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import Any

import pytest

from rest_rl.data.layout import PromptLayout
from rest_rl.evaluate.conversation import Reply, Request, parse_reply
from rest_rl.evaluate.models.chat_messages import build_wire_names
from rest_rl.evaluate.models.endpoint import Endpoint
from rest_rl.formats import get_format
from rest_rl.response import ToolCall
from tests.model_server import (
    CALL,
    TOOL,
    Handler,
    Server,
    Step,
    break_off,
    build_completion,
    build_request,
    drip,
    hang,
    hang_up,
    reply_with,
    respond_with,
    serve_models,
)
from tests.tiny_policy import tiny_tokenizer

KEY = "sk-very-secret-4711"

pytestmark = pytest.mark.usefixtures("no_pauses")


def endpoint(server: Server, *steps: Step, then: Step | None = None, **changes: Any) -> Endpoint:
    last = reply_with(CALL) if then is None else then
    server.steps = itertools.chain(steps, itertools.repeat(last))
    settings = {"native": False, "max_new_tokens": 64, "timeout": 10.0, "retries": 3, "concurrency": 1, **changes}
    return Endpoint(server.url, "m", get_format(settings.pop("tool_format", "hermes")), **settings)


def one(model: Endpoint, request: Request | None = None) -> Reply:
    return model.respond([request or build_request()])[0]


def test_the_training_prompt_describes_the_tools(server) -> None:
    model = endpoint(server)
    reply = one(model)
    assert reply == Reply(CALL, None, 11, 3)
    assert parse_reply(reply, model.tool_format).calls == (ToolCall("f", {"x": 1}),)
    path, key, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer none"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 64)
    assert "tools" not in body
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"].startswith(get_format("hermes").instructions([TOOL]))
    assert body["messages"][0]["content"].endswith("Be brief.")


def test_kept_prompts_are_sent_as_they_are(server) -> None:
    for native in (False, True):
        one(endpoint(server, native=native), build_request(tools_in_prompt=True))
        _, _, body = server.requests[-1]
        assert "tools" not in body
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]


def test_native_mode_sends_tools_and_history_in_openai_shape(server) -> None:
    function = {"name": "a.b", "arguments": {"q": "ü"}}
    history = (
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "a.b", "content": "[1]", "other": 3},
        {"role": "user", "content": "on"},
    )
    dotted = {"type": "function", "function": {**TOOL["function"], "name": "a.b"}}
    answered = build_completion(None, tool_calls=[{"id": "1", "function": {"name": "a_b", "arguments": '{"q": 2}'}}])
    reply = one(
        endpoint(server, then=respond_with(answered), native=True), build_request(*history, tools=(dotted, TOOL))
    )
    assert reply == Reply("", (ToolCall("a.b", {"q": 2}),), 11, 3)
    _, _, body = server.requests[0]
    assert [tool["function"]["name"] for tool in body["tools"]] == ["a_b", "f"]
    call = body["messages"][1]["tool_calls"][0]
    assert (call["function"], call["type"]) == ({"name": "a_b", "arguments": '{"q": "ü"}'}, "function")
    assert body["messages"][2] == {"role": "tool", "name": "a_b", "content": "[1]", "tool_call_id": call["id"]}


def test_sanitized_names_stay_distinct() -> None:
    tools = tuple({"type": "function", "function": {"name": name}} for name in ("a.b", "a_b", "a/b", "x" * 80, ""))
    names = build_wire_names(build_request(tools=tools).sample)
    assert list(names) == ["a.b", "a_b", "a/b", "x" * 80, ""]
    assert len(set(names.values())) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names.values())


def test_unreadable_structured_calls_are_not_calls(server) -> None:
    good = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    bad = [
        {"function": {"name": "f", "arguments": '{"x": '}},
        {"function": {"name": "f", "arguments": "[1]"}},
        {"function": {"name": 3, "arguments": "{}"}},
        {"function": {"name": "f", "arguments": "[" * 10_000}},
        {"function": None},
        "f(x=1)",
        None,
    ]
    empty = [{"function": {"name": "f", "arguments": ""}}, {"function": {"name": "f"}}]
    objects = [{"function": {"name": "f", "arguments": {"x": [1]}}}]
    model = endpoint(
        server, reply_with("I look.", tool_calls=[good, *bad]), reply_with(None, tool_calls=bad[:1]), native=True
    )
    reply = one(model)
    assert reply.calls == (ToolCall("f", {"x": 1}),)
    assert reply.text.startswith("I look.\n")
    assert all(json.dumps(raw) in reply.text for raw in bad)
    nothing = one(model)
    assert nothing.calls == ()
    assert json.dumps(bad[0]) in nothing.text
    assert parse_reply(nothing, model.tool_format).calls == ()
    reply = one(endpoint(server, reply_with("", tool_calls=[*empty, *objects]), native=True))
    assert [call.arguments for call in reply.calls or ()] == [{}, {}, {"x": [1]}]


def test_calls_in_the_text_count_if_the_server_parses_none(server) -> None:
    model = endpoint(server, reply_with(CALL, tool_calls=[]), reply_with(CALL, tool_calls=None), native=True)
    for _ in range(2):
        reply = one(model)
        assert reply.calls is None
        assert parse_reply(reply, model.tool_format).calls == (ToolCall("f", {"x": 1}),)


def test_length_parts_reasoning_and_odd_usage(server) -> None:
    odd = build_completion("ok") | {"usage": {"prompt_tokens": "many", "completion_tokens": True}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    model = endpoint(
        server,
        reply_with("cut of", finish="length"),
        reply_with(None, finish="length", reasoning_content="hm"),
        reply_with(parts),
        respond_with(odd),
        reply_with("yes", reasoning_content="hm"),
        reply_with(""),
        respond_with(build_completion("x") | {"error": None, "usage": None}),
        respond_with(json.dumps(build_completion("half \ud800 pair"))),
    )
    replies = model.respond([build_request()] * 8)
    assert [reply.text for reply in replies] == ["cut of", "", "ab", "ok", "yes", "", "x", "half ? pair"]
    assert [reply.is_truncated for reply in replies] == [True, True] + [False] * 6
    assert not any(reply.error or reply.overflow for reply in replies)
    assert (replies[3].prompt_tokens, replies[3].tokens) == (None, None)
    assert len(server.requests) == 8


def test_separate_reasoning_belongs_to_formats_that_open_it(server) -> None:
    model = endpoint(server, then=reply_with(CALL, reasoning_content="I look."), tool_format="hermes+think")
    parsed = parse_reply(one(model), model.tool_format)
    assert (parsed.thought, parsed.calls) == ("I look.", (ToolCall("f", {"x": 1}),))


FAILURES: dict[str, Step] = {
    "500": respond_with({"error": {"message": "broken"}}, 500),
    "503 in HTML": respond_with("<html>busy</html>", 503),
    "408": respond_with("", 408),
    "409": respond_with("", 409),
    "429": respond_with({"error": {"message": "slow down"}}, 429),
    "429 until a moment": respond_with("", 429, Retry_After="0.01"),
    "429 until a past date": respond_with("", 429, Retry_After=formatdate(0, usegmt=True)),
    "429 until nonsense": respond_with("", 429, Retry_After="soon"),
    "HTML": respond_with("<!doctype html><p>Log in"),
    "no text": respond_with(""),
    "no UTF-8": respond_with(b"\xff\xfe{}"),
    "no compression": respond_with("plain", Content_Encoding="gzip"),
    "broken JSON": respond_with('{"choices": [{"mess'),
    "deep JSON": respond_with("[" * 100_000),
    "null": respond_with("null"),
    "a list": respond_with("[]"),
    "a number": respond_with("7"),
    "no choices": respond_with({"id": "c"}),
    "empty choices": respond_with({"choices": []}),
    "choices of text": respond_with({"choices": ["hi"]}),
    "choices as text": respond_with({"choices": "hi"}),
    "no message": respond_with({"choices": [{"text": "hi"}]}),
    "message as text": respond_with({"choices": [{"message": "hi"}]}),
    "null content": reply_with(None),
    "content as number": reply_with(5),
    "content of texts": reply_with(["a"]),
    "tool_calls as text": reply_with("a", tool_calls="f"),
    "an error with 200": respond_with({"error": {"message": "upstream is down", "code": 502}}),
    "hangs up": hang_up,
    "breaks off": break_off,
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failed_attempts_are_retried(server, kind: str) -> None:
    model = endpoint(server, FAILURES[kind], FAILURES[kind])
    assert one(model).text == CALL
    assert len(server.requests) == 3


@pytest.mark.parametrize("kind", ["500", "HTML", "empty choices", "null content", "hangs up", "breaks off"])
def test_permanent_failures_become_errors_of_the_sample(server, kind: str) -> None:
    reply = one(endpoint(server, then=FAILURES[kind]))
    assert reply.error.endswith(", after 4 attempts")
    assert (reply.text, reply.overflow) == ("", "")
    assert len(server.requests) == 4


@pytest.mark.parametrize("kind", [hang, drip])
def test_a_hanging_server_times_out(server, kind: Step) -> None:
    model = endpoint(server, kind, timeout=0.3, retries=1)
    assert one(model).text == CALL
    assert "within 0.1 s" in one(endpoint(server, then=kind, timeout=0.1, retries=0)).error


def test_every_sample_is_answered_or_reported(server) -> None:
    """One request in five fails, each time differently; two samples always fail."""
    numbers, failures = itertools.count(), itertools.cycle([*FAILURES.values(), hang])

    def step(handler: Handler) -> None:
        text = handler.body["messages"][-1]["content"]
        with handler.server.lock:
            number = next(numbers)
            failure = next(failures) if number % 5 == 0 else None
        if text in ("13", "77"):
            FAILURES["500"](handler)
        elif failure is not None:
            failure(handler)
        else:
            reply_with(f"answer {text}")(handler)

    model = endpoint(server, then=step, concurrency=8, retries=7, timeout=1.0)
    requests = [build_request({"role": "user", "content": str(number)}, tools=()) for number in range(120)]
    with ThreadPoolExecutor(model.concurrency) as pool:
        replies = list(pool.map(lambda request: model.respond([request])[0], requests))
    failed = [number for number, reply in enumerate(replies) if reply.error]
    assert failed == [13, 77]
    assert all(reply.text == f"answer {n}" for n, reply in enumerate(replies) if n not in failed)


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 9000 (8000 in the messages).",
        "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
        "the request exceeds the available context size",
        "max_tokens must be at least 1, got -186.",
        "Input is too long for requested model.",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
        "The input token count (9) exceeds the maximum number of tokens allowed (8).",
    ],
)
def test_a_prompt_that_does_not_fit_is_an_overflow(server, said: str) -> None:
    statuses = (400, 400, 422, 422, 200, 200)
    model = endpoint(server, *(respond_with({"error": {"message": said}}, status) for status in statuses))
    for reply in model.respond([build_request()] * 3):
        assert said[:40] in reply.overflow
        assert (reply.text, reply.error) == ("", "")
    assert ["max_tokens" in body for _, _, body in server.requests] == [True, False] * 3


def test_a_prompt_that_fits_without_the_longest_response_gets_what_is_left(server) -> None:
    too_long = respond_with({"error": {"message": "This model's maximum context length is 4096 tokens."}}, 400)
    reply = one(endpoint(server, too_long, respond_with("", 503), then=reply_with("cut", finish="length")))
    assert (reply.text, reply.is_truncated, reply.overflow, reply.error) == ("cut", True, "", "")
    assert ["max_tokens" in body for _, _, body in server.requests] == [True, False, False]


def test_a_rejected_request_is_not_retried(server) -> None:
    reply = one(endpoint(server, then=respond_with({"error": {"message": "tools[0].name is odd"}}, 400)))
    assert "with 400" in reply.error
    assert "tools[0].name is odd" in reply.error
    assert one(endpoint(server, then=respond_with({"detail": "no"}, 422))).error
    assert one(endpoint(server, then=respond_with("", 413))).overflow
    assert len(server.requests) == 4


def test_an_unpaired_surrogate_in_a_prompt_is_an_error_of_its_sample(server) -> None:
    assert "not valid Unicode" in one(endpoint(server), build_request({"role": "user", "content": "\ud800"})).error
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (401, "bad key", "set OPENAI_API_KEY"),
        (402, "no funds", "check the quota"),
        (403, "not yours", "another key or model"),
        (404, "The model `m` does not exist", "most end in /v1"),
        (405, "no", "most end in /v1"),
        (400, "max_tokens is too large. This model supports at most 9 completion tokens", "lower --max-new-tokens"),
    ],
)
def test_user_errors_stop_the_evaluation(server, status: int, said: str, remedy: str) -> None:
    model = endpoint(server, then=respond_with({"error": {"message": said}}, status))
    with pytest.raises(ValueError, match=f"returned status {status} .*, expected .*; .*{re.escape(remedy)}"):
        one(model)
    assert len(server.requests) == 1


def test_an_exhausted_quota_stops_the_evaluation(server) -> None:
    said = {"error": {"message": "you exceeded your quota", "code": "insufficient_quota"}}
    with pytest.raises(ValueError, match="check the quota"):
        one(endpoint(server, then=respond_with(said, 429)))


def test_the_key_stays_out_of_every_message(server, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    model = endpoint(server, then=respond_with({"error": {"message": f"wrong key {KEY}"}}, 401), api_key_env="MY_KEY")
    with pytest.raises(ValueError, match=r"wrong key \*\*\*") as caught:
        one(model)
    assert server.requests[0][1] == f"Bearer {KEY}"
    replies = [
        one(endpoint(server, then=respond_with(data, status), api_key_env="MY_KEY", retries=1))
        for data, status in ((f"<p>{KEY}", 200), (f"{KEY}", 500), (json.dumps({"error": {"message": KEY}}), 400))
    ]
    assert all(reply.error for reply in replies)
    assert KEY not in f"{caught.value} {replies} {model!r}"


def test_keys_come_from_the_environment(server, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    one(endpoint(server))
    assert server.requests[0][1] == f"Bearer {KEY}"
    with pytest.raises(ValueError, match="the environment variable MY_KEY is not set"):
        endpoint(server, api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", f"{KEY}ü")
    with pytest.raises(ValueError, match="MY_KEY contains unusual characters") as caught:
        endpoint(server, api_key_env="MY_KEY")
    assert KEY not in str(caught.value)


def test_the_rate_is_limited(server) -> None:
    model = endpoint(server, respond_with("", 503), requests_per_minute=600)  # one every 0.1 s, including retries
    began = time.monotonic()
    model.respond([build_request()] * 4)
    assert len(server.requests) == 5
    assert time.monotonic() - began >= 0.4


def test_retry_after_is_respected(server) -> None:
    began = time.monotonic()
    assert one(endpoint(server, respond_with("", 429, Retry_After="0.5"))).text == CALL
    assert time.monotonic() - began >= 0.5


def test_an_excessive_retry_after_is_not_awaited(server) -> None:
    assert "returns 429" in one(endpoint(server, then=respond_with("", 429, Retry_After="3600"))).error
    assert len(server.requests) == 1


def test_concurrency_is_bounded(server) -> None:
    under_way, most, lock = [0], [0], threading.Lock()

    def step(handler: Handler) -> None:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        with lock:
            under_way[0] -= 1
        reply_with(CALL)(handler)

    replies = endpoint(server, then=step, concurrency=3).respond([build_request()] * 20)
    assert [reply.text for reply in replies] == [CALL] * 20
    assert most[0] == 3


def test_the_servers_model_list_is_checked(server) -> None:
    model = endpoint(server)
    model.check()
    server.models = serve_models("mm", "other")
    with pytest.raises(ValueError, match=r"does not serve a model 'm', expected one of mm"):
        model.check()


@pytest.mark.parametrize("answer", [("", 404), ("<html>", 200), ("[]", 200), ('{"data": 3}', 200), ("", 500)])
def test_servers_that_do_not_list_their_models_pass(server, answer) -> None:
    server.models = respond_with(*answer)
    endpoint(server).check()
    server.models = serve_models()
    endpoint(server).check()


def test_a_check_finds_a_wrong_key_and_a_server_that_is_not_there(server) -> None:
    server.models = respond_with({"error": {"message": "no"}}, 401)
    with pytest.raises(ValueError, match="returned status 401"):
        endpoint(server).check()
    server.models = hang
    with pytest.raises(ValueError, match=r"no answer from .*no response within"):
        endpoint(server, timeout=0.1, retries=0).check()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        absent = Endpoint(url, "m", get_format("hermes"), native=False, max_new_tokens=4, retries=1)
        with pytest.raises(ValueError, match=r"no answer from .*expected an OpenAI-compatible server"):
            absent.check()


def test_context_usage_needs_a_tokenizer_and_a_stated_context(server) -> None:
    layout = PromptLayout(tiny_tokenizer())
    model = endpoint(server, layout=layout)
    assert model.context_usage(build_request()) is None
    server.models = serve_models("m", max_model_len=512)
    model.check()
    assert model.context_usage(build_request()) == (layout.count_tokens(build_request().sample) + 64, 512)
    bare = endpoint(server)
    bare.check()
    assert bare.context_usage(build_request()) is None


def test_extra_fields_go_into_every_request(server) -> None:
    one(endpoint(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 7}))
    assert server.requests[0][2]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.requests[0][2]["max_tokens"] == 7


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"concurrency": 0}, {"retries": -1}, {"requests_per_minute": 0}, {"timeout": 0}]
)
def test_numbers_are_checked(server, wrong) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        endpoint(server, **wrong)

"""Endpoints with training prompts: token ids to `/completions`, their responses, and servers that reject them."""

from __future__ import annotations

import itertools
import re
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rest_rl.data.layout import PromptLayout
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Reply, Request, parse_reply
from rest_rl.evaluate.models.endpoint import Endpoint, base_url, public_url
from rest_rl.evaluate.models.token_prompts import strip_end_tokens
from rest_rl.regions import decode_ids
from rest_rl.response import ToolCall
from tests.model_families import FAMILIES, family_tokenizer
from tests.model_server import CALL, Handler, Server, Step, build_request, hang, reply_with, respond_with, serve_models
from tests.tiny_policy import tiny_tokenizer

PASSWORD = "p%40ss-4711"
LEFT = "remove --tokenizer"

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture(scope="module")
def layout() -> PromptLayout:
    return PromptLayout(tiny_tokenizer(), "hermes")


def family_layout(family: str) -> PromptLayout:
    return PromptLayout(family_tokenizer(family), FAMILIES[family].tool_format)


def endpoint(server: Server, layout: PromptLayout, *steps: Step, then: Step | None = None, **changes: Any) -> Endpoint:
    server.steps = itertools.chain(steps, itertools.repeat(then or writes(CALL)))
    settings = {"native": False, "max_new_tokens": 64, "timeout": 10.0, "retries": 3, "concurrency": 1, **changes}
    return Endpoint(settings.pop("url", server.url), "m", layout.format, layout=layout, **settings)


def one(model: Endpoint, request: Request | None = None) -> Reply:
    return model.respond([request or build_request()])[0]


def completed(text: Any, finish: str = "stop") -> dict[str, Any]:
    usage = {"prompt_tokens": 11, "completion_tokens": 3}
    return {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": usage}


def writes(text: Any, finish: str = "stop") -> Step:
    return respond_with(completed(text, finish))


@pytest.mark.parametrize("family", ["qwen3", "llama3_2", "mistral"])
def test_the_server_gets_the_token_ids_of_the_training_prompt(server: Server, family: str) -> None:
    layout = family_layout(family)
    reply = one(endpoint(server, layout))
    path, _, body = server.requests[0]
    assert path == "/v1/completions"
    assert layout.tokenizer.decode(body["prompt"]) == layout.render(build_request().sample)
    if bos := layout.tokenizer.bos_token_id:
        assert body["prompt"].count(bos) == 1
        assert body["prompt"][0] == bos
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 64)
    assert not {"messages", "tools"} & set(body)
    assert (reply.text, reply.calls, reply.prompt_tokens, reply.tokens) == (CALL, None, 11, 3)
    parsed = parse_reply(reply, PromptLayout(layout.tokenizer, "hermes").format)
    assert parsed.calls == (ToolCall("f", {"x": 1}),)


def test_native_keeps_the_chat_route(server: Server, layout: PromptLayout) -> None:
    assert one(endpoint(server, layout, then=reply_with("ok"), native=True)).text == "ok"
    assert server.requests[0][0] == "/v1/chat/completions"
    assert "tools" in server.requests[0][2]


def test_special_tokens_are_requested_if_tags_are_special(server: Server) -> None:
    kept = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    for family, expected in (("mistral", kept), ("llama3_2", kept), ("qwen3", {})):
        one(endpoint(server, family_layout(family), extra_body={"seed": 1}))
        body = server.requests[-1][2]
        assert {name: body[name] for name in kept if name in body} == expected
        assert body["seed"] == 1
    one(endpoint(server, family_layout("mistral"), extra_body={"skip_special_tokens": True}))
    assert server.requests[-1][2]["skip_special_tokens"] is True  # the extra body overrides ours


@pytest.mark.parametrize(
    ("family", "written"),
    [
        ("mistral", "[TOOL_CALLS] []</s>"),
        ("mistral", "[TOOL_CALLS]</s></s>"),
        ("mistral", "a [INST] b"),
        ("mistral", "[TOOL_CALLS]"),
        ("llama3_2", '<|python_tag|>{"a": 1}<|eot_id|>'),
        ("llama3_2", "<|python_tag|><|eom_id|>"),
        ("qwen3", f"{CALL}<|im_end|><|endoftext|>"),
        ("qwen3", ""),
    ],
)
def test_end_tokens_are_stripped_like_those_of_ids(server: Server, family: str, written: str) -> None:
    layout = family_layout(family)
    ids = layout.tokenizer(written, add_special_tokens=False)["input_ids"]
    expected = decode_ids(ids, layout.tokenizer, layout.format.tags)
    assert strip_end_tokens(written, layout) == expected
    assert one(endpoint(server, layout, then=writes(written))).text == expected


def test_malformed_completions_are_retried(server: Server, layout: PromptLayout) -> None:
    garbage = [
        writes(None),
        writes(5),
        reply_with("a chat"),
        respond_with({"choices": []}),
        respond_with("{"),
        respond_with("", 500),
        respond_with("[]"),
    ]
    model = endpoint(server, layout, *garbage, retries=len(garbage))
    assert one(model).text == CALL
    assert len(server.requests) == len(garbage) + 1
    failed = one(endpoint(server, layout, then=writes(None), retries=1))
    assert "expected a text completion, after 2 attempts" in failed.error


def test_truncated_completions_and_missing_usage(server: Server, layout: PromptLayout) -> None:
    bare = {"choices": [{"text": "half \ud800"}]}
    cut, odd = endpoint(server, layout, writes("so f", "length"), respond_with(bare)).respond([build_request()] * 2)
    assert (cut.text, cut.is_truncated) == ("so f", True)
    assert odd == Reply("half ?", None, layout.count_tokens(build_request().sample), None)


def test_the_response_limit_is_what_the_prompt_leaves(server: Server, layout: PromptLayout) -> None:
    tokens = layout.count_tokens(build_request().sample)
    for context, limit in ((tokens + 64, 64), (tokens + 5, 5), (tokens + 1, 1)):
        model = endpoint(server, layout, context=context)
        assert one(model).text == CALL
        assert server.requests[-1][2]["max_tokens"] == limit
        assert model.context_usage(build_request()) == (tokens + 64, context)
    reply = one(endpoint(server, layout, context=tokens))
    assert reply.overflow == f"the prompt has {tokens} tokens, the context {tokens}"
    assert len(server.requests) == 3


def test_on_the_chat_route_the_server_decides_what_fits(server: Server, layout: PromptLayout) -> None:
    tokens = layout.count_tokens(build_request().sample)
    for context, limit in ((tokens + 64, 64), (tokens + 5, 5), (tokens - 9, 1)):
        assert one(endpoint(server, layout, then=reply_with("ok"), native=True, context=context)).text == "ok"
        assert server.requests[-1][2]["max_tokens"] == limit
    long = respond_with({"error": {"message": "This model's maximum context length is 9 tokens."}}, 400)
    assert one(endpoint(server, layout, then=long, native=True, context=9)).overflow
    assert one(endpoint(server, layout, then=long)).overflow


def test_a_given_context_overrides_the_servers(server: Server, layout: PromptLayout) -> None:
    server.models = serve_models("m", max_model_len=512)
    for given, context in ((None, 512), (300, 300)):
        model = endpoint(server, layout, context=given)
        model.check()
        assert model.context == context
    with pytest.raises(ValueError, match="context_length is 0, expected at least 1"):
        endpoint(server, layout, context=0)


def test_prompts_that_cannot_be_rendered_are_reported_and_not_sent(server: Server) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "{{ message.content }}", "{{ raise_exception('no!') if message.content == 'bad' else message.content }}"
    )
    model = endpoint(server, PromptLayout(tokenizer, "hermes"))
    assert "chat template failed" in one(model, build_request({"role": "user", "content": "bad"}, tools=())).refusal
    assert "not valid Unicode" in one(model, build_request({"role": "user", "content": "\ud800"})).error
    assert server.requests == []


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_the_route_is_reported(server: Server, layout: PromptLayout, status: int) -> None:
    model = endpoint(server, layout, then=respond_with({"detail": "Not Found"}, status))
    with pytest.raises(UserError, match=rf"returned status {status} .*/completions; .*{LEFT} .*pass --prompt native"):
        one(model)
    assert len(server.requests) == (1 if status < 500 else 4)  # the client retries server failures


@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (400, "Unrecognized request argument supplied: skip_special_tokens", rf"accepts skip_special_tokens; .*{LEFT}"),
        (422, "seed_of_mine: extra fields not permitted", "accepts seed_of_mine; remove it from --extra-body"),
        (422, "data did not match any variant of untagged enum Prompt", f"accepts token ids; .*{LEFT}"),
        (400, "Invalid type for 'prompt': expected a string", f"accepts token ids; .*{LEFT}"),
    ],
)
def test_fields_that_a_server_rejects_are_named(server: Server, status: int, said: str, remedy: str) -> None:
    refusal = respond_with({"error": {"message": said}}, status)
    model = endpoint(server, family_layout("mistral"), then=refusal, extra_body={"seed_of_mine": 1})
    with pytest.raises(ValueError, match=rf"status {status} .*{re.escape(said)}.*, expected a server that {remedy}"):
        one(model)


def test_other_rejections_affect_only_their_sample(server: Server, layout: PromptLayout) -> None:
    refusal = respond_with({"error": {"message": "this prompt is against our policy"}}, 400)
    assert "against our policy" in one(endpoint(server, layout, then=refusal, extra_body={"seed": 1})).error


def test_the_layout_handles_template_variables(server: Server, layout: PromptLayout) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "seed": 3}
    one(endpoint(server, layout, extra_body=extra))
    assert server.requests[-1][2]["seed"] == 3
    assert "chat_template_kwargs" not in server.requests[-1][2]
    one(endpoint(server, layout, then=reply_with("ok"), extra_body=extra, native=True))
    assert server.requests[-1][2]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["model", "messages", "prompt", "tools", "stream", "n"])
def test_the_extra_body_must_not_set_reserved_fields(server: Server, layout: PromptLayout, name: str) -> None:
    with pytest.raises(ValueError, match=f"--extra-body must not set {name}"):
        endpoint(server, layout, extra_body={name: 1, "seed": 2})


def test_many_threads_share_the_tokenizer(server: Server) -> None:
    layout = family_layout("llama3_2")
    steps = itertools.cycle([None, None, None, None, respond_with("", 503)])

    def step(handler: Handler) -> None:
        with handler.server.lock:
            failure = next(steps)
        text = layout.tokenizer.decode(handler.body["prompt"])
        (failure or writes(re.findall(r"number (\d+)\.", text)[-1]))(handler)

    model = endpoint(server, layout, hang, then=step, concurrency=8, retries=8, timeout=2.0)
    requests = [build_request({"role": "user", "content": f"number {n}."}, tools=()) for n in range(100)]
    with ThreadPoolExecutor(model.concurrency) as pool:
        replies = list(pool.map(lambda request: model.respond([request])[0], requests))
    assert [reply.text for reply in replies] == [str(n) for n in range(100)]


def test_a_password_in_the_url_is_used_and_never_shown(server: Server, layout: PromptLayout) -> None:
    url = server.url.replace("http://", f"http://me:{PASSWORD}@")
    told = f"no entry for me:{PASSWORD} and p@ss-4711"
    model = endpoint(server, layout, writes(CALL), then=respond_with({"error": {"message": told}}, 401), url=url)
    assert one(model).text == CALL
    assert server.requests[0][1] == f"Basic {b64encode(b'me:p@ss-4711').decode()}"
    with pytest.raises(ValueError, match=r"http://127.* status 401 .*no entry for \*\*\* and \*\*\*") as caught:
        one(model)
    server.models = respond_with("", 401)
    with pytest.raises(ValueError, match=r"http://127.* status 401") as listing:
        model.check()
    with pytest.raises(ValueError, match="is not a URL") as wrong:
        base_url(f"ftp://me:{PASSWORD}@host")
    absent = Endpoint(f"http://me:{PASSWORD}@127.0.0.1:1", "m", layout.format, native=True, max_new_tokens=1, retries=0)
    problem = one(absent).error
    assert "no connection" in problem
    for text in (str(caught.value), str(listing.value), str(wrong.value), problem, model.url):
        assert "4711" not in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:1/v1", "http://h:1/v1"),
        ("https://me:a@b@h:1/v1", "https://h:1/v1"),
        ("https://h/run/@cf/meta/v1", "https://h/run/@cf/meta/v1"),
        ("https://me@[::1]/v1", "https://[::1]/v1"),
        ("https://me:x@[::1/v1", "https://[::1/v1"),
    ],
)
def test_urls_are_shown_without_their_user(url: str, shown: str) -> None:
    assert public_url(url) == shown


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/api/v3", "https://h/api/v3"),
        (" https://h/v1/chat/completions ", "https://h/v1"),
        ("https://h/v1/completions/", "https://h/v1"),
    ],
)
def test_accepted_urls(given: str, meant: str) -> None:
    assert base_url(given) == meant


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://h/v1", "http://", "h/v1", "http://[::1"])
def test_invalid_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not a URL, expected http://HOST:PORT/v1"):
        base_url(url)

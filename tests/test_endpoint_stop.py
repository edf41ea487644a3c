"""A stopped endpoint cancels all pending requests at once; keys in a URL's query stay secret."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rest_rl.data.flattened_layout import Frame
from rest_rl.evaluate.conversation import Reply
from rest_rl.evaluate.models.endpoint import Endpoint, find_secrets, parse_query, public_url
from rest_rl.formats import get_format
from tests.model_server import CALL, Server, Step, build_request, drip, hang, reply_with, respond_with

LONG = 10_000.0
"""Seconds; longer than any test waits."""
SOON = 25.0
"""Seconds after which a request that was not stopped fails the test; `hang` takes 30."""


def endpoint(server: Server, step: Step, **changes: Any) -> Endpoint:
    server.steps = itertools.repeat(step)
    settings: dict[str, Any] = {
        "native": False,
        "max_new_tokens": 8,
        "timeout": LONG,
        "retries": 6,
        **changes,
    }
    return Endpoint(settings.pop("url", server.url), "m", get_format("hermes"), **settings)


def until_asked(server: Server, number: int) -> None:
    while len(server.requests) < number:
        time.sleep(0.005)


@pytest.mark.parametrize(
    "step",
    [hang, drip, respond_with("", 503, Retry_After="100"), respond_with("<html>")],
    ids=["hangs", "drips", "retry-after", "pause"],
)
def test_pending_requests_are_cancelled(server: Server, step: Step) -> None:
    model = endpoint(server, step, retries=100)
    pool = ThreadPoolExecutor(3)
    replies = [pool.submit(model.respond, [build_request()]) for _ in range(3)]
    until_asked(server, 3)
    model.stop()
    assert [reply.result(SOON) for reply in replies] == [[Reply(error="stopped")]] * 3
    pool.shutdown()
    asked_before = len(server.requests)
    assert model.respond([build_request()] * 2) == [Reply(error="stopped")] * 2
    assert len(server.requests) == asked_before


def test_stop_does_not_wait_for_the_rate_limit(server: Server) -> None:
    model = endpoint(server, reply_with(CALL), requests_per_minute=1)
    assert model.respond([build_request()])[0].text == CALL
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(model.respond, [build_request()])
        model.stop()
        assert waiting.result(SOON) == [Reply(error="stopped")]
    assert len(server.requests) == 1


def test_a_stop_reaches_the_server_through_published_prompts(server: Server) -> None:
    model = endpoint(server, reply_with(CALL), frame=Frame("before ", " after"))
    assert model.respond([build_request()])[0].text == CALL
    assert server.requests[0][2]["messages"][0]["content"].startswith("before ")
    model.stop()
    assert model.respond([build_request()]) == [Reply(error="stopped")]


KEYED = "?api-key=q%2B-4711&v=2#frag-4711"


def test_a_key_in_the_query_is_sent_and_never_shown(server: Server) -> None:
    told = "no entry for q+-4711 (q%2B-4711) in v=2"
    model = endpoint(server, respond_with({"error": {"message": told}}, 401), url=f"{server.url}/v1/{KEYED}")
    with pytest.raises(ValueError, match=r"no entry for \*\*\* \(\*\*\*\) in v=2") as caught:
        model.respond([build_request()])
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions?api-key=q%2B-4711&v=2"]
    refused = endpoint(server, respond_with({"error": {"message": told}}, 400), url=f"{server.url}{KEYED}").respond(
        [build_request()]
    )
    absent = endpoint(server, reply_with(CALL), url=f"http://127.0.0.1:1{KEYED}", retries=0).respond([build_request()])
    with pytest.raises(ValueError, match="is not a URL") as wrong:
        endpoint(server, reply_with(CALL), url=f"ftp://me:s-4711@host/v1{KEYED}")
    assert "no connection" in absent[0].error
    assert "4711" not in f"{caught.value} {refused} {absent} {wrong.value} {model.url}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://h/v1{KEYED}", "https://h/v1"),
        (f"https://me:p@h:1/v1{KEYED}", "https://h:1/v1"),
        ("https://h/v1#k", "https://h/v1"),
        ("https://[::1/v1?key=k", "https://[::1/v1"),
        ("https://me:ab#cd@h/v1", "https://h/v1"),
        ("https://me:ab?cd@h/v1", "https://h/v1"),
    ],
)
def test_public_url_removes_secrets(url: str, shown: str) -> None:
    assert public_url(url) == shown


def test_secret_parts_of_a_url() -> None:
    assert parse_query("http://h/v1") == {}
    assert parse_query(f"http://h/v1{KEYED}") == {"api-key": "q+-4711", "v": "2"}
    assert find_secrets("http://h/v1?a=1&b=12345") == ["12345"]
    assert set(find_secrets("http://me:x%40y@h/v1?a=k+4711")) == {"me:x%40y", "x%40y", "x@y", "k+4711", "k 4711"}

"""`eval --endpoint` as a user types it, against a server that fails, hangs and returns nonsense; then `--resume`."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.config import ModelTable
from rest_rl.data.layout import PromptLayout
from rest_rl.evaluate.benchmarks.tool_world import ToolWorldTasks
from rest_rl.formats import get_format
from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.policy import load_policy_tokenizer
from tests.model_server import Handler, Server, hang, reply_with, respond_with, serve_models

PROMPTS = 10
TASKS = ToolWorldTasks(seed=20_000, prompts=PROMPTS)
GARBAGE = "<tool_call>\n{not json}\n</tool_call><tool_call>"


@pytest.fixture(autouse=True)
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.chdir(tmp_path)
    server.steps = itertools.repeat(answers)


def gold_text(identity: str) -> str:
    gold = TASKS.samples[identity].gold
    return get_format("toolrl").render("I look.", gold.calls, gold.answer)


def identity_of(text: str) -> str:
    """The id of the sample whose question ends the prompt."""
    found = [one for one, sample in TASKS.samples.items() if sample.messages[-1]["content"] in text]
    return max(found, key=lambda one: len(TASKS.samples[one].messages[-1]["content"]))


def answers(handler: Handler) -> None:
    reply_with(gold_text(identity_of(handler.body["messages"][-1]["content"])))(handler)


def evaluate(server: Server, *more: str, url: str = "") -> int:
    options = ["--model", "m", "--prompts", str(PROMPTS), "--retries", "1", "--out", "out", *more]
    return main(["eval", "tool-world", "--endpoint", url or f"{server.url}/v1", *options])


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/samples.jsonl").read_text(encoding="utf-8").splitlines()]


def written() -> str:
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in Path("out").iterdir())


def test_all_questions_differ() -> None:
    assert [identity_of(sample.messages[-1]["content"]) for sample in TASKS.samples.values()] == [*TASKS.samples]


def test_failures_are_excluded_and_retried(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    identities = [*TASKS.samples]
    broken, garbled, hanging = set(identities[::5]), identities[1], itertools.chain([hang], itertools.repeat(answers))

    def step(handler: Handler) -> None:
        identity = identity_of(handler.body["messages"][-1]["content"])
        if identity in broken:
            respond_with("<html>busy</html>", 503)(handler)
        elif identity == garbled:
            reply_with(GARBAGE)(handler)
        elif identity == identities[2]:
            with handler.server.lock:
                chosen = next(hanging)
            chosen(handler)
        else:
            answers(handler)

    server.steps = itertools.repeat(step)
    assert evaluate(server, "--format", "toolrl", "--timeout", "1") == 1
    out = capsys.readouterr().out
    assert "4 samples have no score" in out
    assert "the server returns 503" in out
    assert {row["id"] for row in rows() if "error" in row} == broken
    assert {row["id"] for row in rows() if row["correct"]} == {*identities} - broken - {garbled}
    assert next(row for row in rows() if row["id"] == garbled)["response"] == GARBAGE

    asked = len(server.requests)
    server.steps = itertools.repeat(answers)
    assert evaluate(server, "--format", "toolrl", "--timeout", "1", "--resume") == 0
    assert len(server.requests) == asked + len(broken)
    assert {row["id"] for row in rows() if not row["correct"]} == {garbled}
    assert sorted(row["id"] for row in rows()) == sorted(identities)
    assert evaluate(server, "--format", "hermes", "--timeout", "1", "--resume") == 2
    assert "a different format" in capsys.readouterr().err


def test_with_a_tokenizer_prompts_equal_training_prompts(server: Server) -> None:
    server.models = serve_models("m", max_model_len=2000)
    tokenizer = load_policy_tokenizer(ModelTable(path=str(embedded_model_dir())))
    layout = PromptLayout(tokenizer, "toolrl")
    prompts = {layout.render(sample): identity for identity, sample in TASKS.samples.items()}

    def completes(handler: Handler) -> None:
        identity = prompts[tokenizer.decode(handler.body["prompt"])]
        respond_with({"choices": [{"text": gold_text(identity), "finish_reason": "stop"}]})(handler)

    server.steps = itertools.repeat(completes)
    assert (
        evaluate(server, "--tokenizer", str(embedded_model_dir()), "--context-length", "120", "--max-new-tokens", "90")
        == 0
    )
    assert all(row["correct"] for row in rows())
    assert {path for path, _, _ in server.requests} == {"/v1/completions"}
    assert {tokenizer.decode(body["prompt"]) for _, _, body in server.requests} == {*prompts}
    assert all(len(body["prompt"]) + body["max_tokens"] == 120 for _, _, body in server.requests)
    settings = json.loads(Path("out/settings.json").read_text(encoding="utf-8"))
    assert (settings["context"], settings["route"]) == (120, "completions")
    assert re.fullmatch("[0-9a-f]{12}", settings["chat_template"])


def test_extra_fields_are_sent_and_recorded(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"repetition_penalty": 1.0, "chat_template_kwargs": {"a": 1, "b": 2}}
    more = ("--format", "toolrl", "--limit", "1", "--extra-body", json.dumps(extra))
    assert evaluate(server, *more, "--set", "model.chat_template_kwargs.b=3") == 0
    body = json.loads(Path("out/settings.json").read_text(encoding="utf-8"))["body"]
    assert body == {"repetition_penalty": 1.0, "chat_template_kwargs": {"a": 1, "b": 3}}
    assert json.loads(Path("out/settings.json").read_text(encoding="utf-8"))["route"] == "chat"
    for _, _, sent in server.requests:
        assert {name: sent[name] for name in body} == body
    assert evaluate(server, "--format", "toolrl", "--limit", "1", "--resume") == 2
    assert "a different body" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"chat_template_kwargs": 1}'])
def test_an_extra_body_is_an_object(server: Server, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert evaluate(server, "--format", "toolrl", "--extra-body", text) == 2
    assert f"--extra-body is {text!r}, expected a JSON object" in capsys.readouterr().err
    assert server.requests == []


def test_an_extra_body_needs_a_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "tool-world", "--extra-body", "{}"]) == 2
    assert "--extra-body has no effect without --endpoint" in capsys.readouterr().err
    assert main(["eval", "tool-world", "--context-length", "0", "--prompts", "2"]) == 2
    assert "context_length is 0" in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize("joined", [False, True])
def test_a_password_in_the_url_is_never_written(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    url = server.url.replace("http://", "http://me:secret-4711@") + "/v1?api-key=key-4711#part-4711"
    options = [f"--endpoint={url}"] if joined else ["--endpoint", url]
    command = ["eval", "tool-world", *options, "--model", "m", "--format", "toolrl", "--limit", "1", "--out", "out"]
    monkeypatch.setattr("sys.argv", ["rest-rl", *command])
    assert main(command) == 0
    assert all(key.startswith("Basic ") for _, key, _ in server.requests)
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions?api-key=key-4711"}
    assert server.url in written()
    assert "4711" not in written()
    assert main([*command, "--resume"]) == 0
    captured = capsys.readouterr()
    assert "4711" not in captured.out + captured.err


def test_a_wrong_key_does_not_wait_for_other_requests(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Three requests hang for longer than any test takes, and a fourth is rejected."""
    steps = itertools.chain([hang] * 3, itertools.repeat(respond_with({"error": {"message": "bad key"}}, 401)))
    over: list[bool] = []

    def step(handler: Handler) -> None:
        with handler.server.lock:
            chosen = next(steps)
        chosen(handler)
        if chosen is hang:
            over.append(True)

    server.steps = itertools.repeat(step)
    assert evaluate(server, "--format", "toolrl", "--concurrency", "4", "--timeout", "10000") == 2
    assert over == []
    assert "returned status 401" in capsys.readouterr().err
    assert not Path("out/samples.jsonl").exists()  # cancelled requests are not results, not even failed ones


def test_an_interrupt_does_not_wait_for_requests(server: Server) -> None:
    server.steps = itertools.repeat(hang)
    who = ["--endpoint", server.url, "--model", "m", "--format", "toolrl", "--timeout", "10000", "--out", "out"]
    hears = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored in a background job
    )
    begin = f"{hears}; from rest_rl.cli.app import main; sys.exit(main())"
    command = [sys.executable, "-c", begin, "eval", "tool-world", "--prompts", "5", *who]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while len(server.requests) < 8 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=25)  # `hang` takes 30 seconds and is retried
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert b"Traceback" not in told


def test_the_context_of_a_local_model(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", "2", "--out", "out", "--context-length", "70"]
    assert main(["eval", "tool-world", *options]) == 0
    assert "exceed the context length of 70 tokens" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert all(row["prompt_tokens"] + row["tokens"] <= 70 for row in rows() if "overflow" not in row)
    assert any(row.get("truncated") or "overflow" in row for row in rows())
    assert server.requests == []

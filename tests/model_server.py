"""A model server in a thread that returns scripted responses and scripted failures."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rest_rl.data.samples import ToolSample
from rest_rl.evaluate.conversation import Request
from rest_rl.response import Gold

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "?", "parameters": {"type": "object", "properties": {}}},
}
Step = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each chat request with the next of the server's `steps`, and the model list with `models`."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.models(self)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers["Authorization"], body))
            step = next(self.server.steps)
        self.body = body
        try:
            step(self)
        except (BrokenPipeError, ConnectionResetError):  # the client has given up
            self.close_connection = True

    def send(self, data: bytes | str, status: int = 200, length: int | None = None, **headers: str) -> None:
        data = data.encode() if isinstance(data, str) else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    models: Any
    steps: Iterator[Step]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.models = serve_models("m", "other")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def serve_models(*names: str, **more: Any) -> Step:
    return lambda handler: handler.send(json.dumps({"data": [{"id": name, **more} for name in names]}))


def build_completion(content: Any, *, finish: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"id": "c", "choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 3}}


def reply_with(content: Any, **more: Any) -> Step:
    return lambda handler: handler.send(json.dumps(build_completion(content, **more)))


def respond_with(data: Any, status: int = 200, **headers: str) -> Step:
    return lambda handler: handler.send(
        data if isinstance(data, (bytes, str)) else json.dumps(data), status, None, **headers
    )


def hang(handler: Handler) -> None:
    handler.server.over.wait(30)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """Send single bytes slowly, so that no single read times out."""
    handler.send(b"", length=100_000)
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b" ")


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler: Handler) -> None:
    handler.send(b'{"choices": [', length=5000)
    hang_up(handler)


@contextmanager
def running_server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def build_request(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = (TOOL,), **more: Any) -> Request:
    messages = messages or ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"})
    return Request(ToolSample("s", messages, tools, Gold((), None), **more))

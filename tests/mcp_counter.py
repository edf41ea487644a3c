"""An MCP server with a counter, for both major versions of the official SDK: `python mcp_counter.py [PORT]`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Literal

try:
    from mcp.server.mcpserver import MCPServer as Server
except ImportError:  # version 1
    from mcp.server.fastmcp import FastMCP as Server

settings = {"host": "127.0.0.1", "port": int(sys.argv[1])} if sys.argv[1:] else {}
is_version_1 = Server.__name__ == "FastMCP"
server: Any = Server("counter", **(settings if is_version_1 else {}))
state = {"value": int(os.environ.get("REST_RL_SEED", "0")), "task": json.loads(os.environ.get("REST_RL_TASK", "{}"))}


@server.tool()
def add(amount: int, unit: Literal["one", "ten"] = "one") -> str:
    """Add an amount to the counter."""
    state["value"] += amount * {"one": 1, "ten": 10}[unit]
    return f"the counter is {state['value']}"


@server.tool()
def read_task() -> dict[str, Any]:
    """Return the task."""
    return state["task"]


@server.tool()
def process_id() -> int:
    """Return the process id of the server."""
    return os.getpid()


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("the counter is broken")


@server.tool()
def hang() -> str:
    """Sleep for a minute."""
    time.sleep(60)
    return "awake"


@server.tool()
def start(seed: int, goal: int) -> str:
    """Set the counter, before a rollout."""
    state["value"] = seed
    return f"Count from {seed} to {goal}."


@server.tool()
def judge(goal: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Score the rollout."""
    success = float(state["value"] == goal)
    return {"reward": success, "parts": {"success": success, "messages": float(len(messages))}}


def serve_with_token(port: int, token: str) -> None:
    """Serve over http, but refuse requests without the token."""
    import uvicorn

    app = server.streamable_http_app()

    async def check(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != f"Bearer {token}".encode():
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})
        else:
            await app(scope, receive, send)

    uvicorn.run(check, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    if settings and "COUNTER_TOKEN" in os.environ:
        serve_with_token(settings["port"], os.environ["COUNTER_TOKEN"])
    elif settings:
        server.run("streamable-http", **({} if is_version_1 else settings))
    else:
        print("counting", file=sys.stderr)
        server.run("stdio")

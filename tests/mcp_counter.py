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


if __name__ == "__main__":
    if settings:
        server.run("streamable-http", **({} if is_version_1 else settings))
    else:
        print("counting", file=sys.stderr)
        server.run("stdio")

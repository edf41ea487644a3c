"""MCP servers as environments: one session, and for commands one server process, per rollout.

The official SDK is asynchronous. Every session is a task in the background loop that holds the connection from start to
end, because its contexts must be entered and left by the same task; other threads ask it through the loop.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from string import Template
from typing import Any

from rest_rl.envs.adapters import append_observation, join_content, make_tool, make_verdict, prompt_messages, read_field
from rest_rl.envs.background import background_loop
from rest_rl.envs.session import Message, Result, Task
from rest_rl.errors import UserError

OPTIONS = ("verify_tool", "reset_tool", "timeout", "headers")
TIMEOUT = 120.0
"""Seconds after which a server that does not answer is ended; a rollout's own limit should be shorter."""
_CLOSING = 10.0
_CONNECTION_CLOSED = -32000
_connections: set[_Connection] = set()


class McpServer:
    """Opens sessions of the server with this command or http address.

    Raises:
        UserError: The SDK is not installed, an option is unknown or wrong, or the server cannot be started or lacks a
            tool.
    """

    def __init__(self, target: str, options: Mapping[str, Any]) -> None:
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise UserError(f"unknown option {unknown[0]!r} for an MCP server", " or ".join(OPTIONS), "remove it")
        self.target = target.strip()
        self.hidden = {name: options.get(name) for name in ("verify_tool", "reset_tool")}
        self.timeout = float(options.get("timeout", TIMEOUT))
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise UserError("an MCP server needs the package mcp", remedy="pip install 'mcp>=1.24,<3'") from None
        words = shlex.split(self.target)
        if not words or not (self.is_remote or shutil.which(words[0])):
            expected = "mcp: and a command or an http address, such as 'mcp:python server.py'"
            raise UserError(f"there is no command {words[0]!r}" if words else "'mcp:' names no server", expected)
        given = options.get("headers") or {}
        if given and not self.is_remote:
            remedy = "remove them; the command inherits your environment variables"
            raise UserError("headers are set, but the MCP server is a command", "an http address", remedy)
        if not isinstance(given, Mapping):
            raise UserError(
                f"headers is of type {type(given).__name__}", "header names with their values", "correct it"
            )
        self.headers = {name: _expand_header(name, value) for name, value in given.items()}

    @property
    def is_remote(self) -> bool:
        return self.target.startswith(("http://", "https://"))

    def check(self) -> None:
        """Start the server once, and check that it has the hidden tools and another one."""
        try:
            connection = _Connection(self, {})
        except Exception as error:
            verb, more = ("reach", "; if it wants a token, set headers") if self.is_remote else ("start", "")
            problem = f"cannot {verb} the MCP server {self.target!r} ({error})"
            raise UserError(problem, remedy=f"try it by hand{more}") from error
        try:
            names = [tool["function"]["name"] for tool in connection.list_tools()]
        finally:
            connection.close()
        for option, name in self.hidden.items():
            if name is not None and name not in names:
                raise UserError(f"{option} is {name!r}", f"a tool of the server: {', '.join(names)}", "correct it")
        if not set(names) - set(self.hidden.values()):
            raise UserError(f"the MCP server {self.target!r} has no tools", remedy="add some")

    def open(self, task: Task, seed: int) -> McpSession:
        connection = _Connection(self, {"REST_RL_SEED": str(seed), "REST_RL_TASK": json.dumps(dict(task), default=str)})
        try:
            return McpSession(connection, self.hidden, task, seed)
        except BaseException:
            connection.close()
            raise


# Configurations and logs keep the text as given, with the names of variables. No message quotes the expanded one.
def _expand_header(name: str, text: Any) -> str:
    try:
        value = Template(text).substitute(os.environ).strip()
    except KeyError as error:
        problem = f"the header {name!r} needs the environment variable {error.args[0]}"
        raise UserError(problem, remedy="set it, or write $$ for a dollar sign") from None
    except (TypeError, ValueError):
        expected = "text in which $NAME stands for an environment variable and $$ for a dollar sign"
        raise UserError(f"the header {name!r} has the wrong form", expected, "correct it") from None
    if not (value and value.isascii() and value.isprintable()):
        raise UserError(f"the header {name!r} is empty or has special characters", "printable ASCII", "correct it")
    return value


class McpSession:
    """A session of an MCP server. The tools that reset and score the task are hidden from the model."""

    def __init__(self, connection: _Connection, hidden: Mapping[str, str | None], task: Task, seed: int) -> None:
        self._connection, self._hidden = connection, hidden
        self._known = {**task, "task": dict(task), "seed": seed}
        self._schemas = {tool["function"]["name"]: tool for tool in connection.list_tools()}
        result = self._call_hidden("reset_tool", {})
        self._messages = append_observation(prompt_messages(task), result and _read_text(result))

    def initial_messages(self) -> list[Message]:
        return self._messages

    def list_tools(self) -> list[dict[str, Any]]:
        return [tool for name, tool in self._schemas.items() if name not in self._hidden.values()]

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        if name in self._hidden.values():
            raise ValueError(f"there is no tool {name!r}")
        result = self._connection.call_tool(name, arguments)
        return Result(_read_text(result), error="tool error" if read_field(result, "is_error", "isError") else "")

    def verify(self, messages: Sequence[Message]) -> Result:
        """Return what the verify tool says; without one, check that the server still runs."""
        result = self._call_hidden("verify_tool", {"messages": [dict(message) for message in messages]})
        if result is None:
            self._connection.ping()
            return Result()
        return make_verdict(_read_value(result))

    def close(self) -> None:
        self._connection.close()

    # Passes on what the tool's schema asks for: fields of the task, the task itself, the seed, the messages.
    def _call_hidden(self, option: str, more: Mapping[str, Any]) -> Any:
        name = self._hidden[option]
        if name is None:
            return None
        wanted = self._schemas[name]["function"]["parameters"].get("properties") or {}
        known = {key: value for key, value in {**self._known, **more}.items() if key in wanted}
        result = self._connection.call_tool(name, known)
        if read_field(result, "is_error", "isError"):
            raise RuntimeError(f"the tool {name} failed: {_read_text(result)[:300]}")
        return result


def _read_text(result: Any) -> str:
    structured = read_field(result, "structured_content", "structuredContent")
    if not result.content and structured is not None:
        return json.dumps(structured, ensure_ascii=False)
    return join_content(result.content, "\n")


# Servers wrap a number as {"result": number}; those without structured results send JSON as text.
def _read_value(result: Any) -> Any:
    value = read_field(result, "structured_content", "structuredContent")
    if value is None:
        value = json.loads(_read_text(result))
    return value["result"] if isinstance(value, Mapping) and set(value) == {"result"} else value


class _Connection:
    # One thread at a time asks the server, but any thread may call `close`, which also ends a call that hangs.
    def __init__(self, server: McpServer, variables: Mapping[str, str]) -> None:
        self._server, self._loop = server, background_loop()
        self._log: Any = tempfile.TemporaryFile()  # noqa: SIM115
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        _connections.add(self)
        try:
            self._session = self._run(self._start(variables))
        except Exception as error:
            _connections.discard(self)
            raise self._explain(error) from error

    def list_tools(self) -> list[dict[str, Any]]:
        return [make_tool(tool) for tool in self._ask(_list_tools(self._session))]

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Any:
        return self._ask(self._session.call_tool(name, dict(arguments)))

    def ping(self) -> None:
        self._ask(self._session.send_ping())

    def close(self) -> None:
        _connections.discard(self)
        self._run(self.end())

    async def end(self) -> None:
        self._stop.set()
        for _ in range(2 if self._task else 0):  # if it does not end by itself, it is canceled
            assert self._task is not None
            await asyncio.wait({self._task}, timeout=_CLOSING)
            self._task.cancel()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self, variables: Mapping[str, str]) -> Any:
        ready = self._loop.create_future()
        self._task = self._loop.create_task(self._serve(variables, ready))
        await self._race(ready)
        return ready.result()

    async def _serve(self, variables: Mapping[str, str], ready: asyncio.Future[Any]) -> None:
        from mcp import ClientSession

        async with AsyncExitStack() as stack:
            streams = await self._connect(stack, variables)
            session = await stack.enter_async_context(ClientSession(streams[0], streams[1]))
            await session.initialize()
            ready.set_result(session)
            await self._stop.wait()

    async def _connect(self, stack: AsyncExitStack, variables: Mapping[str, str]) -> Any:
        if self._server.is_remote:
            from mcp.client.streamable_http import streamable_http_client
            from mcp.shared._httpx_utils import create_mcp_http_client  # with the time limits of the SDK

            client = await stack.enter_async_context(create_mcp_http_client(headers=self._server.headers))
            return await stack.enter_async_context(streamable_http_client(self._server.target, http_client=client))
        from mcp import StdioServerParameters, stdio_client

        command, *arguments = shlex.split(self._server.target)
        environment = {**os.environ, **variables}
        parameters = StdioServerParameters(command=command, args=arguments, env=environment)
        return await stack.enter_async_context(stdio_client(parameters, errlog=self._log))

    def _ask(self, request: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._run(self._race(request))
        except TimeoutError as error:
            self.close()
            raise self._explain(error) from error
        except Exception as error:
            raise self._explain(error) from error

    # Waits for the answer or for the end of the connection, whichever comes first: version 1 of the SDK lets some
    # requests wait forever if the server has died.
    async def _race(self, request: Awaitable[Any]) -> Any:
        assert self._task is not None
        answer = asyncio.ensure_future(request)
        timeout = self._server.timeout
        done, _ = await asyncio.wait({answer, self._task}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if answer in done:
            return answer.result()
        answer.cancel()
        if done:
            self._task.result()
            raise ConnectionError("the connection has been closed")
        self._task.cancel()
        raise TimeoutError(f"no answer within {timeout:g} s")

    # Returns the error that the server reported, or for a lost connection one that quotes the end of its log.
    def _explain(self, error: BaseException) -> BaseException:
        while isinstance(inner := getattr(error, "exceptions", None), Sequence):  # of a task group
            error = inner[0]
        if getattr(getattr(error, "error", None), "code", _CONNECTION_CLOSED) != _CONNECTION_CLOSED:
            return error
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 500))
        log = self._log.read().decode("utf-8", "replace").strip()
        reason = (
            f"the MCP server {self._server.target!r} ended or does not answer ({str(error) or type(error).__name__})"
        )
        return ConnectionError(f"{reason}; the end of its log: {log}" if log else reason)


async def _list_tools(session: Any) -> list[Any]:
    from mcp.types import PaginatedRequestParams

    page = await session.list_tools()
    tools = list(page.tools)
    while cursor := read_field(page, "next_cursor", "nextCursor"):
        page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
        tools.extend(page.tools)
    return tools


def _close_all() -> None:
    ends = [asyncio.run_coroutine_threadsafe(each.end(), background_loop()) for each in tuple(_connections)]
    for end in ends:
        end.result()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_connections.clear)

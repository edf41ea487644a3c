"""An OpenAI-compatible server as a model: greedy decoding, concurrent requests, retries.

All requests run on one event loop in a separate thread. The evaluation's threads submit requests to it and wait,
because the rest of their work (executing and judging calls) is blocking.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from rest_rl.data.flattened_layout import Frame
from rest_rl.data.layout import PromptLayout
from rest_rl.data.reading import load_json
from rest_rl.errors import UserError, check_minimums
from rest_rl.evaluate.conversation import Model, Reply, Request
from rest_rl.evaluate.models import chat_messages as chat
from rest_rl.evaluate.models import token_prompts
from rest_rl.evaluate.models.chat_messages import MalformedResponseError
from rest_rl.evaluate.models.token_prompts import compute_context_usage
from rest_rl.formats import ToolFormat

API_KEY = "OPENAI_API_KEY"
"""The default environment variable of the API key."""
NO_KEY = "none"
MIN_SECRET_LENGTH = 4
"""Shorter query values are not keys, and redacting them would garble ordinary text."""
FIRST_RETRY_DELAY, MAX_RETRY_DELAY = 0.5, 8.0
"""Seconds before a malformed response is retried, doubled each time; the openai client uses the same delays."""
STOPPED_REPLY = Reply(error="stopped")
RESERVED_FIELDS = ("model", "messages", "prompt", "tools", "stream", "n")
"""Fields that `extra_body` must not set."""
TOKEN_IDS_REFUSED = re.compile(
    r"\bprompt\b.*\b(string|str|variant|type)\b|\bvariant\b.*\bprompt\b", re.IGNORECASE | re.DOTALL
)
"""Matches how servers report that they accept prompts only as text."""
ROUTE_REMEDY = "use vLLM or SGLang, remove --tokenizer to use chat completions, or pass --prompt native"


def base_url(url: str) -> str:
    """Return the base URL of the API, without `/completions` or `/chat/completions`; `/v1` is added to a bare host."""
    try:
        parts = urlsplit(url.strip())
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_usable = None, False
    if parts is None or not is_usable:
        raise UserError(f"--endpoint {public_url(url)!r} is not a URL", "http://HOST:PORT/v1", "correct the URL")
    plain = parts._replace(query="", fragment="").geturl()
    short = plain.rstrip("/").removesuffix("/completions").removesuffix("/chat").rstrip("/")
    return short if urlsplit(short).path else f"{short}/v1"


def parse_query(url: str) -> dict[str, str]:
    """Return the query parameters of a URL, which may contain a key or version that each request needs."""
    return dict(parse_qsl(urlsplit(url.strip()).query, keep_blank_values=True))


def public_url(url: str) -> str:
    """Return a URL without user, password, query and fragment, for messages and files."""
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # raises ValueError for a password with # or ?, which splits the URL in the wrong place
    except ValueError:
        return re.split(r"[?#]", re.sub(r"//.*@", "//", url.strip()))[0]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def find_secrets(url: str) -> list[str]:
    """Return user, password and query values of a URL, for redaction, both encoded and decoded, the longest first."""
    # longest first: a secret may contain another one, and replacing the shorter one first would leave the rest visible
    parts = urlsplit(url.strip())
    account, _, _ = parts.netloc.rpartition("@")
    password = account.partition(":")[2]
    written = [value for pair in parts.query.split("&") if (value := pair.partition("=")[2])]
    values = [value for value in (*written, *parse_query(url).values()) if len(value) >= MIN_SECRET_LENGTH]
    return sorted({secret for secret in (account, password, unquote(password), *values) if secret}, key=len)[::-1]


def read_api_key(variable: str) -> str:
    """Return the API key from an environment variable; the text `none` if the default variable is not set."""
    key = os.environ.get(variable, "").strip()
    if not key and variable != API_KEY:
        raise UserError(f"the environment variable {variable} is not set", "the API key", "set it")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {variable} contains unusual characters", "printable ASCII", "copy the key again")
    return key or NO_KEY


@functools.cache
def shared_event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop that all endpoints share; it runs in a daemon thread."""
    # connections of an HTTP client belong to one event loop; a daemon thread does not keep the process from exiting
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop


class Endpoint(Model):
    """A model behind an OpenAI-compatible server; `respond` may be called from several threads.

    There are three ways to prompt the model. With `native` the server gets messages and tools, renders them, and parses
    the tool calls. With a `layout` the prompt is rendered as in training and sent to `/completions` as token ids.
    Without either, a system message describes tools and format, and the server renders the messages. In the last two
    cases the tool calls are parsed from the text here.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tool_format: ToolFormat,
        *,
        native: bool,
        max_new_tokens: int,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        requests_per_minute: int | None = None,
        api_key_env: str = API_KEY,
        extra_body: Mapping[str, Any] | None = None,
        layout: PromptLayout | None = None,
        frame: Frame | None = None,
        context: int | None = None,
    ) -> None:
        """Create the client.

        `retries` is how often a request is repeated (after the server's `Retry-After`) if the connection fails, the
        response is malformed or the status is 408, 409, 429 or 5xx. `context` is the context length (default: the
        server's); `context_usage` needs it and a `layout`. A `frame` turns tools and history into text as in ToolRL.
        """
        try:
            import openai
        except ImportError:
            raise UserError("--endpoint needs the package openai", remedy="pip install 'openai>=2,<4'") from None
        sizes = {"max_new_tokens": max_new_tokens, "concurrency": concurrency, "context_length": context}
        sizes["requests_per_minute"] = requests_per_minute
        check_minimums({name: (size, 1) for name, size in sizes.items()})
        if retries < 0 or not timeout > 0:
            wrong = f"retries is {retries}" if retries < 0 else f"timeout is {timeout}"
            raise UserError(wrong, "retries of at least 0 and a timeout above 0", "raise it")
        if reserved := sorted(set(extra_body or {}) & {*RESERVED_FIELDS}):
            raise UserError(f"--extra-body must not set {', '.join(reserved)}", remedy="remove it")
        address, key = base_url(url), read_api_key(api_key_env)
        self.url, self.model, self.tool_format, self.native = public_url(address), model, tool_format, native
        self.max_new_tokens, self.concurrency = max_new_tokens, concurrency
        self.timeout, self.retries, self.extra_body = timeout, retries, dict(extra_body or {})
        self.layout, self.frame = layout, frame
        self.context, self._asks_server_for_context = context, context is None
        self._secrets = [*find_secrets(url), *([] if key == NO_KEY else [key])]
        self._send_interval, self._next_send_time = 60.0 / requests_per_minute if requests_per_minute else 0.0, 0.0
        self._openai, self._loop, self._slots = openai, shared_event_loop(), asyncio.Semaphore(concurrency)
        self._attempts_note = f"after {retries + 1} attempt{'s' * (retries > 0)}"
        self._pending: set[Future[list[Reply]]] = set()
        self._is_stopped = False
        self._client = openai.AsyncOpenAI(
            base_url=address,
            api_key=key,
            timeout=timeout,
            max_retries=retries,
            default_query=parse_query(url) or None,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._wait_for_rate_limit]}),
        )
        self._uses_chat = native or layout is None
        self._route = self._client.chat.completions if self._uses_chat else self._client.completions

    def check(self) -> None:
        """Raise UserError if the server does not respond, rejects the key or does not serve the model."""
        asyncio.run_coroutine_threadsafe(self._check(), self._loop).result()

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Return one reply per request, in order. Raises UserError if the key, model name or URL is wrong."""
        if not self._is_stopped:
            answers = asyncio.run_coroutine_threadsafe(self._respond_all(requests), self._loop)
            self._pending.add(answers)
            answers.add_done_callback(self._pending.discard)
            if self._is_stopped:  # stop() may have run before the future was registered
                answers.cancel()
            try:
                return answers.result()
            except CancelledError:
                pass
            except RuntimeError:  # httpx's, if stop() closed the client just before the request was sent
                if not self._is_stopped:
                    raise
        return [STOPPED_REPLY] * len(requests)

    def context_usage(self, request: Request) -> tuple[int, int] | None:
        """See `Model.context_usage`. This is an estimate if the server renders the prompt."""
        request = self._flatten(request)
        return compute_context_usage(request, self.layout, self.max_new_tokens, self.context) if self.layout else None

    def stop(self) -> None:
        """Cancel all requests immediately; these and all later requests get an error reply. Thread-safe."""
        self._is_stopped = True
        for answers in self._pending.copy():
            answers.cancel()
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop)

    # Rate limit: each request reserves the next free slot on a timeline with slots 60 / requests_per_minute seconds
    # apart, and sleeps until then. There is no await between reading and advancing the timeline, so the single event
    # loop makes this atomic. As a hook of the HTTP client it also delays the client's own retries.
    async def _wait_for_rate_limit(self, _: Any) -> None:
        now = self._loop.time()
        turn = max(now, self._next_send_time)
        self._next_send_time = turn + self._send_interval
        await asyncio.sleep(turn - now)

    async def _respond_all(self, requests: Sequence[Request]) -> list[Reply]:
        return list(await asyncio.gather(*map(self._respond_one, requests)))

    # Two layers of retries. The openai client retries failed connections and statuses 408, 409, 429 and 5xx. It counts
    # a body that breaks off or is not a completion as a success (routers report failures of the server behind them with
    # status 200), so this loop retries those, with the client's delays. `_slots` bounds the concurrent requests of all
    # threads and is held across retries, so that a failing server does not get more requests.
    #
    # Context overflow of a chat: prompt plus `max_tokens` may exceed the context although the prompt fits. The request
    # is repeated once without `max_tokens`, which lets the server use what is left; if it overflows again, the prompt
    # itself is too long.
    async def _respond_one(self, request: Request) -> Reply:
        question = self._build_request(self._flatten(request))
        if isinstance(question, Reply):
            return question
        body, read = question
        problem = ""
        async with self._slots:
            for attempt in range(self.retries + 1):
                if attempt:
                    delay = min(FIRST_RETRY_DELAY * 2 ** (attempt - 1), MAX_RETRY_DELAY)
                    await asyncio.sleep(delay * random.uniform(0.75, 1.0))
                try:
                    reply = await self._send(body, read)
                    if reply.overflow and self._uses_chat and body.pop("max_tokens", None):
                        reply = await self._send(body, read)
                    return reply
                except MalformedResponseError as error:
                    expected = "a chat completion" if self._uses_chat else "a text completion"
                    problem = f"malformed response ({error}), expected {expected}"
        return Reply(error=self._redact(f"{problem}, {self._attempts_note}"))

    def _build_request(self, request: Request) -> tuple[dict[str, Any], Callable[[bytes], Reply]] | Reply:
        # (request body, parser of its response), or a reply if the prompt cannot be rendered or is too long
        extra = dict(self.extra_body)
        if self.layout is None or self._uses_chat:
            usage = self.context_usage(request)
            over = max(usage[0] - usage[1], 0) if usage else 0
            body = chat.build_chat_body(request.sample, self.tool_format, native=self.native)
            body["max_tokens"] = max(self.max_new_tokens - over, 1)  # the server decides whether the prompt fits
            read = functools.partial(chat.parse_chat_completion, sample=request.sample, tool_format=self.tool_format)
        else:
            prompt = token_prompts.prepare_prompt(request, self.layout, self.max_new_tokens, self.context)
            if isinstance(prompt, Reply):
                return prompt
            body = token_prompts.build_completion_body(prompt, self.layout)
            extra.pop("chat_template_kwargs", None)  # the layout has already applied them
            extra = {**body.pop("extra_body", {}), **extra}
            read = functools.partial(token_prompts.parse_completion, prompt=prompt, layout=self.layout)
        return {"model": self.model, **body, "temperature": 0, "extra_body": extra or None}, read

    def _flatten(self, request: Request) -> Request:
        return replace(request, sample=self.frame.flatten(request.sample)) if self.frame else request

    async def _send(self, body: Mapping[str, Any], read: Callable[[bytes], Reply]) -> Reply:
        try:
            async with self._route.with_streaming_response.create(**body) as response:
                return read(await self._read_body(response))
        except self._openai.APIConnectionError as error:
            return Reply(error=f"{self._describe_connection_error(error)}, {self._attempts_note}")
        except self._openai.APIStatusError as error:
            return self._reply_for_status(error, body["extra_body"] or {})
        except UnicodeError as error:  # an unpaired surrogate in the prompt
            return Reply(error=f"the prompt is not valid Unicode text ({error})")

    async def _read_body(self, response: Any) -> bytes:
        # The client's timeout applies to each read, and a server may send one byte at a time: limit the whole body.
        try:
            return await asyncio.wait_for(response.read(), self.timeout)
        except asyncio.TimeoutError:
            raise MalformedResponseError(f"not complete within {self.timeout:g} s") from None
        except Exception as error:  # exception types of the HTTP library, which differ between openai releases
            raise MalformedResponseError(f"it breaks off: {type(error).__name__}: {error}") from None

    def _reply_for_status(self, error: Any, extra: Mapping[str, Any]) -> Reply:
        # A status of 400 or more: a prompt that is too long (a wrong sample), a mistake of the user (stops the
        # evaluation), a rejected request or a failing server (an unscored sample).
        status, message = error.status_code, str(error.message)
        if status == 413 or (status in (400, 422) and chat.OVERFLOW_MESSAGE.search(message)):
            return Reply(overflow=self._redact(f"the server reports: {message:.400}"))
        if status in (401, 402, 403, 404, 405, 501) or getattr(error, "code", None) == "insufficient_quota":
            raise self._user_error(error)
        if status == 400 and "completion tokens" in message:
            raise self._user_error(error)
        if status in (400, 422):
            if named := [name for name in extra if re.search(rf"\b{re.escape(name)}\b", message)]:
                remedy = "remove it from --extra-body" if named[0] in self.extra_body else ROUTE_REMEDY
                raise self._user_error(error, f"a server that accepts {', '.join(named)}", remedy)
            if not self._uses_chat and TOKEN_IDS_REFUSED.search(message):
                raise self._user_error(error, "a server that accepts token ids", ROUTE_REMEDY)
            return Reply(error=self._redact(f"the server rejects the request with {status}: {message:.400}"))
        return Reply(error=self._redact(f"the server returns {status}: {message:.200}, {self._attempts_note}"))

    def _user_error(self, error: Any, expected: str = "", remedy: str = "") -> UserError:
        # for a status that stops the evaluation, because every other request would fail in the same way
        place = "" if self._uses_chat else f" at {self.url}/completions"
        other = "" if self._uses_chat else "; or remove --tokenizer to use chat completions, or pass --prompt native"
        missing = (f"the model {self.model!r}{place}", f"correct the model's name or the URL (most end in /v1){other}")
        known = {
            400: ("fewer tokens per response", "lower --max-new-tokens"),
            401: ("a valid API key", f"set {API_KEY}, or name another variable with --api-key-env"),
            403: ("a key with access to this model", "use another key or model"),
            **dict.fromkeys((404, 405, 501), missing),
        }
        usual = known.get(error.status_code, ("an account with credit left", "check the quota"))
        message = self._redact(f"{self.url} returned status {error.status_code} ({error.message:.200})")
        return UserError(message, expected or usual[0], remedy or usual[1])

    def _describe_connection_error(self, error: Any) -> str:
        if isinstance(error, self._openai.APITimeoutError):
            return f"no response within {self.timeout:g} s"
        return self._redact(f"no connection ({type(error.__cause__).__name__}: {error.__cause__})")

    def _redact(self, text: str) -> str:
        # servers tend to echo keys and passwords in their error messages
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def _check(self) -> None:
        client = self._client.with_options(timeout=min(self.timeout, 30.0), max_retries=min(self.retries, 2))
        try:
            async with client.models.with_streaming_response.list() as response:
                served = {
                    str(entry["id"]): entry for entry in load_json((await self._read_body(response)).decode())["data"]
                }
        except self._openai.APIConnectionError as error:
            got, expected = (
                f"no answer from {self.url} ({self._describe_connection_error(error)})",
                "an OpenAI-compatible server",
            )
            raise UserError(got, expected, "start it, or correct the URL") from None
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._user_error(error) from None
            return
        except (MalformedResponseError, ValueError, TypeError, KeyError):
            return
        if served and self.model not in served:
            near = difflib.get_close_matches(self.model, served, n=20, cutoff=0.4) or list(served)[:20]
            problem = f"{self.url} does not serve a model {self.model!r}"
            raise UserError(problem, f"one of {', '.join(near)}", "change --model")
        length = served.get(self.model, {}).get("max_model_len")  # vLLM and SGLang report it
        if self._asks_server_for_context:
            self.context = length if isinstance(length, int) and length > 0 else None

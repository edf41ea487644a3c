"""Any OpenAI-compatible server as a model: greedy, in parallel, patient with servers that fail."""

from __future__ import annotations

import difflib
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from rest_rl.data.layout import PromptLayout
from rest_rl.data.reading import load_json
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Reply, Request
from rest_rl.evaluate.models.chat_messages import OVERFLOW, GarbledError, chat_body, read_answer
from rest_rl.evaluate.models.token_prompts import check_sizes, completion_body, prepare, read_completion, room_of
from rest_rl.formats import ToolFormat

SHORTEST_SECRET = 4
"""Letters of a query's value that is struck out of messages: shorter ones are no keys, and stand in every text."""


def base_url(url: str) -> str:
    """The address under which `/completions` and `/chat/completions` lie, from one with or without them and `/v1`.

    It has neither query nor fragment; `query_of` has the first, the other is never sent.
    """
    try:
        parts = urlsplit(url.strip())
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_usable = None, False
    if parts is None or not is_usable:
        raise UserError(f"the endpoint {public_url(url)!r}", "a URL", "write http://HOST:PORT/v1")
    plain = parts._replace(query="", fragment="").geturl()
    short = plain.rstrip("/").removesuffix("/completions").removesuffix("/chat").rstrip("/")
    return short if urlsplit(short).path else f"{short}/v1"


def query_of(url: str) -> dict[str, str]:
    """The query of a URL, which goes with every request: some servers take the key or a version of their API there."""
    return dict(parse_qsl(urlsplit(url.strip()).query, keep_blank_values=True))


def public_url(url: str) -> str:
    """A URL without the user and password, the query and the fragment that it may hold."""
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # part of a password with a # or ? in it is no number
    except ValueError:
        shown = re.sub(r"//.*@", "//", url.strip())
        return re.split(r"[?#]", shown)[0]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def secrets_of(url: str) -> list[str]:
    """User and password in a URL and the values of its query, as written and as meant; the longest first."""
    parts = urlsplit(url.strip())
    account, _, _ = parts.netloc.rpartition("@")
    password = account.partition(":")[2]
    written = [value for pair in parts.query.split("&") if (value := pair.partition("=")[2])]
    values = [value for value in (*written, *query_of(url).values()) if len(value) >= SHORTEST_SECRET]
    return sorted({secret for secret in (account, password, unquote(password), *values) if secret}, key=len)[::-1]


T = TypeVar("T")


class StoppedError(Exception):
    """What was under way has been given up."""


class Halt:
    """Ends pauses and calls in all threads at once."""

    def __init__(self) -> None:
        """Nothing is stopped yet."""
        self._stopped, self._lock = Event(), Lock()
        self._waiting: set[SimpleQueue[tuple[Any, BaseException | None]]] = set()

    @property
    def is_set(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End what is under way, from any thread; later calls end at once."""
        with self._lock:
            self._stopped.set()
            for answers in self._waiting:
                answers.put((None, StoppedError()))

    def pause(self, seconds: float) -> None:
        """Sleep, at most until we are stopped."""
        self._stopped.wait(max(0.0, seconds))

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, or its exception; StoppedError as soon as we are stopped.

        It runs in a thread of its own, which is left behind then: closing a socket does not wake the thread that reads
        from it, and its number may be given to another file meanwhile. Such a thread keeps no process from ending.
        """
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def run() -> None:
            try:
                answers.put((work(), None))
            except BaseException as error:  # raised again in the thread that waits
                answers.put((None, error))

        with self._lock:
            if self._stopped.is_set():
                raise StoppedError
            self._waiting.add(answers)
        try:
            Thread(target=run, daemon=True).start()
            result, error = answers.get()
        finally:
            with self._lock:
                self._waiting.discard(answers)
        if error is not None:
            raise error
        return result


class Pace:
    """When the next request may go out, for all threads together."""

    def __init__(
        self,
        per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """No more than `per_minute` requests, evenly spread; None for no limit."""
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next, self._lock = 0.0, Lock()

    def wait(self) -> None:
        """Sleep until it is this request's turn."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._gap
        self._sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Let nobody begin for a while: the server has asked for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


API_KEY = "OPENAI_API_KEY"
"""The environment variable that holds the key unless another is named."""
NO_KEY = "none"
MAX_BYTES = 32 << 20
MAX_BACKOFF, MAX_WAIT = 60.0, 300.0
"""Seconds between two attempts at most, and how long a server may ask us to wait."""
AGAIN = (408, 409, 425, 429)
"""Statuses, besides those from 500 on, after which the same request may succeed."""
STOPPED = Reply(error="stopped")
OWN_FIELDS = ("model", "messages", "prompt", "tools", "stream", "n")
"""What `extra_body` must leave alone."""
NO_IDS = re.compile(r"\bprompt\b.*\b(string|str|variant|type)\b|\bvariant\b.*\bprompt\b", re.IGNORECASE | re.DOTALL)
"""How servers say that they take a prompt as text alone."""


class Failure(NamedTuple):
    """An attempt that gave nothing: why, and how long the server asks us to wait."""

    problem: str
    wait: float = 0.0


class Question(NamedTuple):
    """What a request becomes: the fields that are sent, and how the answer is read."""

    body: Mapping[str, Any]
    read: Callable[[bytes], Reply]


class Endpoint:
    """A model behind an OpenAI-compatible server; safe to ask from `concurrency` threads.

    `native` gives the server messages and tools as they are, and takes the calls that it reads out. Without it a
    `layout` makes the very prompt of training, which `/completions` goes on from as token ids; without either, tools
    and format are described in a system message, which the server lays out. The calls stand in the text then.
    """

    batch_size = 1

    def __init__(
        self,
        url: str,
        model: str,
        tool_format: ToolFormat,
        *,
        native: bool,
        max_new_tokens: int,
        concurrency: int = 8,
        timeout: float = 300.0,
        retries: int = 8,
        backoff: float = 1.0,
        requests_per_minute: int | None = None,
        api_key_env: str = API_KEY,
        extra_body: Mapping[str, Any] | None = None,
        layout: PromptLayout | None = None,
        context: int | None = None,
    ) -> None:
        """`backoff` is the first pause in seconds, doubled each time; `extra_body` goes into every request as it is.

        `context` is what the server holds, where it does not state that itself; with it and a `layout`, `room` can tell
        what a prompt takes, and responses are given what it leaves. ValueError without the package openai, for an
        unusable URL, key or `extra_body`, and for numbers outside their range.
        """
        try:
            import openai
        except ImportError:
            raise UserError("an endpoint without the package openai", "it", "pip install 'rest-rl[endpoint]'") from None
        check_ranges(max_new_tokens, concurrency, timeout, retries, requests_per_minute)
        check_sizes(context=1 if context is None else context)
        if taken := sorted(set(extra_body or {}) & {*OWN_FIELDS}):
            raise ValueError(f"got {', '.join(taken)} in the extra body, which the evaluation sets; leave it out")
        address = base_url(url)
        self.url, self.model, self.tool_format, self.native = public_url(address), model, tool_format, native
        self.max_new_tokens, self.concurrency, self.timeout = max_new_tokens, concurrency, timeout
        self.retries, self.backoff, self.extra_body = retries, backoff, dict(extra_body or {})
        self.layout, self.context, self._states_context = layout, context, context is None
        self._openai, self._tokenizing, self._halt = openai, Lock(), Halt()
        self._pace = Pace(requests_per_minute, sleep=self._halt.pause)
        key, query = api_key(api_key_env), query_of(url)
        self._secrets = [*secrets_of(url), *([] if key == NO_KEY else [key])]
        self._client = openai.OpenAI(
            base_url=address, api_key=key, timeout=timeout, max_retries=0, default_query=query or None
        )
        self._chats = native or layout is None
        self._route = self._client.chat.completions if self._chats else self._client.completions

    def check(self) -> None:
        """Ask the server what it serves; ValueError if it does not answer, refuses the key or lacks the model.

        A server that does not list its models passes.
        """
        problem = ""
        for attempt in range(min(self.retries, 2) + 1):
            self._pause(attempt)
            client = self._client.with_options(timeout=min(self.timeout, 30.0))
            try:
                with client.models.with_streaming_response.list() as response:
                    return self._check_served(self._read(response))
            except self._openai.APIConnectionError as error:
                problem = self._problem_of(error)
            except self._openai.APIStatusError as error:
                if error.status_code in (401, 403):
                    raise self._mistake(error) from None
                return None
            except GarbledError:
                return None
        raise UserError(
            f"no answer from {self.url} ({problem})", "an OpenAI-compatible server", "start it, or mend the URL"
        )

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; ValueError for what no repetition mends: key, model name, URL."""
        return [self._respond(request) for request in requests]

    def room(self, request: Request) -> tuple[int, int] | None:
        """(tokens of the prompt and of the longest response, tokens the server holds), where both are known.

        An estimate where the server lays out the prompt itself.
        """
        if self.layout is None:
            return None
        with self._tokenizing:
            return room_of(request, self.layout, self.max_new_tokens, self.context)

    def stop(self) -> None:
        """End requests and pauses in all threads at once; they and all later ones are replies with an error."""
        self._halt.stop()

    def _question(self, request: Request) -> Question | Reply:
        """What is asked on this server's route; a prompt that cannot be made or does not fit is a reply already."""
        extra = dict(self.extra_body)
        if self.layout is None or self._chats:
            room = self.room(request)
            over = max(room[0] - room[1], 0) if room else 0
            body = chat_body(request.sample, self.tool_format, native=self.native)
            body["max_tokens"] = max(self.max_new_tokens - over, 1)  # whether the prompt fits is for the server to say
            read = partial(read_answer, sample=request.sample, tool_format=self.tool_format)
        else:
            with self._tokenizing:  # tokenizers may not be used by several threads at once
                prompt = prepare(request, self.layout, self.max_new_tokens, self.context)
            if isinstance(prompt, Reply):
                return prompt
            body = completion_body(prompt, self.layout)
            extra.pop("chat_template_kwargs", None)  # the layout has them
            extra = {**body.pop("extra_body", {}), **extra}
            read = partial(read_completion, prompt=prompt, layout=self.layout)
        return Question({"model": self.model, **body, "temperature": 0, "extra_body": extra or None}, read)

    def _respond(self, request: Request) -> Reply:
        if self._halt.is_set:
            return STOPPED
        question = self._question(request)
        if isinstance(question, Reply):
            return question
        try:
            return self._answer(question)
        except StoppedError:
            return STOPPED

    def _answer(self, question: Question) -> Reply:
        """The reply to a question, however many attempts it takes; StoppedError where they are given up."""
        outcome = Failure("")
        for attempt in range(self.retries + 1):
            self._pause(attempt)
            self._pace.wait()
            outcome = self._halt.call(partial(self._attempt, question))
            if self._chats and isinstance(outcome, Reply) and outcome.overflow and "max_tokens" in question.body:
                # the prompt may fit where prompt and longest response do not: then the server gives what is left
                body = {name: value for name, value in question.body.items() if name != "max_tokens"}
                question = question._replace(body=body)
                outcome = self._halt.call(partial(self._attempt, question))
            if isinstance(outcome, Reply):
                return outcome
            if outcome.wait > MAX_WAIT:
                return Reply(error=f"{outcome.problem}; the server asks to wait {outcome.wait:.0f} s")
            if outcome.wait > 0:
                self._pace.hold(outcome.wait)
        return Reply(error=f"{outcome.problem}, {self.retries + 1} times in a row" if self.retries else outcome.problem)

    def _pause(self, attempt: int) -> None:
        """Twice as long each time, and shortened at random, so that threads do not come back all at once."""
        if attempt:
            self._halt.pause(min(self.backoff * 2.0 ** (attempt - 1), MAX_BACKOFF) * random.uniform(0.5, 1.0))

    def _attempt(self, question: Question) -> Reply | Failure:
        try:
            with self._route.with_streaming_response.create(**question.body) as response:
                data = self._read(response)
            return question.read(data)
        except self._openai.APIConnectionError as error:
            return Failure(self._problem_of(error))
        except self._openai.APIStatusError as error:
            return self._refusal(error, question)
        except UnicodeError as error:  # half of a surrogate pair in the prompt
            return Reply(error=f"got a prompt that is no Unicode text ({error})")
        except GarbledError as error:
            return Failure(self._scrubbed(f"got {error}, expected {'a chat' if self._chats else 'a text'} completion"))

    def _read(self, response: Any) -> bytes:
        """The body; GarbledError for one that takes or is too long: a server may go on for ever, a byte at a time."""
        deadline, chunks, size = time.monotonic() + self.timeout, [], 0
        try:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_BYTES:
                    raise GarbledError(f"an answer of more than {MAX_BYTES} bytes")
                if self._halt.is_set:
                    raise StoppedError
                if time.monotonic() > deadline:
                    raise GarbledError(f"no end of the answer within {self.timeout:g} s")
        except (GarbledError, StoppedError):
            raise
        except Exception as error:  # the HTTP library's own types, which differ between releases of openai
            raise GarbledError(f"an answer that breaks off ({type(error).__name__}: {error})") from None
        return b"".join(chunks)

    def _refusal(self, error: Any, question: Question) -> Reply | Failure:
        """What a status from 400 on means: too long a prompt, a user's mistake, a bad moment, a bad request."""
        status, said = error.status_code, str(error.message)
        if status in (401, 402, 403, 404, 405, 501) or getattr(error, "code", None) == "insufficient_quota":
            raise self._mistake(error) from None
        if status == 413 or (status in (400, 422) and OVERFLOW.search(said)):
            return Reply(overflow=self._scrubbed(f"the server says: {said:.400}"))
        if status == 400 and "completion tokens" in said:
            raise self._mistake(error) from None
        if status in (400, 422):
            self._refuse_fields(error, question)
        if status in AGAIN or status >= 500:
            return Failure(self._scrubbed(f"the server answers {status}: {said:.200}"), retry_after(error.response))
        return Reply(error=self._scrubbed(f"the server refuses the request with {status}: {said:.400}"))

    def _refuse_fields(self, error: Any, question: Question) -> None:
        """ValueError where the server says that it does not know a field, or takes no token ids."""
        said, extra = str(error.message), question.body["extra_body"] or {}
        named = [name for name in extra if re.search(rf"\b{re.escape(name)}\b", said)]
        if named:
            own = "leave it out of --extra-body" if named[0] in self.extra_body else self._other_route()
            raise self._mistake(error, f"expected a server that takes {', '.join(named)}; {own}") from None
        if not self._chats and NO_IDS.search(said):
            raise self._mistake(error, f"expected a server that takes token ids; {self._other_route()}") from None

    def _other_route(self) -> str:
        return "use vLLM or SGLang, leave --tokenizer out to ask for chat completions, or use --prompt native"

    def _mistake(self, error: Any, told: str = "") -> ValueError:
        missing = f"expected it to serve {self.model!r}; mend the model's name, or the URL (most end in /v1)"
        if not self._chats:
            missing = (
                f"expected {self.model!r} at {self.url}/completions; mend the model's name or the URL (most end in "
                "/v1), or leave --tokenizer out to ask for chat completions, or use --prompt native"
            )
        remedy = {
            400: "expected fewer tokens per response; lower --max-new-tokens",
            401: f"expected a key that it takes; set {API_KEY}, or name another variable with --api-key-env",
            403: "expected a key that may use this model; use another key or model",
            **dict.fromkeys((404, 405, 501), missing),
        }.get(error.status_code, "expected an account that may go on; see to the quota")
        said = self._scrubbed(f"got {error.status_code} from {self.url} ({error.message:.200})")
        return ValueError(f"{said}, {told or remedy}")

    def _problem_of(self, error: Any) -> str:
        if isinstance(error, self._openai.APITimeoutError):
            return f"no answer within {self.timeout:g} s"
        return self._scrubbed(f"no connection ({type(error.__cause__).__name__}: {error.__cause__})")

    def _scrubbed(self, text: str) -> str:
        """Text without key and password, which servers like to repeat."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _check_served(self, data: bytes) -> None:
        try:
            listed = load_json(data.decode("utf-8"))["data"]
            served = {str(entry["id"]): entry for entry in listed}
        except (ValueError, TypeError, KeyError):
            return
        if served and self.model not in served:
            near = difflib.get_close_matches(self.model, served, n=20, cutoff=0.4) or list(served)[:20]
            raise UserError(
                f"the model {self.model!r}", f"one that {self.url} serves: {', '.join(near)}", "change --model"
            )
        length = served.get(self.model, {}).get("max_model_len")  # vLLM and SGLang say it
        if self._states_context:
            self.context = length if isinstance(length, int) and length > 0 else None


def api_key(variable: str) -> str:
    """The key out of an environment variable; `none` where the usual one is not set. ValueError for an unusable one."""
    key = os.environ.get(variable, "").strip()
    if not key and variable != API_KEY:
        raise UserError(f"no key in the environment variable {variable}", "one", "set it")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"a key with unusual characters in {variable}", "plain ASCII", "copy it again")
    return key or NO_KEY


def retry_after(response: Any) -> float:
    """Seconds that the server asks us to wait, as a number or as a date; 0 where it does not say."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # also for nan


def check_ranges(
    max_new_tokens: int, concurrency: int, timeout: float, retries: int, requests_per_minute: int | None
) -> None:
    """ValueError for a number outside its range."""
    limits = {
        "max_new_tokens": (max_new_tokens, 1),
        "concurrency": (concurrency, 1),
        "retries": (retries, 0),
        "requests_per_minute": (1 if requests_per_minute is None else requests_per_minute, 1),
    }
    for name, (value, least) in limits.items():
        if value < least:
            raise UserError(f"{name} = {value}", f"at least {least}", "raise it")
    if not timeout > 0:
        raise UserError(f"timeout = {timeout}", "a number of seconds above 0", "raise it")

"""Client of the process that runs bfcl_eval to read samples, execute calls and check them.

Model output is handled in confined forks of that process. An exception in a checker becomes a verdict. After any other
failure the request raises a `SandboxError`, and the next request starts a new process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from rest_rl.envs.bfcl_sandbox.package import BfclPackage, install_command, share_folder
from rest_rl.errors import UserError

PACKAGE_ROOT = Path(__file__).parents[3]
CHILD_SCRIPT = f"import sys; sys.path.insert(0, sys.argv.pop(1)); from {__package__}.child import main; main()"
"""The process gets a clean environment without PYTHONPATH, and therefore the path of this package as an argument."""
FIXED_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "TZ": "UTC"}
"""The backends print sets and local times; these settings make the model's inputs reproducible."""
LOADING_SECONDS = 120.0
"""The time limit of requests without model output, which only wait for a slow disk."""
MAX_TRIES = 3
WALL_SECONDS_PER_CPU_SECOND = 3.0
"""Wall-clock seconds to wait per second of CPU time. The CPU limit decides; on a busy machine it takes longer."""
FAILURE_MESSAGE = "the process that works with bfcl-eval failed: {}"
MAX_DEPTH = 100
MAX_INTEGER_BITS = 14_000
"""Keeps integers below the 4300 digits that Python parses."""


class Verdict(NamedTuple):
    """A checker's verdict: whether the response is valid, and if not, BFCL's error type and message."""

    valid: bool
    error_type: str = ""
    message: str = ""


class SandboxError(RuntimeError):
    """The process failed, died or was killed during a request; the message contains the reason."""

    def __init__(self, message: str, *, is_limit: bool = False) -> None:
        # is_limit: the request exceeded a limit and would again; otherwise the cause may lie outside, and a retry helps
        super().__init__(message)
        self.is_limit = is_limit


class Sandbox(contextlib.AbstractContextManager["Sandbox"]):
    """A process that runs one bfcl-eval release. A request starts the process if it is not running.

    Not thread-safe; `SandboxPool` gives each sandbox to one user at a time.
    """

    def __init__(self, package: BfclPackage, *, seconds: float = 20.0, memory_mb: int = 2048) -> None:
        """Set the limits of the forks that handle model output: CPU seconds per sample, and memory in MiB."""
        if not hasattr(os, "fork"):
            raise UserError(f"BFCL does not run on {sys.platform}", remedy="use Linux, macOS or WSL")
        self._package, self._seconds, self._memory_mb = package, seconds, memory_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._session: Session | None = None
        self._loaded: set[str] = set()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def entries(self, category: str) -> list[dict[str, Any]]:
        """Return a category's samples: `ground_truth`, tools for the model (`function`) and the checker (`checked`)."""
        return self._look_up("entries", category)

    def constants(self) -> dict[str, Any]:
        """Return `updated_functions` (announces new tools), `max_steps` per turn, and `types` (BFCL's to JSON's)."""
        return self._look_up("constants")

    def gold_calls(self, identity: str) -> list[list[dict[str, Any]]]:
        """Return the gold calls of a multi-turn sample: one list per turn of calls {"name", "arguments"}."""
        return self._look_up("gold_calls", identity)

    def check_calls(self, identity: str, category: str, calls: Sequence[Mapping[str, Any]]) -> Verdict:
        """Return the official verdict on the calls of a single-turn sample, each given as {name: {argument: value}}."""
        if problem := _find_json_problem(calls):
            return Verdict(False, "checker_error: ValueError", problem)
        self._end_session()
        ask = partial(self._ask_about_sample, category, "check_calls", identity, category, calls)
        return Verdict(*retry_if_ended(ask))

    def documents(self) -> dict[str, list[dict[str, Any]]]:
        """Return the function documents of each backend (a simulated API), by its class name."""
        return self._look_up("documents")

    def replay(
        self, backends: Sequence[str], config: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Execute calls on new backends: `results`, a triple (text, failed, changed) per call, and the final `state`.

        The state contains what BFCL compares. Nothing of it stays in the process.
        """
        self._end_session()
        sendable = list(map(_to_sendable, calls))
        ask = partial(self._ask, "replay", (backends, config, sendable), WALL_SECONDS_PER_CPU_SECOND * self._seconds)
        return retry_if_ended(ask)

    def session(self, identity: str) -> Session:
        """Start a conversation with fresh backends (BFCL's simulated APIs). This ends the previous session."""
        self._end_session()
        self._session = Session(partial(self._ask_about_sample, identity.rpartition("_")[0]), identity)
        return self._session

    def close(self) -> None:
        self._stop_process(patience=1.0)

    def _look_up(self, method: str, *arguments: Any) -> Any:
        return retry_if_ended(partial(self._ask, method, arguments, LOADING_SECONDS))

    def _ask_about_sample(self, category: str, method: str, *arguments: Any) -> Any:
        # load the category first, so that reading files does not count against the sample's time limit
        if self._process is None or category not in self._loaded:
            self._look_up("load", category)
            self._loaded.add(category)
        return self._ask(method, arguments, WALL_SECONDS_PER_CPU_SECOND * self._seconds)

    def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _ask(self, method: str, arguments: Sequence[Any], seconds: float) -> Any:
        # any failure stops the process: its state is unknown, and the next request starts a new one
        if self._process is None:
            self._process = self._start()
        try:
            answer = _exchange(self._process, {"method": method, "arguments": arguments}, seconds)
        except BaseException:
            # Including KeyboardInterrupt: the next request would read the answer that is still in the pipe.
            self._stop_process(patience=0.0)
            raise
        if "invalid" in answer:
            raise ValueError(answer["invalid"])
        if "ok" in answer:
            return answer["ok"]
        self._stop_process(patience=0.0)
        limits = f"limits: {self._seconds:g} s, {self._memory_mb} MB"
        why = f"{answer['died']} ({limits})" if "died" in answer else answer.get("failed")
        is_limit = bool(answer.get("limit"))
        raise SandboxError(f"the process that works with {self._package.pin} failed: {why}", is_limit=is_limit)

    def _stop_process(self, patience: float) -> None:
        process, self._process = self._process, None
        if self._session is not None and self._session.is_open:
            self._session.is_over, self._session = True, None
        if process is not None:
            _end_process(process, patience)

    def _start(self) -> subprocess.Popen[bytes]:
        # Importing bfcl_eval creates folders under BFCL_PROJECT_ROOT; a temporary folder keeps them out of the way.
        self._loaded.clear()
        limits = [str(math.ceil(self._seconds)), str(self._memory_mb)]
        options = ["-s", "-B", "-X", "utf8", "-c", CHILD_SCRIPT]
        arguments = [str(PACKAGE_ROOT), self._package.version, str(self._package.folder.resolve()), *limits]
        with tempfile.TemporaryDirectory(prefix="rest-rl-") as folder:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, *options, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self._package.folder,
                env={**FIXED_ENVIRONMENT, "BFCL_PROJECT_ROOT": folder, "HOME": folder, "PATH": os.defpath},
                start_new_session=True,
                bufsize=0,
            )
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)  # or a write would hang together with the process
            try:
                answer = _exchange(process, None, LOADING_SECONDS)
            except BaseException:
                _end_process(process, patience=0.0)
                raise
        if "ok" not in answer:
            _end_process(process, patience=0.0)
            command = install_command(self._package.version, share_folder(self._package.version))
            raise UserError(
                f"cannot load {self._package.pin} from {self._package.folder} ({answer.get('failed')})",
                remedy=f"run pip install mpmath, which it needs, or reinstall it: {command}",
            )
        return process


class Session(contextlib.AbstractContextManager["Session"]):
    """Executes the calls of one conversation on backends that no other session uses; created by `Sandbox.session`."""

    def __init__(self, ask: Callable[..., Any], identity: str) -> None:
        self._ask, self._sample = ask, (identity, identity.rpartition("_")[0])
        self.is_open = self.is_over = False
        """Whether the backends exist (created by the first `execute`); whether they or their process have ended."""

    def __exit__(self, *raised: object) -> None:
        self.close()

    def execute(self, calls: Sequence[Mapping[str, Any]]) -> list[str]:
        """Execute calls {"name", "arguments"} and return one text per call: its result, or BFCL's error message."""
        if not self.is_open:
            self._ask("open", *self._sample)
            self.is_open = True
        if self.is_over:
            raise SandboxError("this conversation has ended")
        return self._ask("execute", self._sample[0], list(map(_to_sendable, calls)))

    def check(self, turns: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> Verdict:
        """Return the official verdict and end the session; `turns` contains the calls, nested by turn and step."""
        # The checker replays all calls on its own backends, so the session's process need not be alive any more.
        sendable = [[list(map(_to_sendable, step)) for step in turn] for turn in turns]
        if self.is_open and not self.is_over:
            with contextlib.suppress(SandboxError):
                verdict = Verdict(*self._ask("check_turns", *self._sample, sendable))
                self.close()
                return verdict
        return Verdict(*retry_if_ended(partial(self._ask, "check_turns", *self._sample, sendable)))

    def close(self) -> None:
        if self.is_open and not self.is_over:
            self.is_over = True
            with contextlib.suppress(SandboxError):  # either way the backends are gone
                self._ask("end")


def retry_if_ended(ask: Callable[[], Any]) -> Any:
    """Return `ask()`. If the process dies without exceeding a limit (e.g. killed from outside), try again."""
    for _ in range(MAX_TRIES - 1):
        try:
            return ask()
        except SandboxError as error:  # noqa: PERF203 - starting a process dominates
            if error.is_limit:
                raise
    return ask()


# One loop writes and reads: a large request and a large answer could otherwise fill both pipes and block both sides.
# The deadline covers the whole exchange.
def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    rest = memoryview(b"" if request is None else json.dumps(request, default=dict).encode() + b"\n")
    answer, deadline = bytearray(), monotonic() + seconds
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        if rest:
            waiting.register(process.stdin, selectors.EVENT_WRITE)
        try:
            while not answer.endswith(b"\n"):
                ready = waiting.select(max(0.0, deadline - monotonic()))
                if not ready:
                    raise SandboxError(FAILURE_MESSAGE.format(f"no answer within {seconds:g} s"), is_limit=True)
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        rest = rest[process.stdin.write(rest) or 0 :]
                        if not rest:
                            waiting.unregister(process.stdin)
                    elif piece := os.read(key.fd, 1 << 20):
                        answer += piece
                    else:
                        raise EOFError
            return json.loads(answer)
        except (OSError, ValueError, EOFError) as error:
            raise SandboxError(FAILURE_MESSAGE.format("it ended without an answer")) from error


def _end_process(process: subprocess.Popen[bytes], patience: float) -> None:
    # closing the pipes ends a healthy process; after `patience` seconds it is killed together with its forks
    if patience <= 0:
        _signal_group(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(patience or None)
    except subprocess.TimeoutExpired:
        _signal_group(process)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes]) -> None:
    # the process has not been waited for, so its id cannot belong to another one; its group contains the forks
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _to_sendable(call: Mapping[str, Any]) -> dict[str, Any]:
    problem = _find_json_problem(call)
    return {"refused": problem} if problem else dict(call)


def _find_json_problem(value: Any) -> str:
    # Returns why a value cannot be sent as JSON, or an empty text. Iterative, because deep nesting is one reason.
    # The model sees these messages: changing one changes what models respond.
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, (Mapping, list, tuple)):
            if depth > MAX_DEPTH:
                return f"nesting deeper than {MAX_DEPTH} levels"
            if isinstance(item, Mapping):
                if not all(isinstance(key, str) for key in item):
                    return "a key is not a string"
                item = item.values()
            waiting.extend((each, depth + 1) for each in item)
        elif isinstance(item, int) and item.bit_length() > MAX_INTEGER_BITS:
            return "an integer is too long"
        elif item is not None and not isinstance(item, (bool, int, float, str)):
            return f"a {type(item).__name__} is no JSON value"
    return ""

"""The server process that loads bfcl_eval, its only third-party import, and answers requests as JSON lines."""

# Three kinds of processes, because loading the release takes seconds and model output is not trusted:
#
# * This process loads the release once and never touches model output; it answers look-ups. Forks inherit the loaded
#   release for free.
# * One fork per conversation executes its calls, since the backends' state must not leak into other samples. The fork
#   uses the same pipes while this process waits for its end. That works because neither side reads ahead: the client
#   sends a request only after the answer to the previous one.
# * One long-lived fork, the worker, checks single-turn calls and replays those of environments, each time on new
#   backends. Nothing outlives a request, and a fork per request would dominate the time. It is replaced after
#   CHECKS_PER_WORKER requests, and at once after one that failed, in case it left something in a broken state.
#
# All forks are confined (see walls.py) before they read model output.

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rest_rl.envs.bfcl_sandbox.release import MAX_MESSAGE_LENGTH, BfclRelease, InvalidRequestError
from rest_rl.envs.bfcl_sandbox.walls import confine, describe_exit, enter_empty_network

LOOKUPS = ("constants", "documents", "entries", "load", "gold_calls")
FORKED_REQUESTS = ("open", "check_calls", "check_turns", "replay")
CHECKS_PER_WORKER = 500
"""The number of checks after which the worker is replaced."""


class Pipes:
    """One end of a two-way connection that carries one JSON object per line."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox

    @classmethod
    def standard(cls) -> Pipes:
        # redirect the original stdin and stdout to /dev/null: a print of bfcl_eval must not corrupt the protocol
        pipes, null = cls(os.dup(0), os.dup(1)), os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        return pipes

    def read(self) -> dict[str, Any] | None:
        pieces = []
        while piece := os.read(self.inbox, 1 << 20):
            pieces.append(piece)
            if piece.endswith(b"\n"):
                return json.loads(b"".join(pieces))
        return None

    def write(self, answer: Mapping[str, Any]) -> None:
        rest = memoryview(json.dumps(answer).encode() + b"\n")
        while rest:
            rest = rest[os.write(self.outbox, rest) :]

    def close(self) -> None:
        os.close(self.inbox)
        os.close(self.outbox)


def capture_result(handle: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"ok": handle()}
    except InvalidRequestError as error:
        return {"invalid": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:MAX_MESSAGE_LENGTH]}


class Server:
    """Answers requests: look-ups in this process, and requests that contain model output in confined forks."""

    def __init__(self, pipes: Pipes, bfcl: BfclRelease, seconds: int, memory_mb: int) -> None:
        self.pipes, self.bfcl, self.seconds, self.memory_mb = pipes, bfcl, seconds, memory_mb
        self.worker: tuple[int, Pipes] | None = None
        """Process id and connection of the worker."""

    def run(self) -> None:
        while (request := self.pipes.read()) is not None:
            if request["method"] not in FORKED_REQUESTS:
                self.pipes.write(self.dispatch(request, LOOKUPS))
            elif request["method"] == "replay":  # needs no sample
                self.pipes.write(self.check_in_worker(request))
            elif "ok" not in (result := capture_result(partial(self.bfcl.prepare, *request["arguments"]))):
                self.pipes.write(result)
            elif request["method"] == "check_calls":
                self.pipes.write(self.check_in_worker(request))
            else:
                self.serve_in_fork(request)

    def dispatch(self, request: dict[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
        if request["method"] not in allowed:
            return {"invalid": f"unknown method {request['method']!r}, expected one of {', '.join(allowed)}"}
        return capture_result(partial(getattr(self.bfcl, request["method"]), *request["arguments"]))

    def fork(self, seconds: int, serve: Callable[[], None]) -> int:
        # runs `serve` in a confined child process; returns its id
        process = os.fork()
        if process == 0:
            status = 1
            try:
                confine(seconds, self.memory_mb)
                serve()
                status = 0
            finally:
                os._exit(status)  # skip the parent's exit handlers
        return process

    def serve_in_fork(self, request: dict[str, Any]) -> None:
        # the fork answers on our pipes; if it dies, the client still waits for an answer, which we send
        serve = self.serve_conversation if request["method"] == "open" else self.check_turns
        _, status = os.waitpid(self.fork(self.seconds, partial(serve, request)), 0)
        if status:
            self.pipes.write(describe_death(status))

    def check_turns(self, request: dict[str, Any]) -> None:
        self.pipes.write(self.dispatch(request, FORKED_REQUESTS))

    def serve_conversation(self, _: dict[str, Any]) -> None:
        # in the fork: executes the calls of one conversation and finally judges it
        self.pipes.write({"ok": None})
        while (step := self.pipes.read()) is not None and step["method"] != "end":
            self.pipes.write(self.dispatch(step, ("execute", "check_turns", *LOOKUPS)))
        self.pipes.write({"ok": None})

    def check_in_worker(self, request: dict[str, Any]) -> dict[str, Any]:
        # after an answer marked `is_last`, or without any answer, the worker is gone; the next check starts a new one
        process, pipes = self.worker = self.worker or self.start_worker()
        try:
            pipes.write(request)
            result = pipes.read()
        except (OSError, ValueError):  # the worker died before reading the request or while answering
            result = None
        if result is not None and not result.pop("is_last"):
            return result
        pipes.close()
        self.worker = None
        _, status = os.waitpid(process, 0)
        return describe_death(status) if result is None else result

    def start_worker(self) -> tuple[int, Pipes]:
        to_worker, from_worker = os.pipe(), os.pipe()
        ours, theirs = Pipes(from_worker[0], to_worker[1]), Pipes(to_worker[0], from_worker[1])

        def serve() -> None:
            ours.close()
            self.pipes.close()
            self.serve_checks(theirs)

        process = self.fork(CHECKS_PER_WORKER * self.seconds, serve)
        theirs.close()
        return process, ours

    def serve_checks(self, pipes: Pipes) -> None:
        # In the worker. The process-wide CPU limit covers all its checks, so an interval timer limits each single one.
        is_last = False
        for left in reversed(range(CHECKS_PER_WORKER)):
            if is_last or (request := pipes.read()) is None:
                return
            signal.setitimer(signal.ITIMER_PROF, self.seconds)  # SIGPROF kills the process
            result = self.dispatch(request, FORKED_REQUESTS)
            signal.setitimer(signal.ITIMER_PROF, 0)
            is_last = not left or "ok" not in result
            if request["method"] == "check_calls" and not is_last:
                is_last = result["ok"][1].startswith("checker_error")
            pipes.write({**result, "is_last": is_last})


def describe_death(status: int) -> dict[str, Any]:
    # the answer on behalf of a fork that died
    why, is_limit = describe_exit(status)
    return {"died": why, "limit": is_limit}


def main() -> None:
    """Load the bfcl-eval release, report whether that succeeded, and serve requests until the input ends."""
    version, folder, seconds, memory_mb = sys.argv[1:]
    sys.path.insert(0, folder)
    pipes = Pipes.standard()
    started = capture_result(lambda: BfclRelease(version))
    if "ok" not in started:
        pipes.write(started)
        return
    has_own_network = enter_empty_network()
    pipes.write({"ok": {"own_network": has_own_network}})
    Server(pipes, started["ok"], int(seconds), int(memory_mb)).run()

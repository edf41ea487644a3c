"""The process that holds bfcl_eval: JSON lines in and out, no third-party library but what bfcl_eval takes.

Everything a model has written is handled in a fork of it: a namespace, and limits, for one sample alone. The fork
answers on the same pipes while this process waits, which needs no more care than never to read ahead: a request is
sent only when the last one has been answered.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rest_rl.evaluate.benchmarks.bfcl.release import MAX_MESSAGE, Bfcl, UnusableError
from rest_rl.evaluate.benchmarks.bfcl.walls import cause, confine, leave_the_network

LOOK_UPS = ("constants", "entries", "load", "gold_calls")
APART = ("open", "check_calls", "check_turns")


class Pipes:
    """The protocol's two ends, out of reach of whatever is printed."""

    def __init__(self) -> None:
        self.inbox, self.outbox = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)

    def read(self) -> dict[str, Any] | None:
        """The next request, None at the end."""
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


def answer(handle: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"ok": handle()}
    except UnusableError as error:
        return {"invalid": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:MAX_MESSAGE]}


class Server:
    """Answers requests: what concerns only the release here, what concerns the text of a model in a fork."""

    def __init__(self, pipes: Pipes, bfcl: Bfcl, seconds: int, memory_mb: int) -> None:
        self.pipes, self.bfcl, self.seconds, self.memory_mb = pipes, bfcl, seconds, memory_mb

    def run(self) -> None:
        while (request := self.pipes.read()) is not None:
            if request["do"] not in APART:
                self.pipes.write(self.answer(request, LOOK_UPS))
            elif "ok" in (found := answer(partial(self.bfcl.prepare, *request["of"]))):
                self.fork(request)
            else:
                self.pipes.write(found)

    def answer(self, request: dict[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
        """What a method of the release gives."""
        if request["do"] not in allowed:
            return {"invalid": f"got {request['do']!r}, expected one of {', '.join(allowed)}"}
        return answer(partial(getattr(self.bfcl, request["do"]), *request["of"]))

    def fork(self, request: dict[str, Any]) -> None:
        """Have the request answered apart, and say so where that comes to no end of its own."""
        process = os.fork()
        if process == 0:
            status = 1
            try:
                confine(self.seconds, self.memory_mb)
                self.serve_apart(request)
                status = 0
            finally:
                os._exit(status)  # no clean-up of the parent's
        _, status = os.waitpid(process, 0)
        if status:
            why, is_limit = cause(status)
            self.pipes.write({"died": why, "limit": is_limit})

    def serve_apart(self, request: dict[str, Any]) -> None:
        """In the fork: one check, or a conversation until its end."""
        if request["do"] != "open":
            self.pipes.write(self.answer(request, APART))
            return
        self.pipes.write({"ok": None})
        while (step := self.pipes.read()) is not None and step["do"] != "end":
            self.pipes.write(self.answer(step, ("execute", *LOOK_UPS)))
        self.pipes.write({"ok": None})


def main() -> None:
    """Load the release in the given folder, say how that went, and serve."""
    version, folder, seconds, memory_mb = sys.argv[1:]
    sys.path.insert(0, folder)
    pipes = Pipes()
    started = answer(lambda: Bfcl(version))
    if "ok" not in started:
        pipes.write(started)
        return
    apart = leave_the_network()
    pipes.write({"ok": {"own_network": apart}})
    Server(pipes, started["ok"], int(seconds), int(memory_mb)).run()

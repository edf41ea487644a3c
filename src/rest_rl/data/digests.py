"""A set of 8-byte digests in one flat array: a million of them take 32 MB, not the 100 MB of a Python set."""

from __future__ import annotations

import hashlib
import json
from array import array
from typing import Any

from rest_rl.data.samples import ToolSample


class DigestSet:
    """Digests that were added; two different texts share one with probability n^2 / 2^65 (3e-8 for a million)."""

    def __init__(self) -> None:
        """Empty."""
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: int) -> bool:
        return self._slots[self._slot(digest)] == digest

    def add(self, digest: int) -> bool:
        """Whether it is new."""
        slot = self._slot(digest)
        if self._slots[slot] == digest:
            return False
        self._slots[slot] = digest
        self._count += 1
        if 2 * self._count > len(self._slots):
            self._grow()
        return True

    def _slot(self, digest: int) -> int:
        """Its place, or the free one where it belongs (0 marks a free place; `digest_of` never gives 0)."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = digest & mask
        while (there := slots[slot]) and there != digest:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for digest in old:
            if digest:
                self._slots[self._slot(digest)] = digest


def digest_of(value: Any) -> int:
    """64 bits of a JSON value, never 0; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") or 1


def prompt_digest(sample: ToolSample) -> int:
    """Digest of messages and tools."""
    return digest_of([sample.messages, sample.tools])


def gold_digest(sample: ToolSample) -> int:
    """Digest of the gold."""
    return digest_of([[(call.name, call.arguments) for call in sample.gold.calls], sample.gold.answer])


def leak_digest(sample: ToolSample) -> int:
    """Digest of what a prompt asks, for finding it in another file.

    Roles, texts without their white space, calls, and the names of the tools; not the system text, the ids and the
    layout of the schemas, which another copy of the same data set may write in another way.
    """
    said = [
        [message["role"], "".join(str(message.get("content") or "").split()), _called(message)]
        for message in sample.messages
        if message["role"] != "system"
    ]
    return digest_of([said, sorted(str(tool.get("function", tool).get("name")) for tool in sample.tools)])


def _called(message: dict[str, Any]) -> list[Any]:
    return [call.get("function", call) for call in message.get("tool_calls") or ()]

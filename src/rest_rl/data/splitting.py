"""Train and test from one file: the samples of one dialogue, and equal prompts, stay on one side.

Two readings: the first puts every sample into a group, the second writes. Groups go to the test side in the order of
their salted digests until the share is reached, so the same seed gives the same split whatever the order of the rows.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable

from rest_rl.data.digests import digest_of
from rest_rl.data.samples import ToolSample


class Split:
    """Which side each sample belongs to."""

    def __init__(self, groups: Iterable[ToolSample], share: float, seed: int) -> None:
        """Read all samples once; ValueError for a share that leaves a side without any."""
        if not 0 < share < 1:
            raise ValueError(f"got --test {share}, expected a share between 0 and 1, such as 0.1")
        self._joined: dict[int, int] = {}
        self._of_dialogue: dict[int, int] = {}
        opening = array("Q", (self._opened(sample) for sample in groups))
        self._salt: Callable[[int], int] = lambda group: _salted(group, seed)
        sizes = Counter(self._root(group) for group in opening)
        self._test = _first_groups(sizes, self._salt, share * len(opening))
        if len(opening) < 2 or not self._test or len(self._test) == len(sizes):
            raise ValueError(
                f"got {len(sizes)} groups of samples that belong together, expected enough for two sides; "
                "take a larger file"
            )

    def is_test(self, sample: ToolSample) -> bool:
        """Whether the sample belongs to the test side."""
        return self._root(opening_of(sample)) in self._test

    def _opened(self, sample: ToolSample) -> int:
        """The sample's group; a dialogue of several openings joins them."""
        group = opening_of(sample)
        dialogue, slash, _ = sample.id.rpartition("/")
        if slash:
            other = self._of_dialogue.setdefault(digest_of(dialogue), group)
            if other != group and self._root(other) != self._root(group):
                self._joined[self._root(group)] = self._root(other)
        return group

    def _root(self, group: int) -> int:
        while (parent := self._joined.get(group)) is not None:
            group = parent
        return group


def opening_of(sample: ToolSample) -> int:
    """Digest of how the dialogue begins: its first user message, which all its turns and all equal prompts share."""
    texts = [str(m.get("content")) for m in sample.messages if m["role"] == "user"] or [
        str(m.get("content")) for m in sample.messages
    ]
    first = texts[0] if texts else ""
    return digest_of((first.partition("</user>")[0] if sample.tools_in_prompt else first).strip())


def _salted(group: int, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {group}".encode(), digest_size=8).digest(), "big")


def _first_groups(sizes: Counter[int], salt: Callable[[int], int], wanted: float) -> set[int]:
    """Groups in salted order while they bring the count nearer to what is wanted; at least one."""
    chosen: set[int] = set()
    count = 0
    for group in sorted(sizes, key=salt):
        if chosen and abs(count + sizes[group] - wanted) > abs(count - wanted):
            break
        chosen.add(group)
        count += sizes[group]
    return chosen

"""Split one file into train and test; samples of one dialogue, or with equal prompts, go to the same side.

The file is read twice: the first pass assigns every sample to a group, the second writes the samples. Groups go to the
test side in the order of their hashes, which depend on the seed, until that side has the requested share. Therefore the
same seed gives the same split, whatever the order of the rows.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable

from rest_rl.data.check import CheckedRow
from rest_rl.data.samples import ToolSample, compute_digest
from rest_rl.errors import UserError


class Split:
    """Assigns each sample to the train or the test side; the constructor reads all rows once.

    Raises:
        UserError: The share would leave one side empty.
    """

    # Groups are the connected components of a graph: the nodes are first user messages, and a dialogue in which the
    # assistant speaks first connects its start with the question that follows. `_joined` is a union-find forest without
    # ranks, whose chains stay short. Memory: 8 bytes per sample, and an entry only for dialogues that were joined.

    def __init__(self, rows: Iterable[CheckedRow], share: float, seed: int) -> None:
        if not 0 < share < 1:
            raise UserError(f"--test is {share}", "a fraction between 0 and 1, such as 0.1")
        self._joined: dict[int, int] = {}
        opening = array("Q", (self._join_opening(row, sample) for row in rows for sample in row.samples))
        sizes = Counter(self._root(group) for group in opening)
        self._test = _first_groups(sizes, seed, share * len(opening))
        if len(opening) < 2 or not self._test or len(self._test) == len(sizes):
            questions = "1 distinct first question" if len(sizes) == 1 else f"{len(sizes)} distinct first questions"
            problem = f"the dialogues have only {questions}, too few for --test {share}"
            remedy = "use a file with more dialogues" + (" or another --test" if len(sizes) > 1 else "")
            raise UserError(problem, remedy=remedy)

    def is_test(self, row: CheckedRow, sample: ToolSample) -> bool:
        """Return whether a sample of a row belongs to the test side."""
        question, start = _opening_of(row, sample)
        return self._root(start if question is None else question) in self._test

    def _join_opening(self, row: CheckedRow, sample: ToolSample) -> int:
        question, start = _opening_of(row, sample)
        if question is None:
            return start
        if start and self._root(start) != self._root(question):
            self._joined[self._root(start)] = self._root(question)
        return question

    def _root(self, group: int) -> int:
        while (parent := self._joined.get(group)) is not None:
            group = parent
        return group


def _opening_of(row: CheckedRow, sample: ToolSample) -> tuple[int | None, int]:
    # (digest of the first user message or None, digest of the dialogue's start). All turns of a dialogue and all equal
    # prompts share the first user message. If the assistant speaks first, the turns before that message are identified
    # by their dialogue: by the row, or in a file of samples by the id up to its last `/` and the messages before the
    # first assistant turn. The second digest covers this identity; it is 0 if the user speaks first.
    roles = [message["role"] for message in sample.messages]
    asked = roles.index("user") if "user" in roles else None
    spoke = roles.index("assistant") if "assistant" in roles else len(roles)
    start = 0
    if asked is None or spoke < asked:
        name = sample.id.rpartition("/")[0] or sample.id if row.source == "samples" else [row.file, row.number]
        start = compute_digest([name, sample.messages[:spoke]])
    if asked is None:
        return None, start
    question = str(sample.messages[asked].get("content"))
    question = question.partition("</user>")[0] if sample.tools_in_prompt else question
    return compute_digest(question.strip()), start


def _first_groups(sizes: Counter[int], seed: int, wanted: float) -> set[int]:
    # Takes groups in salted order while each brings the count closer to the wanted one; at least one group.

    def salted(group: int) -> bytes:
        return hashlib.blake2b(f"{seed} {group}".encode(), digest_size=8).digest()

    chosen: set[int] = set()
    count = 0
    for group in sorted(sizes, key=salted):
        if chosen and abs(count + sizes[group] - wanted) > abs(count - wanted):
            break
        chosen.add(group)
        count += sizes[group]
    return chosen

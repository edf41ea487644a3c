"""The elements of a JSON array (or of objects one after the other), read piece by piece.

`json.load` would hold the whole file and lose it all to one broken element. Here an element that is no JSON is passed
over: the next one is looked for where an object ends and another with the same first key begins.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

CHUNK = 2**18
_BETWEEN = re.compile(r"[\s,]*")
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:')


class JsonArray:
    """Texts of the elements in order; a broken one comes as the text up to where the next begins.

    `max_chars` bounds an element: of a longer one only the beginning is kept and the rest is passed over.
    """

    def __init__(self, file: IO[bytes], max_chars: int) -> None:
        """Bind an open file of UTF-8 (bytes that are not come out as lone surrogates)."""
        self._file, self._max_chars = file, max_chars
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._scan = json.JSONDecoder(strict=True).raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._next: re.Pattern[str] | None = None

    def __iter__(self) -> Iterator[str]:
        """One text per element."""
        opened = self._skip_space() and self._text[self._at] == "["
        self._at += opened
        while self._skip_space() and not (opened and self._text[self._at] == "]"):
            yield self._element()

    def _skip_space(self) -> bool:
        """Go to the next character that belongs to an element; False at the end of the file."""
        while True:
            match = _BETWEEN.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return True
            if not self._more():
                return False

    def _more(self) -> bool:
        """Read on; False at the end of the file. What was given out is dropped."""
        if self._ended:
            return False
        size = max(CHUNK, len(self._text) - self._at)  # doubling keeps a long element from being read too often
        data = self._file.read(size)
        self._ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0
        return True

    def _element(self) -> str:
        while True:
            try:
                _, end = self._scan(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._may_go_on(error) and self._more():
                    continue
                return self._broken()
            if end == len(self._text) and self._more():  # a number may go on
                continue
            return self._taken(end)

    def _may_go_on(self, error: Exception) -> bool:
        """Whether the element may merely be incomplete so far."""
        if not isinstance(error, json.JSONDecodeError) or len(self._text) - self._at > self._max_chars:
            return False
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16

    def _taken(self, end: int) -> str:
        element = self._text[self._at : end]
        if self._next is None and (key := _FIRST_KEY.match(element)):
            self._next = re.compile(r"\}\s*,?\s*(?=\{\s*" + re.escape(key[1]) + r"\s*:)")
        self._at = end
        return element

    def _broken(self) -> str:
        """Everything up to the next element that begins as the others do; at most `max_chars` of it."""
        if self._next is None and (key := _FIRST_KEY.match(self._text, self._at)):
            self._next = re.compile(r"\}\s*,?\s*(?=\{\s*" + re.escape(key[1]) + r"\s*:)")
        start, kept = self._at + 1, ""
        while True:
            found = self._next.search(self._text, start) if self._next else None
            if found:
                kept += self._text[self._at : found.start() + 1]
                self._at = found.end()
                break
            if len(self._text) - self._at > self._max_chars:
                kept, self._at = kept + self._text[self._at : -1000], len(self._text) - 1000
                kept = kept[: self._max_chars + 1]
            start = max(self._at + 1, len(self._text) - 1000)
            offset = start - self._at
            if not self._more():
                kept, self._at = kept + self._text[self._at :], len(self._text)
                break
            start = self._at + offset
        return kept[: self._max_chars + 1]

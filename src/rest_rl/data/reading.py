"""Numbered raw rows of a data file, streamed: JSONL, JSON, Parquet, a folder of them, a dataset of the hub.

A row that cannot be read is a `RowError` with its number; what stands after it is read all the same wherever the file
says where that begins. At most one row (up to `MAX_ROW_BYTES`) or one batch is held in memory.
"""

from __future__ import annotations

import ast
import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from rest_rl.errors import UserError
from rest_rl.json_spans import MAX_DEPTH, decode_at
from rest_rl.jsonl import reason

_BETWEEN = re.compile(r"[\s;,]*")


def load_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """`json.loads`; ValueError also for what is nested deeper than a response may be (and than recursion bears)."""
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def read_literal(text: str) -> Any:
    """JSON, or else a Python literal (never executed); None for neither."""
    try:
        return load_json(text)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    try:
        return load_json(json.dumps(value))  # tuples become lists, and sets, bytes and the like are no JSON
    except (ValueError, TypeError, RecursionError):
        return None


def read_literals(text: str) -> list[Any] | None:
    """All values of a text: one literal, JSON values in a row, or a literal per line; None for anything else."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    if (value := read_literal(text)) is not None:
        return [value]
    values: list[Any] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        value, at = decode_at(text, _end_of(_BETWEEN, text, at))
        if at < 0:
            break
        values.append(value)
    if at >= end:
        return values
    values = []
    for line in filter(str.strip, text.split("\n")):
        if (value := read_literal(line)) is None:
            return None
        values.append(value)
    return values


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


CHUNK = 2**18
_BETWEEN_ROWS = re.compile(r"[\s,]*")
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
            match = _BETWEEN_ROWS.match(self._text, self._at)
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


MAX_ROW_BYTES = 8 * 2**20
"""A longer row is no training sample: 8 MiB are about two million tokens."""
BATCH_ROWS = 256
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_UTF8_BOM = codecs.BOM_UTF8
_WIDE_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


class RowError(NamedTuple):
    """Why a row cannot be read: a key of `rest_rl.data.reasons.REASONS` and what was got; `raw` is its beginning."""

    reason: str
    detail: str
    raw: str = ""


class Row(NamedTuple):
    """A row by its file and its number there, counted from 1."""

    file: str
    number: int
    value: Mapping[str, Any] | RowError
    is_columnar: bool = False
    """Read from Arrow, which gives every object the keys of all others, with nulls."""


class RowReader:
    """The rows of inputs; `read_bytes` of `total_bytes` tell how far it is (both 0 where nobody knows)."""

    def __init__(self, *paths: str) -> None:
        """ValueError if there is no such input; reading starts with the iteration."""
        self.inputs = [_Input.find(path) for path in paths]
        self.total_bytes = sum(file.stat().st_size for each in self.inputs for file in each.files)
        self._done_bytes = 0
        self._file: IO[bytes] | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of the inputs that have been read."""
        if self._file is None or self._file.closed:
            return self._done_bytes
        return self._done_bytes + self._file.tell()

    def __iter__(self) -> Iterator[Row]:
        """Every row once, in order."""
        self._done_bytes = 0
        for each in self.inputs:
            for file in each.files:
                for number, (value, is_columnar) in enumerate(self._values(file), 1):
                    yield Row(str(file), number, value, is_columnar)
                self._done_bytes += file.stat().st_size
                self._file = None
            if not each.files:
                for number, value in enumerate(_dataset_rows(each.name, each.split), 1):
                    yield Row(each.name, number, value, is_columnar=True)

    def _values(self, path: Path) -> Iterator[tuple[Mapping[str, Any] | RowError, bool]]:
        try:
            with path.open("rb") as file:
                self._file = file
                if _suffix(path) == ".parquet":
                    yield from ((value, True) for value in _parquet_rows(file))
                else:
                    yield from ((value, False) for value in _text_rows(file, path))
        except OSError as error:
            raise UserError(f"{path} ({reason(error)})", "a readable data file", "check the path") from error


class _Input(NamedTuple):
    """A path or hub id, the split of it, and its data files; none for what `datasets` reads."""

    name: str
    split: str
    files: list[Path]

    @classmethod
    def find(cls, path: str) -> _Input:
        """`name:split` names a split unless such a file exists."""
        name, split = _located(path)
        return cls(name, split or "train", _files(Path(name), split) if Path(name).exists() else [])


def _located(path: str) -> tuple[str, str]:
    if Path(path).exists():
        return path, ""
    name, _, split = path.partition(":")
    if Path(name).is_dir() or (_HUB.fullmatch(name) and Path(name).suffix not in (*SUFFIXES, ".gz")):
        return name, split
    raise UserError(
        f"{path}, which does not exist",
        f"a file ({', '.join(SUFFIXES)}, .gz), a folder, or a dataset of the hub as OWNER/NAME or OWNER/NAME:SPLIT",
        "check the path",
    )


def _files(path: Path, split: str) -> list[Path]:
    """The data files of a path; none for a folder that `datasets` has saved."""
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise UserError(
                f"{path}, whose ending says nothing", f"one of {', '.join(SUFFIXES)} (or with .gz)", "rename it"
            )
        return [path]
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
    if split:
        word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])")
        files = [file for file in files if word.search(file.relative_to(path).as_posix())]
    if not files:
        named = f" that name the split {split}" if split else ""
        raise ValueError(f"got {path}, a folder without {', '.join(SUFFIXES)} files{named}; name the one that has them")
    return files


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _text_rows(file: IO[bytes], path: Path) -> Iterator[Mapping[str, Any] | RowError]:
    text: IO[bytes] = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[assignment]
    try:
        head = text.read(4)
        text.seek(0)
        wide = next((name for bom, name in _WIDE_BOMS.items() if head.startswith(bom)), None)
        if wide:
            yield from _wide_rows(text, wide)
            return
        text.seek(len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0)
        if _suffix(path) == ".json":
            for element in JsonArray(text, MAX_ROW_BYTES):
                yield _element(element)
        else:
            yield from _lines(text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield RowError("truncated", f"got a compressed file that breaks off or is damaged ({error})")


def _element(text: str) -> Mapping[str, Any] | RowError:
    if len(text) > MAX_ROW_BYTES:
        return RowError("row_too_long", f"got a row of over {MAX_ROW_BYTES / 2**20:.0f} MiB", text[:200])
    return decoded(text)


def _wide_rows(file: IO[bytes], encoding: str) -> Iterator[RowError]:
    """Each line of a UTF-16 or UTF-32 file is refused: nobody else who reads JSONL could read it."""
    for line in io.TextIOWrapper(file, encoding, errors="replace"):
        if line.strip():
            yield RowError("encoding", f"got {encoding.upper()}, expected UTF-8", line[:200])


def _lines(file: IO[bytes]) -> Iterator[Mapping[str, Any] | RowError]:
    """The non-blank lines; a line beyond the limit is passed over in pieces."""
    while line := file.readline(MAX_ROW_BYTES):
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            size = len(line)
            head = line[:200].decode(errors="replace")
            while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                size += len(rest)
            yield RowError("row_too_long", f"got a row of {(size + len(rest)) / 2**20:.1f} MiB", head)
        elif line.strip():
            yield decoded(line)


def decoded(text: bytes | str) -> Mapping[str, Any] | RowError:
    """One JSON object, or why it is none."""
    try:
        text = text.decode() if isinstance(text, bytes) else _without_stray_bytes(text)
        row = load_json(text, _refuse_constant)
    except UnicodeDecodeError as error:
        found = f"got byte 0x{error.object[error.start]:02x} at position {error.start}, which is not UTF-8"
        return RowError("encoding", found, error.object[:200].decode("latin-1"))
    except _ConstantError as error:
        return RowError("not_a_number", f"got {error}, which JSON does not have", str(text)[:200])
    except ValueError as error:
        return RowError("not_json", f"got text that is not JSON ({error})", str(text)[:200])
    if not isinstance(row, Mapping):
        return RowError("not_an_object", f"got {type(row).__name__}, expected an object", str(text)[:200])
    return row


def _without_stray_bytes(text: str) -> str:
    """The same text; UnicodeDecodeError if `surrogateescape` has kept bytes in it that are not UTF-8."""
    return text if text.isascii() else text.encode(errors="surrogateescape").decode()


class _ConstantError(ValueError):
    """NaN or an infinity, which Python's reader would accept."""


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


def _parquet_rows(file: IO[bytes]) -> Iterator[Mapping[str, Any] | RowError]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        yield RowError("truncated", f"got a Parquet file that cannot be read on ({' '.join(str(error).split())})")


def _dataset_rows(name: str, split: str) -> Iterator[Any]:
    """Rows through `datasets`: a folder that it saved, or a dataset of the hub as a stream."""
    import datasets

    expected = "expected a folder written by save_to_disk, or a dataset of the hub that can be reached"
    try:
        if Path(name).is_dir():
            saved: Any = datasets.load_from_disk(name)
            yield from saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            config, _, part = split.rpartition("/")
            yield from datasets.load_dataset(name, config or None, split=part, streaming=True)
    except Exception as error:  # the hub, its file systems and its readers raise whatever they like
        told = " ".join(str(error).split())[:300]
        remedy = "check the name, the split (NAME:SPLIT, NAME:CONFIG/SPLIT) and the network, or download the file"
        raise ValueError(
            f"got dataset {name}, split {split} ({type(error).__name__}: {told}), {expected}; {remedy}"
        ) from error

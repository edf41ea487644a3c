"""Numbered raw rows of a data file, streamed: JSONL, JSON, Parquet, a folder of them, a dataset of the hub.

A row that cannot be read is a `RowError` with its number; the lines after it are read all the same. At most one row (up
to `MAX_ROW_BYTES`) or one batch is held in memory.
"""

from __future__ import annotations

import ast
import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from rest_rl.errors import UserError
from rest_rl.json_spans import MAX_DEPTH, decode_at
from rest_rl.jsonl import describe_os_error

MAX_ROW_BYTES = 8 * 2**20
"""A longer row is no training sample: 8 MiB are about two million tokens."""
CHUNK_BYTES = 2**18
BATCH_ROWS = 256
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_BETWEEN_VALUES = re.compile(r"[\s;,]*")
_BETWEEN_ROWS = re.compile(r"[\s,]*")


class TooDeepError(ValueError):
    """JSON that is nested deeper than a response may be."""


def load_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """`json.loads`; TooDeepError for what is nested deeper than a response may be (and than recursion bears)."""
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise TooDeepError(f"nested deeper than {MAX_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise TooDeepError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
    return bool(level)


def read_literal(text: str) -> Any:
    """JSON, or else a Python literal (never executed); None for neither."""
    try:
        return load_json(text)
    except ValueError:
        pass
    try:  # by way of JSON: tuples become lists, and sets, bytes and the like are refused
        return load_json(json.dumps(ast.literal_eval(text.strip())))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def read_literals(text: str) -> list[Any] | None:
    """All values of a text: one literal, JSON values in a row, or a literal per line; None for anything else."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    if (value := read_literal(text)) is not None:
        return [value]
    values: list[Any] = []
    at, end = 0, len(text.rstrip())
    while 0 <= at < end:
        value, at = decode_at(text, _skip(_BETWEEN_VALUES, text, at))
        values.append(value)
    if at >= end:
        return values
    values = [read_literal(line) for line in text.split("\n") if line.strip()]
    return None if None in values else values


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


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
    """The rows of inputs; `read_bytes` of `total_bytes` tell how far it is (both 0 where nobody knows).

    Reading starts with the iteration. UserError if there is no such input.
    """

    def __init__(self, *paths: str) -> None:
        self.inputs = [_find_input(path) for path in paths]
        self.total_bytes = sum(file.stat().st_size for each in self.inputs for file in each.files)
        self._done_bytes = 0
        self._file: IO[bytes] | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of the inputs that have been read."""
        is_open = self._file is not None and not self._file.closed
        return self._done_bytes + (self._file.tell() if is_open and self._file else 0)

    def __iter__(self) -> Iterator[Row]:
        self._done_bytes = 0
        for each in self.inputs:
            for file in each.files:
                for number, value in enumerate(self._read_file(file), 1):
                    yield Row(str(file), number, value, _data_suffix(file) == ".parquet")
                self._done_bytes += file.stat().st_size
                self._file = None
            if not each.files:
                for number, value in enumerate(_read_dataset(each.name, each.split), 1):
                    yield Row(each.name, number, value, is_columnar=True)

    def _read_file(self, path: Path) -> Iterator[Mapping[str, Any] | RowError]:
        try:
            with path.open("rb") as file:
                self._file = file
                yield from _read_parquet(file) if _data_suffix(path) == ".parquet" else _read_text_rows(file, path)
        except OSError as error:
            raise UserError(f"{path} ({describe_os_error(error)})", "a readable data file", "check the path") from error


class _Input(NamedTuple):
    name: str
    split: str
    files: list[Path]


def _find_input(path: str) -> _Input:
    """`name:split` names a split unless such a file exists."""
    if Path(path).exists():
        return _Input(path, "train", _find_files(Path(path), ""))
    name, _, split = path.partition(":")
    if Path(name).is_dir():
        return _Input(name, split or "train", _find_files(Path(name), split))
    if _HUB.fullmatch(name) and Path(name).suffix not in (*SUFFIXES, ".gz"):
        return _Input(name, split or "train", [])
    raise UserError(
        f"{path}, which does not exist",
        f"a file ({', '.join(SUFFIXES)}, .gz), a folder, or a dataset of the hub as OWNER/NAME or OWNER/NAME:SPLIT",
        "check the path",
    )


def _find_files(path: Path, split: str) -> list[Path]:
    """The data files of a path; none for a folder that `datasets` has saved."""
    endings = ", ".join(SUFFIXES)
    if path.is_file():
        if _data_suffix(path) not in SUFFIXES:
            raise UserError(f"{path}, whose ending says nothing", f"one of {endings} (or with .gz)", "rename it")
        return [path]
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file() and _data_suffix(file) in SUFFIXES)
    if split:
        word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])")
        files = [file for file in files if word.search(file.relative_to(path).as_posix())]
    if not files:
        named = f" that name the split {split}" if split else ""
        raise UserError(f"{path}, a folder without {endings} files{named}", "some", "name the folder that has them")
    return files


def _data_suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _read_text_rows(file: IO[bytes], path: Path) -> Iterator[Mapping[str, Any] | RowError]:
    text: IO[bytes] = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[assignment]
    try:
        head = text.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):  # or UTF-32's other one
            yield RowError("encoding", "got a file in UTF-16 or UTF-32, expected UTF-8")
            return
        text.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield from _read_json_array(text) if _data_suffix(path) == ".json" else _read_jsonl(text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield RowError("truncated", f"got a compressed file that breaks off or is damaged ({error})")


def _read_jsonl(file: IO[bytes]) -> Iterator[Mapping[str, Any] | RowError]:
    """The non-blank lines; a line beyond the limit is passed over in pieces."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            head, size = line[:200].decode(errors="replace"), len(line)
            while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
                size += len(line)
            yield RowError("row_too_long", f"got a row of {size / 2**20:.1f} MiB", head)
        elif line.strip():
            yield _decode_row(line)


def _decode_row(text: bytes | str) -> Mapping[str, Any] | RowError:
    """One JSON object, or why it is none; bytes that are not UTF-8 may stand in a text as lone surrogates."""
    if len(text) > MAX_ROW_BYTES:
        return RowError("row_too_long", f"got a row of over {MAX_ROW_BYTES / 2**20:.0f} MiB", str(text[:200]))
    shown = text[:200].decode(errors="replace") if isinstance(text, bytes) else text[:200]
    try:
        if isinstance(text, bytes):
            text = text.decode()
        elif not text.isascii():
            text = text.encode(errors="surrogateescape").decode()
        row = load_json(text, _refuse_constant)
    except UnicodeDecodeError as error:
        found = f"got byte 0x{error.object[error.start]:02x} at position {error.start}, which is not UTF-8"
        return RowError("encoding", found, error.object[:200].decode("latin-1"))
    except _ConstantError as error:
        return RowError("not_a_number", f"got {error}, which JSON does not have", shown)
    except TooDeepError as error:
        return RowError("too_deep", f"got JSON {error}", shown)
    except ValueError as error:
        return RowError("not_json", f"got text that is not JSON ({error})", shown)
    if not isinstance(row, Mapping):
        return RowError("not_an_object", f"got {type(row).__name__}, expected an object", shown)
    return row


class _ConstantError(ValueError):
    """NaN or an infinity, which Python's reader would accept."""


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


def _read_json_array(file: IO[bytes]) -> Iterator[Mapping[str, Any] | RowError]:
    """The elements of an array, or objects one after the other; a broken or overlong one ends the file.

    The standard decoder tells where an element ends, and more is read as long as it may go on. (ijson would be no
    better: it takes all memory for a deeply nested element and turns lone surrogates into question marks.)
    """
    scan = json.JSONDecoder().raw_decode
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, at, is_ended, is_array = "", 0, False, None
    while True:
        at = _skip(_BETWEEN_ROWS, text, at)
        if at < len(text) and is_array is None:
            is_array = text[at] == "["
            at += is_array
            continue
        end, is_broken = at, False
        if at < len(text):
            if is_array and text[at] == "]":
                return
            try:
                end = scan(text, at)[1]
            except json.JSONDecodeError as error:
                is_broken = not (error.msg.startswith("Unterminated") or error.pos >= len(text) - 16)
            except (ValueError, RecursionError):
                is_broken = True
        if at < end < len(text) or (at < end and is_ended):
            yield _decode_row(text[at:end])
            at = end
        elif at == len(text) and is_ended:
            return
        elif is_broken or is_ended or len(text) - at > MAX_ROW_BYTES:
            yield _explain_broken_element(text[at:])
            return
        else:
            data = file.read(max(CHUNK_BYTES, len(text) - at))  # doubling: no element is scanned too often
            text, at, is_ended = text[at:] + decoder.decode(data, final=not data), 0, not data


def _explain_broken_element(text: str) -> RowError:
    error = _decode_row(text)
    reason, detail = error[:2] if isinstance(error, RowError) else ("not_json", "")
    return RowError(reason, f"{detail}; the rest of the file is not read", text[:200])


def _read_parquet(file: IO[bytes]) -> Iterator[Mapping[str, Any] | RowError]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        yield RowError("truncated", f"got a Parquet file that cannot be read on ({' '.join(str(error).split())})")


def _read_dataset(name: str, split: str) -> Iterator[Any]:
    import datasets
    import datasets.config

    try:
        if Path(name).is_dir():
            saved: Any = datasets.load_from_disk(name)
            yield from saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            from rest_rl.data.hub import has_hub  # only here: a file needs no client

            datasets.config.HF_HUB_OFFLINE |= not has_hub()  # or it would be tried for a minute
            config, _, part = split.rpartition("/")
            yield from datasets.load_dataset(name, config or None, split=part, streaming=True)
    except Exception as error:  # the hub, its file systems and its readers raise whatever they like
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"dataset {name}, split {split} ({type(error).__name__}: {told})",
            "a folder written by save_to_disk, or a dataset of the hub that can be reached",
            "check the name, the split (NAME:SPLIT, NAME:CONFIG/SPLIT) and the network, or download the file",
        ) from error

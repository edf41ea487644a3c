"""Stream the raw rows of JSONL, JSON and Parquet files, of folders with such files, and of hub datasets.

A row that cannot be read becomes a `RowError` with its number, and reading continues. At most one row (up to
`MAX_ROW_BYTES`) or one batch of rows is in memory.
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
"""Longer rows are rejected: 8 MiB are about two million tokens."""
CHUNK_BYTES = 2**18
BATCH_ROWS = 256
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_BETWEEN_VALUES = re.compile(r"[\s;,]*")
_BETWEEN_ROWS = re.compile(r"[\s,]*")


class TooDeepError(ValueError):
    """Raised for JSON that is nested deeper than 64 levels, which is also the limit for model responses."""


def load_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON as `json.loads` does; TooDeepError for over 64 levels of nesting, ValueError for other text."""
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise TooDeepError(f"nested deeper than {MAX_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise TooDeepError(f"nested deeper than {MAX_DEPTH} levels")
    return value


# Goes down level by level instead of recursing, because a deep value could exceed Python's recursion limit.
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
    """Parse JSON or a Python literal, which is never executed; return None if the text is neither."""
    try:
        return load_json(text)
    except ValueError:
        pass
    try:  # the detour through JSON turns tuples into lists and refuses sets and bytes
        return load_json(json.dumps(ast.literal_eval(text.strip())))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def read_literals(text: str) -> list[Any] | None:
    """Parse a text of one literal, consecutive JSON values, or one literal per line; return None for other text."""
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
    """An unreadable row: the reason (a key of `rest_rl.data.reasons.REASONS`), a detail, and the start of the row."""

    reason: str
    detail: str
    raw: str = ""


class Row(NamedTuple):
    """A row with its file and its number in the file, counted from 1."""

    file: str
    number: int
    value: Mapping[str, Any] | RowError
    is_columnar: bool = False
    """Whether the row comes from Arrow, which gives all objects the same keys and fills missing ones with null."""


class RowReader:
    """Iterates over the rows of files, folders or hub datasets.

    `read_bytes` and `total_bytes` show the progress; both are 0 for hub datasets, whose size is unknown.

    Raises:
        UserError: An input does not exist.
    """

    def __init__(self, *paths: str) -> None:
        self.inputs = [_find_input(path) for path in paths]
        self.total_bytes = sum(file.stat().st_size for each in self.inputs for file in each.files)
        self._done_bytes = 0
        self._file: IO[bytes] | None = None

    @property
    def read_bytes(self) -> int:
        """The number of bytes read so far."""
        # The position in the file on disk: for .gz, progress counts compressed bytes, as does `total_bytes`.
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
            raise UserError(f"{path} cannot be read ({describe_os_error(error)})", remedy="check the file") from error


class _Input(NamedTuple):
    name: str
    split: str
    files: list[Path]


def _find_input(path: str) -> _Input:
    # A file whose name contains a colon wins over NAME:SPLIT.
    if Path(path).exists():
        return _Input(path, "train", _find_files(Path(path), ""))
    name, _, split = path.partition(":")
    if Path(name).is_dir():
        return _Input(name, split or "train", _find_files(Path(name), split))
    if _HUB.fullmatch(name) and Path(name).suffix not in (*SUFFIXES, ".gz"):
        return _Input(name, split or "train", [])
    raise UserError(
        f"{path} does not exist",
        f"a file ({', '.join(SUFFIXES)}, .gz), a folder, or a Hub dataset (OWNER/NAME or OWNER/NAME:SPLIT)",
        "check the path",
    )


def _find_files(path: Path, split: str) -> list[Path]:
    endings = ", ".join(SUFFIXES)
    if path.is_file():
        if _data_suffix(path) not in SUFFIXES:
            raise UserError(
                f"{path} has an unknown file type", f"{endings}, or one of them with .gz", "rename or convert it"
            )
        return [path]
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file() and _data_suffix(file) in SUFFIXES)
    if split:
        # The split must be a whole word of the path: "test" matches data/test-0.jsonl but not latest.jsonl.
        word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])")
        files = [file for file in files if word.search(file.relative_to(path).as_posix())]
    if not files:
        named = f" of the split {split}" if split else ""
        raise UserError(
            f"the folder {path} has no data files ({endings}){named}", remedy="pass the folder that contains them"
        )
    return files


def _data_suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _read_text_rows(file: IO[bytes], path: Path) -> Iterator[Mapping[str, Any] | RowError]:
    text: IO[bytes] = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[assignment]
    try:
        head = text.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):  # or UTF-32-LE
            yield RowError("encoding", "the file is in UTF-16 or UTF-32, expected UTF-8")
            return
        text.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield from _read_json_array(text) if _data_suffix(path) == ".json" else _read_jsonl(text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield RowError("truncated", f"the compressed file is incomplete or damaged ({error})")


def _read_jsonl(file: IO[bytes]) -> Iterator[Mapping[str, Any] | RowError]:
    # Blank lines are skipped but count in row numbers. A line over the limit is read and discarded in pieces.
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            head, size = line[:200].decode(errors="replace"), len(line)
            while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
                size += len(line)
            yield RowError("row_too_long", f"the row has {size / 2**20:.1f} MiB", head)
        elif line.strip():
            yield _decode_row(line.rstrip())


def _decode_row(text: bytes | str) -> Mapping[str, Any] | RowError:
    # Text from `_read_json_array` was decoded with surrogateescape, so invalid UTF-8 arrives as lone surrogates.
    # Encoding it back recovers the bytes and reports the invalid one.
    if len(text) > MAX_ROW_BYTES:
        return RowError("row_too_long", f"the row has more than {MAX_ROW_BYTES / 2**20:.0f} MiB", str(text[:200]))
    shown = text[:200].decode(errors="replace") if isinstance(text, bytes) else text[:200]
    try:
        if isinstance(text, bytes):
            text = text.decode()
        elif not text.isascii():
            text = text.encode(errors="surrogateescape").decode()
        row = load_json(text, _refuse_constant)
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start} is not UTF-8"
        return RowError("encoding", found, error.object[:200].decode("latin-1"))
    except _ConstantError as error:
        return RowError("not_a_number", f"the row contains {error}, which is not valid JSON", shown)
    except TooDeepError as error:
        return RowError("too_deep", f"the JSON is {error}", shown)
    except ValueError as error:
        is_syntax = isinstance(error, json.JSONDecodeError)
        where = f"{error.msg.removesuffix(' at')} at character {error.pos}" if is_syntax else error
        return RowError("not_json", f"the text is not JSON ({where})", shown)
    if not isinstance(row, Mapping):
        return RowError("not_an_object", f"the row is of type {type(row).__name__}, expected an object", shown)
    return row


class _ConstantError(ValueError):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


def _read_json_array(file: IO[bytes]) -> Iterator[Mapping[str, Any] | RowError]:
    # Streams the elements of an array, or of consecutive objects, with the standard decoder. The buffer `text[at:]`
    # starts at an element; `raw_decode` finds its end, and if it fails near the end of the buffer, more is read and the
    # scan repeats. The buffer doubles, so each element is scanned O(log size) times. A broken or overlong element has
    # no known end, so the next one cannot be found, and reading stops. (ijson 3 needs unbounded memory for deeply
    # nested elements and replaces lone surrogates by question marks.)
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
                # An unterminated string, or an error within one escape or literal of the end, may just need more text.
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
            data = file.read(max(CHUNK_BYTES, len(text) - at))  # doubles the buffer
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
        yield RowError("truncated", f"the Parquet file cannot be read any further ({' '.join(str(error).split())})")


def _read_dataset(name: str, split: str) -> Iterator[Any]:
    import datasets
    import datasets.config

    try:
        if Path(name).is_dir():
            saved: Any = datasets.load_from_disk(name)
            yield from saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            from rest_rl.data.hub import has_hub  # imports the hub client, which files do not need

            datasets.config.HF_HUB_OFFLINE |= not has_hub()  # otherwise it retries for a minute
            config, _, part = split.rpartition("/")
            yield from datasets.load_dataset(name, config or None, split=part, streaming=True)
    except Exception as error:  # the hub client, fsspec and the file readers share no base class
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"the split {split!r} of the dataset {name!r} cannot be read ({type(error).__name__}: {message})",
            "a folder written by save_to_disk, or a Hub dataset",
            "check the name, the split (NAME:SPLIT or NAME:CONFIG/SPLIT) and the network, or download the file",
        ) from error

"""Write files of samples atomically: JSONL, or Parquet with nested fields as JSON text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rest_rl.data.check import CheckedRow
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.errors import UserError
from rest_rl.jsonl import as_json, describe_os_error

BATCH_ROWS = 1000
Write = Callable[[Mapping[str, Any]], None]


def rejected_path(out: Path) -> Path:
    """Return the path of the file, next to `out`, for rows that give no sample or lose a turn."""
    return out.with_name(f"{out.name}.rejected.jsonl")


def check_output(out: Path, inputs: Iterable[str]) -> None:
    """Raise UserError if the output has an unknown ending or would overwrite an input."""
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out is {out}", "a name that ends in .jsonl or .parquet")
    outputs = {out.resolve(), rejected_path(out).resolve()}
    if taken := [path for path in inputs if Path(path).resolve() in outputs]:
        raise UserError(f"--out {out} would overwrite the input {taken[0]}", remedy="choose another name")


@contextmanager
def sample_writer(out: Path) -> Iterator[Callable[[ToolSample], None]]:
    """Yield a function that writes samples to `out` (JSONL or Parquet); the file appears only if no error occurs."""
    kind = _parquet_writer if out.suffix == ".parquet" else _jsonl_writer
    with _replacing(out) as part, kind(part) as write:
        yield lambda sample: write(to_json(sample))


@contextmanager
def rejected_writer(out: Path) -> Iterator[Callable[[CheckedRow], None]]:
    """Yield a function that records a row in a file next to `out` if the row loses samples, with the reasons.

    If no row loses samples, no file remains.
    """

    def write_lost(row: CheckedRow) -> None:
        lost = [found for found in row.findings if found.severity == "rejected"]
        reasons = [{"reason": found.reason, "detail": found.detail, "sample": found.sample} for found in lost]
        if lost:
            write({"file": row.file, "row": row.number, "status": row.status, "reasons": reasons, "raw": row.raw})

    path = rejected_path(out)
    with _replacing(path) as part, _jsonl_writer(part) as write:
        yield write_lost
    if not path.stat().st_size:
        path.unlink()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    # The part file is in the same folder, so that the final rename is atomic and never crosses file systems.
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        files = [str(folder) for folder in path.parents if folder.is_file()]
        reason = f"{files[0]} is a file, not a folder" if files else describe_os_error(error)
        raise UserError(f"{path} cannot be written ({reason})", remedy="choose another --out") from error
    finally:
        with suppress(OSError):  # the parent may be a file, and then there is no part file
            part.unlink(missing_ok=True)


@contextmanager
def _jsonl_writer(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(row: Mapping[str, Any]) -> None:
            file.write(as_json(row) + "\n")

        yield write
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Write]:
    # Nested fields are JSON text, because Arrow structs would pad every call with the argument names of all others.
    import pyarrow as pa
    from pyarrow import parquet

    nested, texts = ("messages", "tools", "gold"), ("id", "kind", "thought", "preamble")
    columns = ("id", "kind", *nested, "thought", "preamble")
    schema = pa.schema({**dict.fromkeys(columns, pa.string()), "tools_in_prompt": pa.bool_()})
    batch: list[dict[str, Any]] = []

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        batch.clear()

    def write(row: Mapping[str, Any]) -> None:
        kept = {name: _encodable(row.get(name)) for name in texts}
        batch.append({**row, **kept, **{name: as_json(row[name]) for name in nested}})
        if len(batch) >= BATCH_ROWS:
            flush()

    with parquet.ParquetWriter(path, schema, write_statistics=False) as writer:
        yield write
        flush()


def _encodable(text: str | None) -> str | None:
    # Arrow stores UTF-8, which has no lone surrogates.
    return None if text is None else text.encode(errors="replace").decode()

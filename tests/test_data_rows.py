"""Bad input rejects only its own row, with number, reason and remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rest_rl.data import reading
from rest_rl.data.load import load_dataset
from rest_rl.data.reading import MAX_ROW_BYTES, RowError, RowReader
from rest_rl.data.reasons import REASONS
from rest_rl.data.samples import to_json
from rest_rl.data.tool_world import tool_world

GOOD = [
    {"messages": [{"role": "user", "content": f"hi {n} é"}, {"role": "assistant", "content": "ho"}]} for n in range(4)
]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in GOOD]


def values(path: Path) -> list[Any]:
    return [row.value for row in RowReader(str(path))]


def with_bad(tmp_path: Path, bad: bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([LINES[0], LINES[1], bad, LINES[2], LINES[3]]) + b"\n")
    return path


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (b'{"messages": [', "not_json", "not JSON"),
        (b"[1]", "not_an_object", "list"),
        (b'{"a": NaN}', "not_a_number", "NaN"),
        (b'{"a": -Infinity}', "not_a_number", "-Infinity"),
        ('{"messages": "é"}'.encode("latin-1"), "encoding", "0xe9"),
        (b"[" * 100_000, "too_deep", "deeper than 64"),
        (b'{"a": "' + b"x" * (10 * 2**20) + b'"}', "row_too_long", "10.0 MiB"),
        (b'{"question": 1}', "unknown_shape", "question"),
        (b'{"messages": 3}', "bad_row", "messages is of type int"),
        (b'{"messages": []}', "no_assistant_turn", "no messages"),
        (
            b'{"messages": [{"role": "user", "content": "x"}]}',
            "no_assistant_turn",
            "none of the messages is an assistant turn",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "y"}]}', "bad_turn", "'robot'"),
    ],
)
def test_a_bad_line_rejects_only_itself(tmp_path: Path, bad: bytes, reason: str, detail: str) -> None:
    samples, report = load_dataset(str(with_bad(tmp_path, bad)))
    assert (report.rows, report.kept, report.rejected, len(samples)) == (5, 4, 1, 4)
    assert report.reasons == {reason: 1}
    (located,) = report.findings
    assert located.row == 3
    assert detail in located.finding.detail
    assert report.to_json()["findings"][0]["remedy"] == REASONS[reason].remedy


def test_blank_lines_and_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(LINES) + b"\n \n")
    assert values(path) == GOOD


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", [b"le", b"be"])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_file_in_a_wide_encoding_is_one_error(tmp_path: Path, encoding: str, order: bytes, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(("\ufeff" + b"\n".join(LINES).decode()).encode(f"{encoding}-{order.decode()}"))
    assert [each.reason for each in values(path)] == ["encoding"]


def test_truncated_compressed_files_give_their_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"\n".join(LINES) + b"\n" + b"\n".join(LINES))
    path.write_bytes(whole)
    assert values(path) == GOOD + GOOD
    path.write_bytes(whole[:-12])
    *_, last = values(path)
    assert isinstance(last, RowError)
    assert last.reason == "truncated"


def test_lines_may_have_no_ending(tmp_path: Path) -> None:
    path = tmp_path / "rows.ndjson"
    path.write_bytes(b"\r\n".join(LINES))
    assert values(path) == GOOD


# a top-level array


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [7, 64, 2**18])
def test_an_array_is_streamed(tmp_path: Path, indent: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(GOOD, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert values(path) == GOOD


@pytest.mark.parametrize("text", ["", "  ", "[]", "[ \n ]"])
def test_an_empty_array_has_no_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert values(path) == []


BREAKS = {
    "missing comma": lambda text: text.replace('", "content"', '" "content"', 1),
    "unclosed string": lambda text: text.replace('"ho"', '"ho', 1),
    "unclosed list": lambda text: text.replace("}]", "}", 1),
    "bare word": lambda text: text.replace('"ho"', "ho", 1),
    "single quotes": lambda text: text.replace('"', "'"),
    "raw line break": lambda text: text.replace("hi", "h\ni", 1),
}


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("chunk", [16, 2**18])
def test_a_broken_element_ends_the_file(tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    texts = [json.dumps(row, ensure_ascii=False) for row in GOOD]
    texts[1] = BREAKS[kind](texts[1])
    path = tmp_path / "rows.json"
    path.write_text(f"[{', '.join(texts)}]", encoding="utf-8")
    first, broken = values(path)
    assert (first, broken.reason) == (GOOD[0], "not_json")
    assert broken.raw


@pytest.mark.parametrize("rows", range(4))
def test_a_truncated_file_gives_the_rows_before(tmp_path: Path, rows: int) -> None:
    texts = [json.dumps(row, ensure_ascii=False) for row in GOOD]
    path = tmp_path / "rows.json"
    path.write_text("[" + ", ".join([*texts[:rows], texts[rows][:-9]]), encoding="utf-8")
    *before, last = values(path)
    assert (before, last.reason) == (GOOD[:rows], "not_json")


def test_an_array_without_its_closing_bracket_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(GOOD)[:-1])
    assert values(path) == GOOD


@pytest.mark.parametrize("ending", ["]", ""])
def test_a_huge_element_ends_the_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "rows.json"
    huge = {"messages": [{"role": "user", "content": "x" * (MAX_ROW_BYTES + 2**21)}]}
    path.write_text(json.dumps([GOOD[0], huge])[:-1] + ending)
    assert [getattr(value, "reason", value) for value in values(path)] == [GOOD[0], "row_too_long"]


def test_a_deep_element_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[" + json.dumps(GOOD[0]) + "," + '{"a":' + "[" * 100_000)
    assert [getattr(value, "reason", value) for value in values(path)] == [GOOD[0], "too_deep"]


def test_invalid_utf8_rejects_its_element(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + LINES[0] + b',{"messages": "\xff"},' + LINES[1] + b"]")
    assert [getattr(value, "reason", value) for value in values(path)] == [GOOD[0], "encoding", GOOD[1]]


def test_objects_one_after_the_other_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row, indent=1) for row in GOOD))
    assert values(path) == GOOD


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(), JSON, min_size=1)), st.integers(1, 40), st.sampled_from([None, 1]))
def test_any_array_round_trips(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(
        json.dumps(rows, indent=indent, ensure_ascii=chunk % 2 == 0), encoding="utf-8", errors="surrogatepass"
    )
    if any("\ud800" <= character <= "\udfff" for character in json.dumps(rows, ensure_ascii=False)):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK_BYTES", chunk)
        assert values(path) == rows


# Parquet, folders, datasets


def test_parquet_with_nested_columns(tmp_path: Path) -> None:
    """Arrow gives every call the arguments of all others; the nulls are no arguments."""
    tools = [
        {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}}
        for name, key in (("f", "x"), ("g", "y"))
    ]
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1"}}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": "2"}}}]},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([{"messages": turns, "tools": json.dumps(tools)}]), path)
    samples, report = load_dataset(str(path))
    assert [sample.gold.calls[0].arguments for sample in samples] == [{"x": "1"}, {"y": "2"}]
    assert report.reasons == {"null_padding": 1}


def test_a_truncated_parquet_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([{"a": 1}]), path)
    path.write_bytes(path.read_bytes()[:-20])
    _, report = load_dataset(str(path))
    assert (report.rows, report.rejected, report.reasons) == (1, 1, {"truncated": 1})


def test_a_parquet_file_of_another_schema_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([{"question": "?", "answer": 1}] * 3), path)
    _, report = load_dataset(str(path))
    assert (report.rows, report.rejected, report.reasons) == (3, 3, {"unknown_shape": 3})


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    samples = tool_world(0, 3)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(to_json(sample)) for sample in samples))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.json").write_text(json.dumps(GOOD))
    (tmp_path / "read.me").write_text("no data")
    read, report = load_dataset(str(tmp_path))
    assert (len(read), report.sources) == (7, {"samples": 3, "messages": 4})
    assert report.reasons == {"mixed_shapes": 4}
    assert report.findings[0].file.endswith("c.json")
    assert report.findings[0].row == 1


def test_a_split_of_a_folder_is_the_files_that_name_it(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train_1.jsonl", "trainer.jsonl", "test/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES[0])
    for split, names in (("train", ["train-0.jsonl", "train_1.jsonl"]), ("test", ["a.jsonl"])):
        assert [Path(row.file).name for row in RowReader(f"{tmp_path}:{split}")] == names
    with pytest.raises(ValueError, match="of the split dev"):
        RowReader(f"{tmp_path}:dev")


def test_a_folder_of_datasets_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "one")
    assert [len(row["messages"]) for row in values(tmp_path / "one")] == [2] * 4
    datasets.DatasetDict({"test": datasets.Dataset.from_list(GOOD[:1])}).save_to_disk(tmp_path / "two")
    assert len(values(Path(f"{tmp_path}/two:test"))) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.jsonl", "does not exist"),
        ("data/nowhere.jsonl", "does not exist"),
        ("nowhere", "does not exist"),
        ("rows.csv", "unknown file type"),
        ("empty", "the folder empty has no data files"),
    ],
)
def test_missing_inputs_are_refused(tmp_path: Path, name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=told):
        RowReader(name)


def test_a_dataset_that_cannot_be_reached_is_one_error() -> None:
    with pytest.raises(ValueError, match="the split 'train' of the dataset 'nobody-at-all/nothing' cannot be read"):
        load_dataset("nobody-at-all/nothing")


def test_numbers_count_per_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(LINES[:2]))
    reader = RowReader(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert [(Path(row.file).stem, row.number) for row in reader] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert reader.read_bytes == reader.total_bytes > 0

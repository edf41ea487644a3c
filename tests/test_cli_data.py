"""The command `data` end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.data.load import load_dataset
from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import tool_world
from rest_rl.data.worlds import open_world
from rest_rl.response import Gold
from tests.sample_files import load_samples, save_samples

ASKED = {"role": "user", "content": "Weather in [Oslo]?"}
TOOL = {"name": "w", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}


def dialogue(number: int, value: Any = 1, tool: str = "w") -> dict[str, Any]:
    call = {"function": {"name": tool, "arguments": {"n": value}}}
    turns = [
        {**ASKED, "content": f"{ASKED['content']} {number}"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
    ]
    return {
        "id": number,
        "messages": [*turns, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "Rain."}],
        "tools": [TOOL],
    }


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six rows: kept, repaired, a turn lost, not JSON, unknown shape, kept; 2 + 2 + 1 + 0 + 0 + 2 samples."""
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(dialogue(1)),
        json.dumps(dialogue(2, "5")),
        json.dumps(dialogue(3, tool="x")),
        "{oops",
        '{"q": 1}',
    ]
    path.write_text("\n".join([*lines, json.dumps(dialogue(6))]) + "\n")
    return path


COUNTS = {"rows": 6, "kept": 2, "repaired": 2, "rejected": 2, "samples": 7}
REASONS = {"not_json": 1, "unknown_shape": 1, "unknown_tool": 1, "number_as_string": 1}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["data", *map(str, arguments)])
    return code, capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["data", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


def test_check_prints_one_json_object(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "check", rows, "--json")
    told = json.loads(out)
    assert code == 0
    assert {key: told[key] for key in COUNTS} == COUNTS
    assert told["reasons"] == REASONS
    assert told["source"] == {"messages": 4}
    assert [(found["row"], found["reason"], found["severity"]) for found in told["findings"]] == [
        (2, "number_as_string", "repaired"),
        (3, "unknown_tool", "rejected"),
        (4, "not_json", "rejected"),
        (5, "unknown_shape", "rejected"),
    ]
    assert all(found["remedy"] and found["detail"] for found in told["findings"])


def test_check_prints_counts_and_reasons(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "check", rows)
    assert code == 0
    assert "shape: messages (4 rows)" in out
    assert "6 rows: 2 kept, 2 repaired (1 of them lost turns), 2 rejected; 7 samples" in out
    assert "row 4: the text is not JSON" in out
    assert "fix the row" in out


def test_check_lists_ten_of_each_reason_or_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 14)
    assert "and 4 more; list them with --all or --json" in run(capsys, "check", path)[1]
    assert run(capsys, "check", path, "--all")[1].count("row 14:") == 1


def test_strict_is_an_exit_status(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check", rows, "--strict")[0] == 1
    assert run(capsys, "check", rows, "--strict", "--limit", 3)[0] == 1  # the third row lost a turn
    assert run(capsys, "check", rows, "--strict", "--limit", 2)[0] == 0
    assert run(capsys, "convert", rows, "--strict", "--out", tmp_path / "out.jsonl")[0] == 1


def test_strict_requires_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{}\n")
    for action in (["check", empty], ["convert", empty, "--out", tmp_path / "out.jsonl"]):
        assert main(["data", *map(str, action), "--strict"]) == 1
        assert "no samples are left (1 row read)" in capsys.readouterr().err
        assert main(["data", *map(str, action)]) == 0


def test_input_without_rows_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for name in ("empty.jsonl", "folder"):
        for action in (("check",), ("convert", "--out", tmp_path / "out.jsonl")):
            assert "has no " in error_of(capsys, action[0], tmp_path / name, *action[1:])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("as_text", [True, False])
def test_deep_nesting_has_its_own_reason(as_text: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, value = tmp_path / "rows.jsonl", 1
    for _ in range(70):
        value = {"n": value}
    row = dialogue(1, value)
    call = row["messages"][1]["tool_calls"][0]["function"]
    call["arguments"] = json.dumps(call["arguments"]) if as_text else call["arguments"]
    path.write_text(json.dumps(row))
    told = json.loads(run(capsys, "check", path, "--json")[1])
    assert told["reasons"] == {"too_deep": 1, **({"broken_history": 1} if as_text else {})}
    assert "deeper than 64" in told["findings"][0]["detail"]


def test_two_tools_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Different ones are a reason of their own, which can be kept; a copy changes nothing."""
    path, row = tmp_path / "rows.jsonl", dialogue(1)
    path.write_text(json.dumps({**row, "tools": [{"name": "w", "parameters": {}}, TOOL]}))
    told = json.loads(run(capsys, "check", path, "--json")[1])
    assert (told["reasons"], told["samples"]) == ({"duplicate_tool": 1}, 1)  # the turn that calls none of them stays
    assert told["findings"][0]["detail"] == "two different tools have the name 'w'"
    assert [found["severity"] for found in told["findings"]] == ["rejected", "noted"]
    assert json.loads(run(capsys, "check", path, "--json", "--allow", "duplicate_tool")[1])["samples"] == 2
    path.write_text(json.dumps({**row, "tools": [TOOL, TOOL]}))
    assert json.loads(run(capsys, "check", path, "--json")[1])["kept"] == 1


def test_rows_with_lost_turns_differ_from_rejected_rows(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "check", rows)[1]
    assert "2 repaired (1 of them lost turns), 2 rejected" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "turn rejected" in lines["unknown_tool"]
    assert "row rejected" in lines["not_json"]
    assert "repaired" in lines["number_as_string"]
    assert json.loads(run(capsys, "check", rows, "--json")[1])["lost_turns"] == 1
    assert "turn rejected: unknown_tool" in run(capsys, "show", rows, 3)[1]
    assert "row rejected: not_json" in run(capsys, "show", rows, 4)[1]


def test_each_output_has_its_own_rejected_rows(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("jsonl", "parquet"):
        run(capsys, "convert", rows, "--out", tmp_path / "o" / f"s.{ending}")
    names = [f"s.{ending}{more}" for ending in ("jsonl", "parquet") for more in ("", ".rejected.jsonl")]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == names


def test_check_of_several_files(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "more.jsonl"
    other.write_text(json.dumps(dialogue(1)) + "\n{")
    told = json.loads(run(capsys, "check", rows, other, "--json")[1])
    assert (told["rows"], told["reasons"]["duplicate"], told["reasons"]["not_json"]) == (8, 1, 2)
    assert (told["findings"][-1]["file"], told["findings"][-1]["row"]) == (str(other), 2)
    assert f"{other}, row 2" in run(capsys, "check", rows, other)[1].replace("\n", "")


def test_check_against_a_test_file(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(capsys, "check", rows, "--test", rows, "--json")[1])
    assert (told["samples"], told["reasons"]["leak"]) == (0, 4)


def test_allow_turns_a_rejection_into_a_note(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(capsys, "check", rows, "--allow", "unknown_tool", "--allow", "number_as_string", "--json")[1])
    assert (told["kept"], told["repaired"], told["samples"], told["reasons"]) == (4, 0, 8, REASONS)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_convert_round_trip(rows: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / f"out.{ending}"
    code, told = run(capsys, "convert", rows, "--out", out, "--json")
    assert (code, json.loads(told)["samples"], json.loads(told)["out"]) == (0, 7, str(out))
    samples, _ = load_dataset(str(rows))
    again, report = load_dataset(str(out))
    assert again == samples
    assert {sample.preamble for sample in again if sample.gold.calls} == {"I look."}
    assert (report.kept, report.reasons) == (7, {})
    rejected = [
        json.loads(line) for line in (tmp_path / "deep" / f"out.{ending}.rejected.jsonl").read_text().splitlines()
    ]
    assert [(row["row"], row["status"], row["reasons"][0]["reason"]) for row in rejected] == [
        (3, "repaired", "unknown_tool"),
        (4, "rejected", "not_json"),
        (5, "rejected", "unknown_shape"),
    ]
    assert (rejected[0]["raw"], rejected[1]["raw"].strip()) == (dialogue(3, tool="x"), "{oops")
    run(capsys, "convert", out, "--out", tmp_path / "deep" / "last.jsonl")
    assert load_samples(tmp_path / "deep" / "last.jsonl") == samples
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [
        "last.jsonl",
        f"out.{ending}",
        f"out.{ending}.rejected.jsonl",
    ]


def test_convert_removes_what_an_earlier_one_rejected(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rejected = tmp_path / "out.jsonl", tmp_path / "out.jsonl.rejected.jsonl"
    run(capsys, "convert", rows, "--out", out)
    assert rejected.exists()
    run(capsys, "convert", rows, "--out", out, "--limit", 2)
    assert not rejected.exists()


def test_convert_never_overwrites_its_input(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows.read_bytes()
    assert "would overwrite the input" in error_of(capsys, "convert", rows, "--out", rows)
    bad = tmp_path / "x.jsonl.rejected.jsonl"
    bad.write_bytes(before)
    assert "would overwrite the input" in error_of(capsys, "convert", bad, "--out", tmp_path / "x.jsonl")
    assert "ends in .jsonl or .parquet" in error_of(capsys, "convert", rows, "--out", tmp_path / "x.csv")
    assert rows.read_bytes() == bad.read_bytes() == before


def test_convert_that_fails_leaves_the_old_file(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    error_of(capsys, "convert", rows, tmp_path / "nowhere.jsonl", "--out", out)
    error_of(capsys, "convert", rows, "--out", out, "--max-prompt-tokens", 3)
    error_of(capsys, "convert", rows, "--out", out, "--allow", "nonsense")
    error_of(capsys, "convert", rows, "--out", out, "--limit", -1)
    error_of(capsys, "convert", rows, "--out", out, "--format", "nonsense")
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_convert_can_mask(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 0, 1):
        run(capsys, "convert", rows, "--out", tmp_path / f"{seed}.jsonl", "--mask-names", 1, "--seed", seed)
    zero, one = load_samples(tmp_path / "0.jsonl"), load_samples(tmp_path / "1.jsonl")
    assert zero != one
    assert all(tool["function"]["name"] != "w" for sample in zero for tool in sample.tools)
    assert load_dataset(str(tmp_path / "0.jsonl"))[1].kept == 7


def test_show_a_row(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "show", rows, 2)
    assert code == 0
    assert "row 2" in out
    assert "repaired: number_as_string" in out
    assert "user: Weather in [Oslo]? 2" in out
    assert 'I look.\n<tool_call>\n{"name": "w", "arguments": {"n": 5}}\n</tool_call>' in out
    in_tags = run(capsys, "show", rows, 2, "--format", "toolrl")[1]
    assert "<think> I look. </think>\n<tool_call>" in in_tags
    assert "<response> Rain. </response>" in in_tags
    assert "{oops" in run(capsys, "show", rows, 4)[1]


def test_show_a_gold_that_the_format_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASKED, {"role": "assistant", "content": "[f(x=1)]"}]}))
    code, out = run(capsys, "show", path, 1, "--format", "pythonic")
    assert code == 0
    assert '{"calls": [], "answer": "[f(x=1)]"}' in out


def test_show_a_row_whose_prompt_a_test_file_has(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(dialogue(1)))
    assert "rejected: leak" in run(capsys, "show", rows, 1, "--test", held_out)[1]
    assert "leak" not in run(capsys, "show", rows, 6, "--test", held_out)[1]


def test_show_shows_the_first_row(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "show", rows) == run(capsys, "show", rows, 1)


@pytest.mark.parametrize(("number", "expected"), [(0, "has no row 0"), (7, "has no row 7, only 6 rows")])
def test_show_refuses_a_missing_row(rows: Path, number: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_of(capsys, "show", rows, number)


def test_split_keeps_dialogues_and_equal_prompts_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(dialogue(n)) for n in range(50)) + "\n{\n" + json.dumps(dialogue(7, 2)))
    code, out = run(capsys, "split", path, "--test", 0.2, "--seed", 3)
    assert code == 0
    checked = run(capsys, "check", path)[1]
    assert next(line for line in out.splitlines() if " rows: " in line).partition(";")[0] in checked
    train, test = load_samples(tmp_path / "rows.train.jsonl"), load_samples(tmp_path / "rows.test.jsonl")
    assert len(train) + len(test) == 102
    assert abs(len(test) - 20.4) <= 2  # the largest group has four samples
    assert not {s.messages[0]["content"] for s in train} & {s.messages[0]["content"] for s in test}
    assert not {s.id.split("/")[0] for s in train} & {s.id.split("/")[0] for s in test}
    told = json.loads(
        run(capsys, "check", tmp_path / "rows.train.jsonl", "--test", tmp_path / "rows.test.jsonl", "--json")[1]
    )
    assert "leak" not in told["reasons"]
    run(capsys, "split", path, "--test", 0.2, "--seed", 3, "--out", tmp_path / "again")
    assert load_samples(tmp_path / "again" / "rows.test.jsonl") == test
    run(capsys, "split", path, "--test", 0.2, "--seed", 4, "--out", tmp_path / "other")
    assert load_samples(tmp_path / "other" / "rows.test.jsonl") != test


def test_split_keeps_our_own_samples_of_one_dialogue_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tool_world(0, 300)
    save_samples(samples, tmp_path / "world.jsonl")
    run(capsys, "split", tmp_path / "world.jsonl", "--test", 0.5)
    sides = [load_samples(tmp_path / f"world.{side}.jsonl") for side in ("train", "test")]
    assert sorted(sample.id for side in sides for sample in side) == sorted(sample.id for sample in samples)
    first, second = ({sample.id.split("/")[0] for sample in side} for side in sides)
    assert not first & second
    assert all(len(side) > 100 for side in sides)


@pytest.mark.parametrize("own", [False, True])
def test_split_groups_dialogues_not_prefixes_of_ids(
    tmp_path: Path, own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids such as `toolbench/7` name a source; turns share a dialogue, also where the assistant speaks first."""
    turns = [
        [
            {"role": "system", "content": "Be brief."},
            *([{"role": "assistant", "content": "Hello!"}] if number % 2 else []),
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": f"{number}!"},
        ]
        for number in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"toolbench/{n}", "messages": t}) for n, t in enumerate(turns)))
    if own:
        run(capsys, "convert", path, "--out", tmp_path / "samples.jsonl", "--allow", "duplicate")
        path = tmp_path / "samples.jsonl"
    run(capsys, "split", path, "--test", 0.3, "--allow", "duplicate")
    sides = [load_samples(tmp_path / f"{path.stem}.{side}.jsonl") for side in ("train", "test")]
    dialogues = [{sample.id.rpartition("/")[0] for sample in side} for side in sides]
    assert not dialogues[0] & dialogues[1]
    # 20 dialogues of two turns and 20 of one: 60 samples, 0.3 of them are 18, met up to one group of two
    assert [len(side) for side in sides] == pytest.approx([42, 18], abs=1)


def test_split_of_samples_whose_ids_name_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        ToolSample(f"toolbench/{n}", ({"role": "user", "content": f"{n}?"},), (), Gold((), f"{n}!")) for n in range(20)
    ]
    run(capsys, "split", save_samples(samples, tmp_path / "rows.jsonl"), "--test", 0.5)
    assert [len(load_samples(tmp_path / f"rows.{side}.jsonl")) for side in ("train", "test")] == [10, 10]


@pytest.mark.parametrize("share", [0, 1, -1])
def test_split_needs_a_share(rows: Path, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a fraction" in error_of(capsys, "split", rows, "--test", share)


def test_split_of_too_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(dialogue(1)))
    assert "use a file with more dialogues" in error_of(capsys, "split", tmp_path / "rows.jsonl", "--test", 0.5)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_world_writes_the_tool_world(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"world.{ending}"
    code, told = run(capsys, "world", "--out", out, "-n", 40, "--seed", 5, "--split", "unseen_tools")
    assert (code, f"wrote {out}: 40 samples" in told) == (0, True)
    samples, report = load_dataset(str(out))
    assert samples == tool_world(5, 40, "unseen_tools")
    assert report.kept == 40
    assert "-n is 0, expected at least 1" in error_of(capsys, "world", "--out", out, "-n", 0)
    assert "cannot be written" in error_of(capsys, "world", "--out", out / "inside.jsonl")
    assert run(capsys, "world", "--out", out, "-n", 20, "--decision", "call")[0] == 0
    assert load_dataset(str(out))[0] == tool_world(0, 20, decision="call")


def test_office_writes_the_office(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "office.jsonl"
    assert run(capsys, "office", "--out", out, "-n", 30, "--seed", 5, "--split", "unseen_phrasings")[0] == 0
    samples, report = load_dataset(str(out))
    assert samples == open_world("office").draw(5, 30, "unseen_phrasings")
    assert report.kept == 30
    assert "-n is 0, expected at least 1" in error_of(capsys, "office", "--out", out, "-n", 0)


def test_shop_writes_the_shop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shop.jsonl"
    assert run(capsys, "shop", "--out", out, "-n", 30, "--seed", 5, "--split", "unseen_goals")[0] == 0
    samples, report = load_dataset(str(out))
    assert samples == open_world("shop").draw(5, 30, "unseen_goals")
    assert report.kept == 30


def test_the_command_is_fast_and_imports_no_torch(rows: Path) -> None:
    code = """
import sys
from rest_rl.cli import app

app.main(sys.argv[1:])
print('torch' in sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "check", str(rows), "--json"], capture_output=True, text=True
    )
    assert (done.stderr.strip(), json.loads(done.stdout)["rows"]) == ("False", 6)


@pytest.mark.parametrize("action", ["", "check", "convert", "show", "split", "world", "office", "shop", "build"])
def test_help_has_an_example(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *([action] if action else []), "--help"]) == 0
    assert "rest-rl data " in capsys.readouterr().out.split("example", 1)[1]


def peak_memory_of_check(path: Path) -> float:
    """Peak resident MiB of `data check` in a process of its own."""
    code = (
        "import resource, sys; from rest_rl.cli.app import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "check", str(path), "--json"], capture_output=True, text=True, check=True
    )
    return float(done.stderr)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (20_000, 200_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps(dialogue(n)) + "\n" for n in range(count))
        peaks.append(peak_memory_of_check(path))
    # 400,000 samples leave 800,000 digests: integers of 36 bytes in a set of 2**22 places of 16 bytes, 92 MiB
    assert peaks[1] - peaks[0] < 110


def test_without_a_hub_a_dataset_fails_quickly(tmp_path: Path) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "rest_rl", "data", "check", "no/where"]
    told = subprocess.run(command, env={**os.environ, **nobody}, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr.startswith("error: the split 'train' of the dataset 'no/where' cannot be read")


def test_the_embedded_model_checks_too(tmp_path: Path) -> None:
    assert main(["data", "world", "--out", str(tmp_path / "rows.jsonl"), "-n", "4"]) == 0
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--model", "embedded", "--strict"]) == 0

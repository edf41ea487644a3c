"""The dialogues of examples/company: one seed gives one file, and exactly the listed rows have the listed faults."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest
from jsonschema import Draft202012Validator

import rest_rl
from rest_rl.cli.app import main
from rest_rl.data.check import check_rows

FOLDER = Path(__file__).parents[1] / "examples" / "company"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def company() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dialogues", FOLDER / "make_dialogues.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def file(company: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("company") / "dialogues.jsonl"
    path.write_text("\n".join(company.make_lines()) + "\n", encoding="utf-8")
    return str(path)


def test_one_seed_gives_one_file(company: ModuleType, file: str) -> None:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    assert lines == company.make_lines()
    assert len(lines) == 400


def test_exactly_the_listed_rows_have_the_listed_faults(company: ModuleType, file: str) -> None:
    found: defaultdict[int, set[str]] = defaultdict(set)
    for located in rest_rl.check_data(file).findings:
        found[located.row].add(located.finding.reason)
    assert found == {row: set(reasons) for row, (_, _, reasons) in company.FAULTS.items()}
    assert len(company.FAULTS) == 14


def test_the_check_prints_every_reason_in_full(
    company: ModuleType, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["data", "check", file]) == 0
    printed = capsys.readouterr().out
    for reason in {reason for _, _, reasons in company.FAULTS.values() for reason in reasons}:
        assert len(re.findall(rf"^{reason}\b", printed, re.MULTILINE)) == 2  # in the table and above its rows
    assert " at at " not in printed


def test_the_page_states_the_counts(file: str) -> None:
    report = rest_rl.check_data(file)
    counts = f"{report.rows} rows: {report.kept} kept, {report.repaired} repaired"
    lost = f" ({report.lost_turns} of them lost turns), {report.rejected} rejected"
    calls, answers = report.turns["calls"], report.turns["answers"]
    turns = f"{report.samples} samples: {calls} call turns, {answers} answer turns ({answers / report.samples:.0%})"
    assert f"{counts}{lost}; {turns}" in PAGE


def test_every_gold_call_fits_the_schema_of_an_offered_tool(company: ModuleType, file: str) -> None:
    samples, _ = rest_rl.load_dataset(file)
    calls: Counter[str] = Counter()
    for sample in samples:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in sample.tools}
        assert 1 <= len(schemas) <= 3
        for call in sample.gold.calls:
            assert not list(Draft202012Validator(schemas[call.name]).iter_errors(call.arguments))
            calls[call.name] += 1
    assert set(calls) == set(company.TOOLS)
    assert len(calls) == 12
    assert sum(len(sample.gold.calls) == 2 for sample in samples) == 55
    users = Counter(sum(m["role"] == "user" for m in sample.messages) for sample in samples)
    assert set(users) == {1, 2, 3, 4, 5}


def test_the_split_has_no_leak(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(file).parent)
    assert main(["data", "split", "dialogues.jsonl", "--test", "0.1"]) == 0
    train = list(check_rows("dialogues.train.jsonl", test="dialogues.test.jsonl"))
    assert not any(row.findings for row in train)
    assert f"{len(train)} samples and" in PAGE
    assert len(Path("dialogues.test.jsonl").read_text(encoding="utf-8").splitlines()) == 82


def test_prompts_say_which_day_it_is(file: str) -> None:
    for line in Path(file).read_text(encoding="utf-8").splitlines()[:379]:
        assert "Today is " in json.loads(line)["messages"][0]["content"]

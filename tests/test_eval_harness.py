"""The evaluation loop: rows, resuming at any byte, errors and overflows, threads; on the tool world."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_rl.data.tool_world import tool_world
from rest_rl.evaluate.benchmarks.world import WorldTasks
from rest_rl.evaluate.conversation import Reply, Request
from rest_rl.evaluate.harness import evaluate_all, split_batches, summarize
from rest_rl.evaluate.log import SAMPLES, EvalLog
from rest_rl.evaluate.models.recorded import Oracle, Recorded, Recording, read_responses
from rest_rl.formats import get_format

FORMAT = get_format("toolrl")
TASKS = WorldTasks(seed=1, prompts=9)
IDS = list(TASKS.groups)
SETTINGS = {"model": "x"}


@dataclass
class Faulty:
    """Responds with the gold, but some named samples fail, overflow, are truncated or stop the evaluation."""

    errors: frozenset[str] = frozenset()
    overflows: frozenset[str] = frozenset()
    cuts: frozenset[str] = frozenset()
    fatal: frozenset[str] = frozenset()
    batch_size: int = 4
    concurrency: int = 1
    asked: list[tuple[str, ...]] = field(default_factory=list)
    refusals: frozenset[str] = frozenset()
    is_stopped: bool = False
    lock: Lock = field(default_factory=Lock)

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        with self.lock:
            self.asked.append(tuple(request.sample.id for request in requests))
        return [self.reply(request) for request in requests]

    def reply(self, request: Request) -> Reply:
        identity = request.sample.id
        if identity in self.fatal:
            raise ValueError("got a wrong key")
        if identity in self.errors:
            return Reply(error="the server fails")
        if identity in self.overflows:
            return Reply(overflow="too long", prompt_tokens=9000)
        if identity in self.refusals:
            return Reply(refusal="the template fails")
        right = Oracle(FORMAT).respond([request])[0]
        return right._replace(tokens=7, prompt_tokens=70, is_truncated=identity in self.cuts)

    def context_usage(self, request: Request) -> None:
        return None

    def stop(self) -> None:
        self.is_stopped = True


def new_log(folder: Path) -> EvalLog:
    log = EvalLog.new(folder)
    log.begin(SETTINGS, ["test"])
    return log


def test_oracle_scores_100_percent(tmp_path: Path) -> None:
    log = new_log(tmp_path / "a")
    rows = evaluate_all(TASKS, Oracle(FORMAT), FORMAT, IDS, log)
    assert [row["id"] for row in rows] == IDS
    assert all(row["correct"] and not row["reason"] for row in rows)
    summary = summarize(TASKS, rows)
    assert {name: (group["n"], group["of"], group["correct"]) for name, group in summary["groups"].items()} == {
        "unseen_tools": (9, 9, 9),
        "unseen_values": (9, 9, 9),
        "overall": (18, 18, 18),
    }
    # Wilson, z = 1.96, 18 of 18: low = 1 / (1 + 1.96**2 / 18) = 0.8241
    assert summary["groups"]["overall"]["low"] == pytest.approx(0.8241, abs=1e-3)
    assert summary["groups"]["overall"]["high"] == 1.0
    assert log.read_rows() == rows


def test_missing_responses_are_reported_and_retried(tmp_path: Path) -> None:
    log = new_log(tmp_path / "a")
    faulty = Faulty(frozenset({IDS[2]}), frozenset({IDS[3]}), frozenset({IDS[4]}), refusals=frozenset({IDS[5]}))
    summary = summarize(TASKS, evaluate_all(TASKS, faulty, FORMAT, IDS, log))
    group = summary["groups"]["unseen_tools"]
    assert (group["n"], group["correct"], group["errors"]) == (8, 5, [IDS[2]])
    assert (group["overflow"], group["truncated"], group["refused"]) == (1, 1, 1)
    by_id = {row["id"]: row for row in log.read_rows()}
    failed = {"category": "unseen_tools", "response": "", "calls": [], "correct": None, "error": "the server fails"}
    assert by_id[IDS[2]] == {"id": IDS[2], **failed}
    assert by_id[IDS[3]]["correct"] is False
    assert by_id[IDS[3]]["overflow"] == "too long"
    assert (by_id[IDS[4]]["truncated"], by_id[IDS[4]]["correct"]) == (True, False)  # the right text, but truncated
    assert (by_id[IDS[5]]["correct"], by_id[IDS[5]]["reason"]) == (False, "refused: the template fails")
    again = EvalLog.resume(tmp_path / "a", SETTINGS)
    healthy = Faulty()
    rows = evaluate_all(TASKS, healthy, FORMAT, IDS, again)
    assert healthy.asked == [tuple(IDS[:4])]  # the whole batch of the failed sample
    assert [row["id"] for row in rows] == IDS
    assert (rows[2]["correct"], rows[3]["correct"]) == (True, False)  # an overflow is a verdict and stays


def test_user_errors_stop_without_losing_rows(tmp_path: Path) -> None:
    log, faulty = new_log(tmp_path / "a"), Faulty(fatal=frozenset({IDS[9]}))
    with pytest.raises(ValueError, match="wrong key"):
        evaluate_all(TASKS, faulty, FORMAT, IDS, log)
    assert faulty.is_stopped
    assert [row["id"] for row in log.read_rows()] == IDS[:8]
    rows = evaluate_all(TASKS, Faulty(), FORMAT, IDS, EvalLog.resume(tmp_path / "a", SETTINGS))
    assert len(rows) == len(IDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "a"
    model = Faulty(overflows=frozenset({IDS[5]}), cuts=frozenset({IDS[6]}))
    evaluate_all(TASKS, model, FORMAT, IDS, new_log(folder))
    return folder


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1))
def test_resume_after_a_cut_at_any_byte_gives_the_same_result(whole: Path, share: float) -> None:
    content = (whole / SAMPLES).read_bytes()
    torn = whole.parent / "torn"
    shutil.rmtree(torn, ignore_errors=True)
    shutil.copytree(whole, torn)
    (torn / SAMPLES).write_bytes(content[: int(share * len(content))])
    model = Faulty(overflows=frozenset({IDS[5]}), cuts=frozenset({IDS[6]}))
    evaluate_all(TASKS, model, FORMAT, IDS, EvalLog.resume(torn, SETTINGS))
    assert (torn / SAMPLES).read_bytes() == content


def test_a_damaged_line_costs_only_its_sample(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "a")
    lines = (whole / SAMPLES).read_bytes().split(b"\n")
    (tmp_path / "a" / SAMPLES).write_bytes(b"\n".join([lines[0], lines[1][:30], b"[1]", *lines[2:]]))
    model = Faulty(overflows=frozenset({IDS[5]}), cuts=frozenset({IDS[6]}))
    log = EvalLog.resume(tmp_path / "a", SETTINGS)
    assert len(log.read_rows()) == len(IDS) - 1
    evaluate_all(TASKS, model, FORMAT, IDS, log)
    assert model.asked == [tuple(IDS[:4])]
    assert (tmp_path / "a" / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()


def test_threads_write_every_row_once(tmp_path: Path) -> None:
    log, told = new_log(tmp_path / "a"), []
    rows = evaluate_all(
        TASKS, Faulty(batch_size=1, concurrency=8), FORMAT, IDS, log, lambda row: told.append(row["id"])
    )
    assert sorted(told) == sorted(IDS)
    assert [row["id"] for row in rows] == IDS


def test_other_settings_are_refused(tmp_path: Path) -> None:
    new_log(tmp_path / "a")
    with pytest.raises(ValueError, match="a different model than"):
        EvalLog.resume(tmp_path / "a", {"model": "y"})
    with pytest.raises(ValueError, match="already contains an evaluation"):
        EvalLog.new(tmp_path / "a")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / SAMPLES).write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="already contains an evaluation"):
        EvalLog.new(tmp_path / "c")  # rows without settings
    with pytest.raises(ValueError, match="contains no evaluation"):
        EvalLog.resume(tmp_path / "b", SETTINGS)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write to the evaluation folder"):
        EvalLog(tmp_path / "file").begin(SETTINGS, [])


def test_batches_keep_the_order() -> None:
    assert split_batches(["a", "b", "c"], 2) == [["a", "b"], ["c"]]
    assert split_batches([], 2) == []


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_recorded_responses_are_scored_unchanged(tmp_path: Path) -> None:
    gold = {identity: FORMAT.render(None, s.gold.calls, s.gold.answer) for identity, s in TASKS.samples.items()}
    rows = [
        {"id": IDS[0], "response": gold[IDS[0]]},
        {"id": IDS[1], "response": "nothing"},
        {"id": "x", "response": ""},
    ]
    responses, unknown_ids = read_responses(write(tmp_path / "r.jsonl", *rows), TASKS.groups)
    assert unknown_ids == ["x"]
    scored = evaluate_all(TASKS, Recorded(responses), FORMAT, IDS[:2], new_log(tmp_path / "a"))
    assert [row["correct"] for row in scored] == [True, False]
    assert scored[1]["response"] == "nothing"


def test_a_shared_id_assigns_the_second_response_to_the_second_sample(tmp_path: Path) -> None:
    rows = [{"id": "a", "response": "first"}, {"id": "a", "response": "second"}]
    responses, _ = read_responses(write(tmp_path / "r.jsonl", *rows), {"a": 1, "a#2": 1})
    assert {identity: recording.texts for identity, recording in responses.items()} == {"a": "first", "a#2": "second"}


def test_samples_jsonl_is_accepted_as_responses(whole: Path) -> None:
    responses, unknown_ids = read_responses(str(whole / SAMPLES), TASKS.groups)
    assert list(responses) == IDS
    assert unknown_ids == []
    log = EvalLog.new(whole.parent / "again")
    log.begin(SETTINGS, [])
    rows = evaluate_all(TASKS, Recorded(responses), FORMAT, IDS, log)
    before = EvalLog(whole).read_rows()
    assert [row["correct"] for row in rows] == [row["correct"] for row in before]
    assert rows[5]["overflow"] == before[5]["overflow"]


def test_calls_parsed_by_a_server_are_replayed(tmp_path: Path) -> None:
    class Native(Faulty):
        def reply(self, request: Request) -> Reply:
            return Reply(text="", calls=request.sample.gold.calls)

    first = evaluate_all(TASKS, Native(), FORMAT, IDS, new_log(tmp_path / "a"))
    kinds = [row["kind"] for row in first]
    assert [row["correct"] for row in first] == [kind != "none" for kind in kinds]
    assert all(row["native"] for row in first)
    responses, _ = read_responses(str(tmp_path / "a" / SAMPLES), TASKS.groups)
    again = evaluate_all(TASKS, Recorded(responses), FORMAT, IDS, new_log(tmp_path / "b"))
    assert [(row["correct"], row["calls"]) for row in again] == [(row["correct"], row["calls"]) for row in first]


def test_recordings_are_indexed_by_turn_and_step() -> None:
    model = Recorded({"m": Recording([["a", "b"], ["c"]]), "s": Recording("text")})
    sample = TASKS.samples[IDS[0]]

    def said(identity: str, turn: int, step: int) -> str:
        from dataclasses import replace

        return model.respond([Request(replace(sample, id=identity), turn, step)])[0].text

    assert [said("m", 0, 0), said("m", 0, 1), said("m", 0, 2), said("m", 1, 0), said("m", 2, 0)] == [
        "a",
        "b",
        "",
        "c",
        "",
    ]
    assert [said("s", 0, 0), said("s", 0, 1)] == ["text", ""]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"id": 3, "response": "a"}], "line 1: 'id' is of type int"),
        ([{"id": IDS[0], "response": 3}], "response has type int"),
        ([{"id": IDS[0], "response": [["a"], "b"]}], "response has type list"),
        ([{"id": IDS[0]}], "response has type NoneType"),
        ([{"id": IDS[0], "response": "", "native": True, "calls": [{"name": "x"}]}], "line 1: calls has type list"),
        ([{"id": IDS[0], "response": "", "native": True, "calls": "abc"}], "calls has type str"),
        ([{"id": IDS[0], "response": [[""]], "native": True, "calls": [["x"]]}], "calls has type list"),
        ([{"id": IDS[0], "response": ""}, {"id": IDS[0], "response": ""}], "line 2: .* occurs twice"),
        ([{"id": "nobody", "response": ""}], "none of the responses in .* belongs to a selected sample"),
        ([], "none of the responses"),
    ],
)
def test_invalid_responses_are_reported(tmp_path: Path, rows: list[object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_responses(write(tmp_path / "r.jsonl", *rows), TASKS.groups)


def test_the_office_is_the_same_benchmark_with_its_own_splits() -> None:
    tasks = WorldTasks("office", seed=1, prompts=4)
    assert (tasks.name, tasks.pin) == ("office", "office (seed 1, 4 prompts per split)")
    assert list(dict.fromkeys(tasks.groups.values())) == ["unseen_tools", "unseen_phrasings", "unseen_values"]
    assert len(tasks.samples) == 12


def test_the_pin_names_the_decision_of_the_tool_world() -> None:
    tasks = WorldTasks(seed=1, prompts=4, decision="call")
    assert tasks.pin == "tool world (seed 1, 4 prompts per split, decided in the call)"
    assert [sample.gold for sample in tasks.samples.values()] == [
        sample.gold
        for split in ("unseen_tools", "unseen_values")
        for sample in tool_world(1, 4, split, decision="call")
    ]

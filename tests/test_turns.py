"""Turns that call and turns that answer: cut-off responses, the worth of an answer, figures told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.cli.app import main
from rest_rl.compare import run as compare_run
from rest_rl.compare.collect import collect
from rest_rl.compare.statistics import mean_interval
from rest_rl.config import RunConfig
from rest_rl.data.check import warn_about_answers
from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample
from rest_rl.evaluate.held_out import HeldOutPrompt, score_responses
from rest_rl.formats import FORMATS
from rest_rl.formats.detect import is_json_call
from rest_rl.presets import PRESETS, score_response
from rest_rl.probe.sample import Sampling, tag_and_score
from rest_rl.report.html import build_page_data
from rest_rl.report.page import write_report
from rest_rl.report.tables import before_after_rows, evaluation_curve, headline_key, headline_turn
from rest_rl.response import Gold, ToolCall
from rest_rl.rewards import RewardConfig, apply_reward, judge, token_overlap
from rest_rl.runlog import RunLog, read_run
from rest_rl.statistics import summarize
from rest_rl.train.reward import make_tool_reward
from rest_rl.train.run import make_plan
from tests.made_up_grid import Effect, make_grid
from tests.sample_files import save_samples
from tests.test_cli import RUN
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

CALL = '<think> a</think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
ANSWER = "<think> a</think>\n<response> ok ok</response>"
CALL_GOLD, ANSWER_GOLD = Gold((ToolCall("f", {"x": 1}),)), Gold((), "The capital is Paris.")


def answer_sample(number: int) -> ToolSample:
    return replace(tiny_samples(1)[0], id=f"a{number}", gold=Gold((), "ok"), messages=(user(f"say {number}"),))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# A response that was cut off


@pytest.mark.parametrize(("text", "gold", "worth"), [(CALL, CALL_GOLD, 0.5), (ANSWER, ANSWER_GOLD, 0.0)])
def test_a_cut_off_response_is_never_exact_and_has_no_format_score(text: str, gold: Gold, worth: float) -> None:
    """At progress 0 the calls that it made are worth their share of 0.5, half an answer nothing."""
    whole, cut = judge(text, gold), judge(text, gold, truncated=True)
    assert (whole.exact_match, whole.format, whole.explanation) == (True, 1.0, ())
    assert (cut.exact_match, cut.format, cut.accuracy) == (False, 0.0, whole.accuracy)
    assert [(found.kind, found.cost) for found in cut.explanation] == [("format", 1.0)]
    assert score_response(text, gold, truncated=True).total == pytest.approx(worth)
    # the published code reads the text only
    assert score_response(text, gold, preset="authors-code", truncated=True) == score_response(
        text, gold, preset="authors-code"
    )


def test_training_detects_cut_off_responses_by_their_last_id_and_separates_turns() -> None:
    tokenizer = tiny_tokenizer()
    call, answer = (tokenizer(text)["input_ids"] for text in (CALL, ANSWER))
    ids = [[*call, tokenizer.eos_token_id], call, [*answer, tokenizer.pad_token_id], answer, [*call, 7]]
    golds = [{"calls": [{"name": "f", "arguments": {"x": 1}}]}] * 2 + [{"calls": [], "answer": "yes"}] * 2
    golds = [*map(json.dumps, golds), json.dumps({"calls": [], "answer": "yes"})]
    logged: dict[str, list[float]] = {}

    def log(name: str, value: float) -> None:
        logged.setdefault(name, []).append(value)

    state = SimpleNamespace(global_step=0, max_steps=3)
    reward = make_tool_reward(tokenizer, "toolrl", "rest")
    totals = reward(completion_ids=ids, gold=golds, trainer_state=state, log_metric=log)
    assert totals == pytest.approx([1.0, 0.5, 1.0, 0.0, 0.0])
    assert logged["rest/exact_match"] == [2 / 5]
    assert (logged["rest/exact_match_calls"], logged["rest/exact_match_answers"]) == ([1, 0], [1, 0, 0])
    assert (logged["rest/accuracy_calls"], logged["rest/accuracy_answers"]) == ([1, 1], [1, 1, 0])
    assert logged["rest/reward_calls"] == totals[:2]
    assert logged["rest/reward_answers"] == totals[2:]
    # a model may have ends that its tokenizer does not know
    own = make_tool_reward(tokenizer, "toolrl", "rest", ends=[call[-1]])
    assert own(completion_ids=ids[:2], gold=golds[:2]) == pytest.approx([0.5, 1.0])


def test_held_out_evaluation_and_the_probe_detect_cut_off_responses() -> None:
    tokenizer = tiny_tokenizer()
    layout, ends = PromptLayout(tokenizer, "toolrl"), [tokenizer.eos_token_id]
    call, answer = (tokenizer(text)["input_ids"] for text in (CALL, ANSWER))
    samples = (*tiny_samples(2), answer_sample(0), answer_sample(1))
    prompts = [HeldOutPrompt("", sample, "held out", limit=99) for sample in samples]
    ids = [[*call, *ends], call, [*answer, *ends], answer]
    outcomes = score_responses(ids, prompts, tokenizer, FORMATS["toolrl"], ends)
    assert [(row.exact_match, row.s_format) for row in outcomes] == [(1, 1), (0, 0), (1, 1), (0, 0)]
    summary = summarize(outcomes)
    assert (summary["exact_match"], summary["n"]) == (0.5, 4)
    assert [(summary[turn]["exact_match"], summary[turn]["n"]) for turn in ("calls", "answers")] == [(0.5, 2)] * 2
    assert summarize(outcomes[:2])["answers"] == {"n": 0}
    for own, exact in zip(ids, (True, False, True, False), strict=True):
        gold = CALL_GOLD if own[: len(call)] == call else Gold((), "ok")
        assert tag_and_score(own, gold, layout, Sampling(), ends).is_exact is exact


CALL_IN_JSON = '{"name": "find", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    "text",
    [
        CALL_IN_JSON,
        f"```json\n{CALL_IN_JSON}\n```",
        f"I look it up:\n\n```\n[{CALL_IN_JSON}]\n```\nDone.",
        f"```json{CALL_IN_JSON}",
        f'```json\n{{"name": "Oslo"}}\n```\n```json\n{CALL_IN_JSON}\n```',
        CALL_IN_JSON.replace("arguments", "parameters"),
    ],
)
def test_a_call_written_as_json_text_is_recognized(text: str) -> None:
    assert is_json_call(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It rains in Oslo.",
        '{"name": "Oslo", "population": 700000}',
        '```json\n{"name": 3, "arguments": {}}\n```',
        '{"name": "find", "arguments": "Oslo"}',
        '{"name": "find", "arguments": {"city": ',
        "{" * 100_000,
        '{"a":' * 100_000,
        "```json\n" * 20_000,
        "a" * 100_000,
        f"a{' ' * 100_000}[{' ' * 100_000}.",
    ],
)
def test_other_text_is_no_call_as_json(text: str) -> None:
    assert not is_json_call(text)


def test_the_evaluation_counts_calls_that_the_format_does_not_read() -> None:
    tokenizer = tiny_tokenizer()
    ends = [tokenizer.eos_token_id]
    prompts = [
        HeldOutPrompt("", sample, "held out", 99) for sample in (*tiny_samples(1), *map(answer_sample, range(3)))
    ]
    call = FORMATS["hermes"].render(None, (ToolCall("find", {"city": "Oslo"}),), None)
    texts = [CALL_IN_JSON, f"```json\n{CALL_IN_JSON}\n```", "It rains.", call]
    ids = [[*tokenizer(text)["input_ids"], *ends] for text in texts]
    scores = summarize(score_responses(ids, prompts, tokenizer, FORMATS["hermes"], ends))
    assert (scores["calls"]["unread_calls"], scores["calls"]["exact_match"]) == (1, 0)
    assert (scores["answers"]["unread_calls"], scores["answers"]["exact_match"]) == (1 / 3, 2 / 3)
    (shown,) = (row for row in before_after_rows({"after": {**scores, "greedy": {}}}) if "unread" in row[0])
    assert shown == ("  unread calls", "", "– → 33.3", "", "", "")


def test_scored_rows_and_recorded_responses_can_be_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold = {"calls": [], "answer": "The capital is Paris."}
    rows = [{"response": "asdf", "gold": gold}, {"response": "asdf", "gold": gold, "truncated": True}]
    rows.append({"response": "asdf", "gold": gold, "truncated": "yes"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(path), "--format", "hermes"]) == 0
    whole, cut, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert (whole["reward"], cut["reward"], cut["format"], cut["accuracy"]) == (1, 0, 0, 0)
    assert "truncated" in bad["error"]


def test_the_tool_world_separates_turns_and_counts_no_cut_off_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "tool-world", "--prompts", "10"]
    assert main([*arguments, "--oracle", "--format", "hermes", "--out", "a"]) == 0
    rows = [json.loads(line) for line in Path("a/samples.jsonl").read_text().splitlines()]
    answers = [row for row in rows if row["turn"] == "answers"]
    assert 0 < len(answers) < len(rows) == 20
    answers[0]["truncated"] = True
    Path("cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*arguments, "--responses", "cut.jsonl", "--format", "hermes", "--out", "b"]) == 0
    turns = json.loads(Path("b/summary.json").read_text())["turns"]
    assert (turns["calls"]["accuracy"], turns["calls"]["n"]) == (1, len(rows) - len(answers))
    assert (turns["answers"]["correct"], turns["answers"]["n"]) == (len(answers) - 1, len(answers))
    assert main(["eval", "diff", "a", "b", "--out", "c"]) == 0
    (changes,) = json.loads(Path("c/comparison.json").read_text())["metrics"].values()
    assert {row["group"]: row["lost"] for row in changes if row["group"] in ("calls", "answers", "all")} == {
        "calls": 0,
        "answers": 1,
        "all": 1,
    }


# What an answer is worth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The capital is Paris.", 1),
        ("the CAPITAL is paris", 1),
        ("It is Paris", 2 * 2 / (3 + 4)),  # is, paris of three and of four words
        ("Paris Paris", 2 * 1 / (2 + 4)),  # as often as gold has it
        ("asdf qwer", 0),
        ("", 0),
    ],
)
def test_overlap_by_hand(text: str, expected: float) -> None:
    assert token_overlap(text, "The capital is Paris.") == pytest.approx(expected)


@given(st.text(), st.text())
def test_overlap_is_symmetric_and_in_0_to_1(one: str, other: str) -> None:
    assert 0 <= token_overlap(one, other) == token_overlap(other, one) <= 1
    assert token_overlap(one, one) == 1


def test_an_answers_reward_is_presence_overlap_or_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answer_rules.py").write_text(
        "def length(text, gold):\n    return len(gold.answer) / 100\ndef far(text, gold):\n    return 2\n"
        "def one(text):\n    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    answer = judge("It is Paris", ANSWER_GOLD, "hermes")

    def reward(name: str, judgement: object = answer, progress: float = 0.0) -> float:
        return apply_reward(RewardConfig(answer=name), judgement, progress).total  # type: ignore[arg-type]

    assert reward("presence") == 1
    assert reward("overlap") == pytest.approx(0.5 + 0.5 * 4 / 7)
    assert reward("overlap", progress=1.0) == pytest.approx(0.25 + 0.75 * 4 / 7)
    assert reward("answer_rules:length") == pytest.approx(0.5 + 0.5 * 0.21)
    # the explanation adds up, and exact match stays what it is: answered, complete, no call
    found = RewardConfig(answer="overlap")(answer, 0.0)
    assert 1 - found.accuracy == pytest.approx(sum(each.cost for each in found.explanation if each.kind == "answer"))
    assert answer.exact_match
    # call turns, needless calls and turns without a gold answer know nothing of it
    for text, gold in ((CALL, CALL_GOLD), (CALL, ANSWER_GOLD), ("<think>a</think>", Gold())):
        judgement = judge(text, gold)
        assert reward("overlap", judgement) == reward("presence", judgement)
    for name in ("nonsense", "answer_rules:none", "answer_rules:one"):
        with pytest.raises(ValueError, match=name):
            RewardConfig(answer=name)
    with pytest.raises(ValueError, match=r"a number in \[0, 1\]"):
        reward("answer_rules:far")


def test_an_answers_reward_is_a_key_of_the_run_file() -> None:
    config = RunConfig.from_toml("", ["rest.reward.answer=overlap"])
    assert config.rest.resolve().reward == replace(PRESETS["rest"].reward, answer="overlap")
    again = RunConfig.from_toml(config.to_toml())
    assert again.rest.resolve() == config.rest.resolve()
    with pytest.raises(ValueError, match="unknown key"):
        RunConfig.from_toml("", ["rest.preset=authors-code", "rest.reward.answer=overlap"]).rest.resolve()


# Figures over call turns and over answer turns


def means_of(exact: float, n: int = 10) -> dict[str, float]:
    return {"exact_match": exact, "s_acc": exact, "s_format": 1.0, "exact_match_error": 0.0, "n": n}


def told_apart(calls: float, answers: float, kinds: tuple[str, ...] = ("dialogue",)) -> dict[str, object]:
    whole = means_of((calls + answers) / 2, 20)
    scores = {**whole, "calls": means_of(calls), "answers": means_of(answers), "splits": {"held out": whole}}
    scores["kinds"] = dict.fromkeys(kinds, whole)
    return {**scores, "greedy": dict(scores)}


def test_the_table_has_call_turns_first_and_a_single_kind_once() -> None:
    rows = before_after_rows({"before": told_apart(0.2, 0.8), "after": told_apart(0.4, 1.0)})
    names, figures = [row[0] for row in rows], [row[2] for row in rows]
    turns = ["  answers", "  all turns"]
    assert names == ["greedy, calls", *turns, "T = 1, calls", *turns]
    assert figures == ["20.0 → 40.0", "80.0 → 100.0", "50.0 → 70.0"] * 2
    several = before_after_rows({"before": told_apart(0.2, 0.8, ("one", "two"))})
    assert [row[0] for row in several][3:5] == ["  one", "  two"]
    # Old runs have no turns, nor has one side of a run resumed from them: call turns are never compared with all turns.
    old = {**means_of(0.5, 20), "greedy": means_of(0.6, 20)}
    for summary in ({"before": old, "after": old}, {"before": old, "after": told_apart(0.4, 1.0)}):
        assert [row[0] for row in before_after_rows(summary)] == ["greedy", "sampled, T = 1"]
    only_calls = {**means_of(0.5), "calls": means_of(0.5), "answers": {"n": 0}}
    assert headline_turn([only_calls]) is None
    assert headline_turn([only_calls, told_apart(0.4, 1.0), None]) == "calls"
    assert headline_turn([old, told_apart(0.4, 1.0)]) is None


def make_run(folder: Path, *, is_old: bool = False) -> Path:
    log = RunLog.create(
        folder, RunConfig.from_toml("", ["rest.format=toolrl", f"run.seed={int(is_old)}"]).to_toml(), []
    )
    for step in (1, 2):
        row = {"rest/exact_match": 0.5, "rest/exact_match_calls": 0.1 * step, "rest/exact_match_answers": 0.9}
        log.add_metrics({"step": step, "reward": 0.5, **({"rest/exact_match": 0.5} if is_old else row)})
        scores = means_of(0.5, 20) if is_old else told_apart(0.1 * step, 0.9)
        log.add_evaluation({"step": step, "greedy": means_of(0.5), **scores})
    response = {"response": "asdf", "gold": {"calls": [], "answer": "yes"}, "truncated": True}
    log.add_responses([{"step": 1, "reward": 1.0, **response}])
    before, after = (means_of(0.5, 20),) * 2 if is_old else (told_apart(0.1, 0.9), told_apart(0.2, 0.9))
    log.update_summary(before=before, after=after)
    return folder


def test_a_report_covers_call_turns_unless_a_run_does_not_separate_them(tmp_path: Path) -> None:
    new, old = make_run(tmp_path / "new"), make_run(tmp_path / "old", is_old=True)
    run, other = read_run(new), read_run(old)
    assert headline_key([run], "rest/exact_match") == "rest/exact_match_calls"
    assert headline_key([run, other], "rest/exact_match") == "rest/exact_match"
    assert evaluation_curve([run], "calls", greedy=False).mean == [0.1, 0.2]
    assert "10.0 → 20.0" in write_report([new]).read_text()
    text = write_report([old]).read_text()
    assert "| sampled, T = 1 | 20 | 50.0 → 50.0 |" in text
    assert "0.500 → 0.500" in write_report([new, old], tmp_path / "both").read_text()
    data, _ = build_page_data([run])
    assert (data["turns"], data["runs"][0]["after"]["exact_match"]) == ("call turns", 0.2)
    assert data["runs"][0]["answers"]["exact_match"] == 0.9
    assert {"truncated", "format"} <= set(data["responses"][0]["k"])
    assert "exact" not in data["responses"][0]["k"]
    mixed, _ = build_page_data([run, other])
    assert [row["after"]["exact_match"] for row in mixed["runs"]] == [0.55, 0.5]


def tell_apart(folder: Path) -> None:
    """Give the runs of a made-up grid the figures of call turns (20 points lower) and answer turns (1)."""
    for place in (folder / "runs").iterdir():
        summary = json.loads((place / "summary.json").read_text())
        for when in ("before", "after"):
            scores = summary[when]
            for own in (scores, scores["greedy"], scores["low_temperature"]):
                own["calls"] = {"exact_match": own["exact_match"] - 0.2, "n": 80}
                own["answers"] = {"exact_match": 1.0, "n": 20}
        (place / "summary.json").write_text(json.dumps(summary))


def test_a_comparison_covers_call_turns_and_never_mixes(tmp_path: Path) -> None:
    grid = make_grid(tmp_path, {"grpo": Effect(), "rest": Effect(0.05)}, seeds=3)
    assert collect(tmp_path, grid, "grpo").primary == "exact_greedy"
    tell_apart(tmp_path)
    report = compare_run.compare(out=tmp_path, only_report=True)
    assert report.primary == "exact_greedy_calls"
    line = report.line("rest")
    assert line is not None
    assert line.metrics["exact_calls"].mean.value == pytest.approx(line.metrics["exact"].mean.value - 0.2)
    assert line.metrics["exact_answers"].mean.value == 1
    assert report.page is not None
    text = report.page.read_text()
    assert "## Call turns and answer turns" in text
    assert "exact match, call turns" in text.split("## After training")[1].split("\n## ")[0]
    # one run that cannot tell: every figure of the verdict is over all turns again
    place = tmp_path / "runs" / "grpo-0" / "summary.json"
    summary = json.loads(place.read_text())
    for when in ("before", "after"):
        for scores in (summary[when], summary[when]["greedy"]):
            del scores["calls"], scores["answers"]
    place.write_text(json.dumps(summary))
    mixed = compare_run.compare(out=tmp_path, only_report=True)
    assert mixed.primary == "exact_greedy"
    assert mixed.page is not None
    assert "## Call turns and answer turns" not in mixed.page.read_text()


def test_the_interval_of_a_share_stays_within_0_and_1() -> None:
    # mean 0.694, s = 0.1369: Student's would be 0.694 ± 0.340
    values = [0.55, 0.71, 0.822]
    assert mean_interval(values).high > 1
    assert mean_interval(values, (0.0, 1.0)).high == 1
    assert mean_interval(values, (0.0, 1.0)).low == mean_interval(values).low
    assert mean_interval([0.0, 0.1], (0.0, 1.0)).low == 0


# The mix of the data, and training on call turns only


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    samples = [*tiny_samples(8), *(answer_sample(number) for number in range(8))]
    data = save_samples(samples, folder / "d.train.jsonl")
    held_out = [*tiny_samples(10)[8:], answer_sample(8), answer_sample(9)]
    save_samples(held_out, folder / "d.test.jsonl")
    text = RUN.format(model=folder / "policy", data=data, steps=2)
    (folder / "run.toml").write_text(text.replace(f'held_out = "{data}"\n', ""))
    return folder / "run.toml"


@pytest.mark.parametrize("preset", ["rest", "sft"])
def test_data_turns_trains_on_call_turns_and_evaluates_all(run_file: Path, preset: str) -> None:
    held_out = f"data.held_out={run_file.parent / 'd.test.jsonl'}"
    plan = make_plan(run_file, overrides=[f"rest.preset={preset}", held_out, "data.turns=calls"], is_dry=True)
    assert {sample.gold.turn for sample in plan.data.samples} == {"calls"}
    assert len(plan.data.samples) == 8
    assert [each.sample.gold.turn for _, each in plan.data.held_out] == ["calls", "calls", "answers", "answers"]
    assert plan.data.report["turns"] == {"calls": 8, "answers": 8}
    with pytest.raises(ValueError, match=r"data\.turns"):
        make_plan(run_file, overrides=["data.turns=answers"], is_dry=True)
    whole = make_plan(None, overrides=["data.num_samples=50"], is_dry=True).data.samples
    calls = make_plan(None, overrides=["data.num_samples=50", "data.turns=calls"], is_dry=True).data.samples
    assert [sample for sample in whole if sample.gold.calls] == calls
    assert len(calls) < len(whole)


def test_the_mix_is_printed_with_a_warning_about_many_answers(
    run_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert warn_about_answers({"calls": 7, "answers": 3}) is None
    assert warn_about_answers({"calls": 69, "answers": 31}) is not None
    assert warn_about_answers({"calls": 0, "answers": 0}) is None
    data = str(run_file.parent / "d.train.jsonl")
    assert main(["data", "check", data]) == 0
    assert "8 call turns, 8 answer turns (50%)" in (out := capsys.readouterr().out)
    assert "warning: " in out
    assert main(["data", "check", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["turns"] == {"calls": 8, "answers": 8}
    assert main(["train", str(run_file), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8 call turns, 8 answer turns (50%)" in out
    assert "warning: 50%" in out
    for override in ("rest.reward.answer=overlap", "data.turns=calls", "rest.preset=sft"):
        assert main(["train", str(run_file), "--dry-run", "--set", override]) == 0
        assert "warning: 50%" not in capsys.readouterr().out, override


def test_held_out_is_an_option_and_the_other_part_of_a_split_is_suggested(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = str(run_file.parent / "d.test.jsonl")
    assert main(["train", str(run_file), "--dry-run"]) == 0
    assert f"--held-out {test}" in " ".join(capsys.readouterr().out.split())
    arguments = ["train", str(run_file), "--held-out", test, "--set", "eval.every=1", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "--held-out" not in out
    assert "(2 held-out call turns); " in " ".join(out.split())
    run = read_run(tmp_path / "run")
    assert RunConfig.from_toml(run.config).data.held_out == test
    for scores in (run.summary["before"], run.summary["after"], *run.evaluations):
        assert [scores[turn]["n"] for turn in ("calls", "answers")] == [2, 2]
    assert any({"rest/exact_match_calls", "rest/reward_answers"} <= row.keys() for row in run.metrics)
    model = ["sft", "--model", str(run_file.parent / "policy"), "--data", str(run_file.parent / "d.train.jsonl")]
    assert main([*model, "--held-out", test, "--set", "eval.max_new_tokens=20", "--dry-run"]) == 0
    assert "held out: " in capsys.readouterr().out

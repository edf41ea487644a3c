"""The commands score, inspect and presets; every bad row is one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rest_rl.cli.app import main
from rest_rl.config import RunConfig
from rest_rl.presets import PRESETS, SUPERVISED
from rest_rl.train.trl.settings import make_trainer_config
from tests.test_cli import GOLD, RIGHT, error_of, lines
from tests.tiny_policy import tiny_tokenizer


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_tokenizer().save_pretrained(folder)
    return folder


# score


def score(capsys: pytest.CaptureFixture[str], path: Path, rows: list[object], *options: str) -> list[dict]:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text + "\n")
    assert main(["score", str(path), *options]) == 0
    return lines(capsys.readouterr().out)


def test_score_gives_one_line_per_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = RIGHT.replace('"x": 1', '"x": 2')
    rows = [{"response": text, "gold": GOLD} for text in (RIGHT, wrong, "nothing")]
    scored = score(capsys, tmp_path / "rows.jsonl", rows)
    assert scored[0]["accuracy"] == 1.0
    assert scored[0]["reward"] == 1.0
    assert scored[0]["explanation"] == []
    # names 1, keys 1, values 0 of 1 + 1 + 1 points
    assert scored[1]["accuracy"] == pytest.approx(2 / 3)
    assert scored[1]["explanation"][0]["kind"] == "value"
    assert scored[2]["reward"] == 0.0


def test_score_follows_progress_and_the_rows_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"response": RIGHT.replace('"x": 1', '"x": 2'), "gold": GOLD}
    early, late = (
        score(capsys, tmp_path / "rows.jsonl", [row], "--progress", progress)[0]["reward"] for progress in ("0", "1")
    )
    # accuracy 2/3 with share 0.5 at first and 0.75 at last, format 1 with the rest
    assert early == pytest.approx(2 / 3 * 0.5 + 0.5)
    assert late == pytest.approx(2 / 3 * 0.75 + 0.25)
    assert score(capsys, tmp_path / "rows.jsonl", [{**row, "step": 150}])[0]["reward"] == pytest.approx(late)


def test_score_of_the_published_code_counts_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"response": RIGHT, "gold": GOLD, "step": step} for step in (0, 75, 150)]
    scored = score(capsys, tmp_path / "rows.jsonl", rows, "--preset", "authors-code")
    # format 2 - step/150, correctness 2 + step/150: 4 throughout
    assert [(row["format"], row["accuracy"]) for row in scored] == [(2.0, 2.0), (1.5, 2.5), (1.0, 3.0)]


HERMES = RIGHT.replace("parameters", "arguments")
TEXT = "It rains."
OPENED = HERMES.removeprefix("<think>")


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ([HERMES, HERMES.partition("</think>\n")[2]], "hermes"),
        ([RIGHT, TEXT], "toolrl"),
        ([RIGHT, HERMES, HERMES], "hermes"),
        ([RIGHT, HERMES], "toolrl"),  # a tie in every count: the first of FORMATS
        (['[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', TEXT], "mistral"),
        ([OPENED, OPENED], "hermes+think"),
        ([HERMES.replace("}}", "}")], "toolrl"),  # nothing is read, and both see an attempt
        ([TEXT], "hermes"),
        ([f"<think> a </think>\n{TEXT}"], "hermes"),
        ([f"<think> a </think>\n<response> {TEXT} </response>"], "toolrl"),
        ([], "toolrl"),
    ],
)
def test_score_reads_rows_in_the_format_that_reads_most_calls(
    responses: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"response": text, "gold": GOLD}) + "\n" for text in [*responses, 3]))
    assert main(["score", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"format {expected}: ")
    assert err.count("\n") == 1
    assert len(lines(out)) == len(responses) + 1


def test_a_format_that_reads_fewer_calls_is_kept_and_another_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"response": HERMES, "gold": GOLD}) + "\n")
    for verb in (["score", str(path)], ["inspect", str(path), "--tokenizer", str(policy)]):
        assert main([*verb, "--format", "toolrl"]) == 0
        assert "--format hermes" in capsys.readouterr().err
        assert main([*verb, "--format", "hermes"]) == 0
        assert capsys.readouterr().err == "format hermes: as specified\n"


BAD_ROWS = [
    "{",
    "3",
    "[" * 100_000,
    {"response": RIGHT},
    {"gold": GOLD},
    {"response": 3, "gold": GOLD},
    {"response": RIGHT, "gold": {"calls": "f"}},
    {"response": RIGHT, "gold": {"calls": [{"name": "f"}]}},
    {"response": RIGHT, "gold": {"calls": [], "answer": 3}},
    {"response": RIGHT, "gold": GOLD, "step": "late"},
    {"response": RIGHT, "gold": GOLD, "step": -1},
    {"response": RIGHT, "gold": GOLD, "step": True},
]


def test_score_turns_bad_rows_into_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"response": "\ud800 \u2028" + RIGHT, "gold": GOLD}
    scored = score(capsys, tmp_path / "rows.jsonl", [*BAD_ROWS, good])
    assert [row["row"] for row in scored[:-1]] == list(range(1, len(BAD_ROWS) + 1))
    assert all(row["error"] for row in scored[:-1])
    assert scored[-1]["accuracy"] == 1.0


def test_score_reads_invalid_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"response": "\xff"}\n\n')
    assert main(["score", str(tmp_path / "rows.jsonl")]) == 0
    assert lines(capsys.readouterr().out)[0]["row"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "best"], "preset 'best'"),
        (["--format", "xml"], "format 'xml'"),
        (["--progress", "2"], "--progress is 2.0, expected a number"),
        ([], "nowhere.jsonl (No such file or directory)"),
    ],
)
def test_score_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, "score", "nowhere.jsonl", *options)


# inspect, presets, report


def test_inspect_gives_every_token_region_and_weight(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '<think> a</think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
    ids = tiny_tokenizer()(text)["input_ids"]
    rows = [{"response": text}, {"response": "ignored", "ids": ids}, {"ids": [10**9]}, {"ids": "x"}, {"ids": []}]
    end = tiny_tokenizer().eos_token_id
    rows += [{"ids": [end]}, {"response": "\ud800"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["inspect", str(tmp_path / "rows.jsonl"), "--tokenizer", str(policy), "--progress", "0"]
    assert main([*arguments, "--entropies", '{"name": 0.1, "reasoning": 2.0}', "--json"]) == 0
    by_text, by_ids, unknown, wrong, empty, ended, surrogate = lines(capsys.readouterr().out)
    assert by_text["tokens"] == by_ids["tokens"]
    assert ("truncated" in by_text, by_ids["truncated"], ended["truncated"]) == (False, True, False)
    assert [token["text"] for token in surrogate["tokens"]] == ["?"]
    assert "".join(token["text"] for token in by_text["tokens"]) == text
    weight = {token["region"]: token["weight"] for token in by_text["tokens"]}
    assert weight["name"] > weight["reasoning"]
    assert sum(token["weight"] for token in by_text["tokens"]) == pytest.approx(len(ids), rel=1e-5)
    assert ended["tokens"][-1] == {"id": end, "text": "<|im_end|>", "region": "format", "weight": 1.0}
    assert "expected ids from 0 to" in unknown["error"]
    assert wrong["row"] == 4
    assert empty == {"tokens": []}
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "mean weight" in shown
    assert '"parameters"' in shown


def test_inspect_reads_entropies_from_a_file_and_refuses_others(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"response": RIGHT}))
    (tmp_path / "entropies.json").write_text('{"name": 0.5}')
    arguments = ["inspect", str(tmp_path / "rows.jsonl"), "--tokenizer", str(policy)]
    assert main([*arguments, "--entropies", str(tmp_path / "entropies.json"), "--json"]) == 0
    capsys.readouterr()
    for wrong in ('{"nome": 1}', '{"name": -1}', "{", "nowhere.json"):
        assert "--entropies" in error_of(capsys, *arguments, "--entropies", wrong)


def test_inspect_shows_characters_that_several_tokens_share(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<think> 😀 語é </think>"
    cut = tiny_tokenizer()("<think> 😀")["input_ids"][:-1]
    rows = [{"response": text}, {"ids": cut}, {"ids": [*cut, tiny_tokenizer().eos_token_id]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["inspect", str(tmp_path / "rows.jsonl"), "--tokenizer", str(policy), "--preset", "grpo"]
    assert main([*arguments, "--json"]) == 0
    assert "\ufffd" in capsys.readouterr().out  # a token by itself has no character
    assert main(arguments) == 0
    whole, torn, ended = re.split("row [23]", capsys.readouterr().out)
    assert text in whole
    assert "\ufffd" not in whole
    assert torn.count("\ufffd") == ended.count("\ufffd") == 1
    assert "<|im_end|>" in ended


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    preset = PRESETS[name]
    assert main(["presets", name]) == 0
    config = RunConfig.from_toml(capsys.readouterr().out, ["rest.format=toolrl"])
    assert config.rest.resolve() == preset
    args = make_trainer_config(replace(config, trl={**config.trl, "use_cpu": True, "bf16": False}))
    assert (args.epsilon, args.epsilon_high or args.epsilon) == (preset.epsilon_low, preset.epsilon_high)
    assert args.method() == preset


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [*PRESETS, *SUPERVISED]
    assert max(map(len, out.splitlines())) <= 120
    for name, weights in SUPERVISED.items():
        assert main(["presets", name]) == 0
        assert RunConfig.from_toml(capsys.readouterr().out).rest.loss_weights() == weights
    assert "'best'" in error_of(capsys, "presets", "best")

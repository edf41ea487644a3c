"""The verb `data` with a model: what it can be given, how long its prompts are, and what training writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.data.layout import PromptLayout
from rest_rl.data.load import load_dataset
from rest_rl.train.prompts import IGNORED
from rest_rl.train.sft import labelled_dataset
from tests.model_families import DIALOGUES, family_tokenizer, save_dialogues
from tests.sample_files import load_samples
from tests.test_cli_data import ASKED, error_of, run
from tests.tiny_policy import tiny_tokenizer


def test_show_a_row_as_a_model_sees_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = save_dialogues(tmp_path / "rows.jsonl")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    _, out = run(capsys, "show", rows, 1, "--model", tmp_path / "policy", "--format", "toolrl")
    assert out.count("assistant:") >= 1
    counts = [
        json.loads(run(capsys, "check", rows, "--json", "--tokenizer", tmp_path / "policy", "--max-prompt", limit)[1])
        for limit in (1, 10**6)
    ]
    assert [told["reasons"].get("prompt_too_long", 0) for told in counts] == [4, 0]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The tokenizer of a family whose template takes one call at a time."""
    family_tokenizer("llama3_2").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def two_calls_at_once(path: Path) -> Path:
    """Two dialogues of three turns; the first turn of the second one makes two calls."""
    doubled = copy.deepcopy(DIALOGUES[1])
    doubled["messages"][2]["tool_calls"] *= 2
    path.write_text("".join(json.dumps(row) + "\n" for row in (DIALOGUES[0], doubled)))
    return path


def test_check_with_a_model_tells_what_it_cannot_be_given(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first turn stays: its calls are the gold, which the format can write; the later two have it as history."""
    path = two_calls_at_once(tmp_path / "rows.jsonl")
    assert json.loads(run(capsys, "check", path, "--json")[1])["samples"] == 6
    assert main(["data", "check", str(path), "--json", "--model", str(llama)]) == 0
    out, aloud = capsys.readouterr()
    told = json.loads(out)
    assert (told["samples"], told["reasons"]["not_laid_out"], told["occurrences"]["not_laid_out"]) == (4, 1, 2)
    refused = [found for found in told["findings"] if found["reason"] == "not_laid_out"]
    assert [(found["row"], found["sample"], found["severity"]) for found in refused] == [
        (2, "d1/1", "rejected"),
        (2, "d1/2", "rejected"),
    ]
    assert "chat template failed" in refused[0]["detail"]
    assert aloud.startswith("format llama3: from the chat template")
    out_file = tmp_path / "out.jsonl"
    run(capsys, "convert", path, "--out", out_file, "--model", llama)
    assert [sample.id for sample in load_samples(out_file)] == ["d0/0", "d0/1", "d0/2", "d1/0"]
    run(capsys, "split", path, "--test", 0.5, "--model", llama)
    sides = [load_samples(tmp_path / f"rows.{side}.jsonl") for side in ("train", "test")]
    assert sorted(len(side) for side in sides) == [1, 3]
    # with the format in words every call is text, so all can be laid out
    told = json.loads(run(capsys, "check", path, "--json", "--model", llama, "--format", "hermes")[1])
    assert told["samples"] == 6
    assert "expected the one that" in error_of(capsys, "check", path, "--model", llama, "--keep-prompts")


def test_show_what_supervised_training_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text that spells a number without quotes, as the family's models write it; no thought behind a closed block."""
    tokenizer: Any = family_tokenizer("qwen3_5")
    turn = {"role": "assistant", "content": "Sure.", "reasoning_content": "Hm."}
    call = {"function": {"name": "w", "arguments": {"city": "5"}}}
    tools = [{"name": "w", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASKED, {**turn, "tool_calls": [call]}], "tools": tools}))
    for thinks in (True, False):
        if not thinks:
            opened, closed = r"{{- '<think>\n' }}", r"{{- '<think>\n\n</think>\n\n' }}"
            assert opened in tokenizer.chat_template
            tokenizer.chat_template = tokenizer.chat_template.replace(opened, closed)
        tokenizer.save_pretrained(tmp_path / "model")
        layout = PromptLayout(tokenizer, "qwen3_coder+think" if thinks else "qwen3_coder")
        out = run(capsys, "show", path, 1, "--model", tmp_path / "model")[1]
        (sample,), _ = load_dataset(str(path))
        row: Any = labelled_dataset([sample], layout)[0]
        written = tokenizer.decode([token for token in row["labels"] if token != IGNORED][:-1])
        assert ("Hm." in written) == thinks
        assert "\n5\n" in written
        assert written.strip() in out.replace(layout.render(sample), "")

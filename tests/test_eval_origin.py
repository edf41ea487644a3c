"""The origin of an evaluated model: its run, its name, the digest of its weights; options without effect."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.config import EMBEDDED, ModelTable, RunConfig
from rest_rl.errors import UserError
from rest_rl.evaluate.origin import STRIDE_BYTES, compute_digest, model_label, resolve_origin, weights_digest
from rest_rl.evaluate.plan import make_plan
from rest_rl.evaluate.request import BATCH_SIZE, BFCL_BATCH_SIZE, VLLM_BATCH_SIZE, EvalRequest, option_name
from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.policy import find_hub_commit
from rest_rl.train.run import resolve_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a model (a link) and a checkpoint, and links to both elsewhere."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    text = RunConfig.from_toml('[rest]\nformat = "hermes"').to_toml()
    (folder / "config.toml").write_text(text, encoding="utf-8")
    (folder / "model").symlink_to(embedded_model_dir())
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "five").symlink_to(folder / "checkpoints" / "checkpoint-5")
    (tmp_path / "links" / "whole").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    ("here", "path", "weights", "label"),
    [
        (".", "runs/mine", "runs/mine/model", "mine"),
        (".", "runs/mine/", "runs/mine/model", "mine"),
        (".", "runs/mine/model", "runs/mine/model", "mine"),
        (".", "runs/mine/checkpoints/checkpoint-5", "runs/mine/checkpoints/checkpoint-5", "mine-checkpoint-5"),
        (".", "links/five", "links/five", "mine-checkpoint-5"),
        (".", "links/whole", "links/whole/model", "whole"),
        ("runs/mine", ".", "model", "mine"),
        ("runs/mine", "model", "model", "mine"),
        ("runs/mine/checkpoints", "..", "../model", "mine"),
        ("runs/mine/checkpoints", "checkpoint-5", "checkpoint-5", "mine-checkpoint-5"),
        ("runs/mine/checkpoints/checkpoint-5", ".", ".", "mine-checkpoint-5"),
        ("runs/mine/checkpoints/checkpoint-5", "../../model", "../../model", "mine"),
    ],
)
def test_a_run_is_recognized_from_any_path_to_its_model(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, here: str, path: str, weights: str, label: str
) -> None:
    monkeypatch.chdir(here)
    origin = resolve_origin(path)
    assert origin.run is not None
    assert origin.run.rest.format == "hermes"
    assert origin.path == weights
    assert origin.folder is not None
    assert os.path.realpath(origin.folder) == os.path.realpath(run_folder)
    assert model_label(path) == label


def test_models_without_a_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = run_folder.parent.parent / "plain" / "model"
    other.mkdir(parents=True)
    (other.parent / "checkpoints" / "step").mkdir(parents=True)
    for path, label in ((str(other), "model"), ("plain/checkpoints/step", "step")):
        (Path(path) / "config.json").touch()
        assert resolve_origin(path) == (path, None, None)
        assert model_label(path) == label
    assert model_label("Qwen/Qwen3-1.7B") == "Qwen3-1.7B"
    monkeypatch.chdir(other)
    assert model_label(".") == "model"
    assert model_label(EMBEDDED) == EMBEDDED
    (other.parent / "config.toml").write_text("[server]\nport = 1\n", encoding="utf-8")  # of another program
    assert resolve_origin(".").run is None


def weights(folder: Path, name: str = "model.safetensors", size: int = 2 * STRIDE_BYTES + 100_000) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def change(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(b"x")


@pytest.mark.parametrize("position", [0, STRIDE_BYTES + 5, 2 * STRIDE_BYTES + 7, 2 * STRIDE_BYTES + 99_999])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_digest_detects_changes_anywhere(tmp_path: Path, name: str, position: int) -> None:
    path = weights(tmp_path, name)
    table = ModelTable(path=str(tmp_path))
    before = weights_digest(table)
    assert weights_digest(table) == before
    change(path, position)
    assert weights_digest(table) not in (before, None)
    weights(tmp_path, name)
    assert weights_digest(table) == before
    path.rename(tmp_path / f"other-{name}")
    assert weights_digest(table) != before


def test_the_digest_of_an_adapter_covers_its_base_model(tmp_path: Path) -> None:
    base, adapter = weights(tmp_path / "base", size=100), weights(tmp_path / "adapter", "adapter_model.safetensors", 9)
    (adapter.parent / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base.parent)}))
    table = ModelTable(path=str(adapter.parent))
    digests = {weights_digest(table)}
    for path in (base, adapter):
        change(path, 3)
        digests.add(weights_digest(table))
    assert len(digests) == 3
    assert weights_digest(ModelTable(path=str(base.parent))) in str(weights_digest(table))
    assert weights_digest(ModelTable(path=EMBEDDED)) == weights_digest(ModelTable(path=str(embedded_model_dir())))


def test_a_hub_name_is_identified_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cached("who/what", tmp_path / "hub", monkeypatch)
    assert find_hub_commit("who/what") == COMMIT
    assert weights_digest(ModelTable(path="who/what")) == COMMIT
    assert find_hub_commit("who/else") is None
    assert weights_digest(ModelTable(path="who/else")) is None


def with_cached(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable hub with this model in its cache."""
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    offline(monkeypatch, cache)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_the_digest_of_responses_covers_the_whole_file(tmp_path: Path) -> None:
    path = weights(tmp_path, "r.jsonl", 3 << 20)
    before = compute_digest(path)
    change(path, (3 << 19) + 1)
    assert compute_digest(path) != before
    with pytest.raises(ValueError, match="cannot read"):
        compute_digest(tmp_path / "none")


ORACLE, SERVER = {"oracle": True}, {"endpoint": "http://h", "model": "m", "format": "hermes"}


@pytest.mark.parametrize(
    ("who", "option", "told"),
    [
        *(
            (ORACLE, option, "with --oracle, which loads no model")
            for option in ({"vllm": True}, {"batch_size": 2}, {"tokenizer": "x"})
        ),
        *(
            (ORACLE, option, "with --oracle, which loads no model")
            for option in ({"changes": ("model.dtype=float32",)}, {"context": 9})
        ),
        *(
            (ORACLE, option, "with --oracle, which loads no model")
            for option in ({"max_new_tokens": 9}, {"requests_per_minute": 9})
        ),
        (ORACLE, {"extra_body": {}}, "with --oracle, which loads no model"),
        ({"responses": "r.jsonl"}, {"vllm": True}, "with --responses, which loads no model"),
        (SERVER, {"vllm": True}, "with --endpoint"),
        (SERVER, {"batch_size": 2}, "with --endpoint"),
        ({}, {"tokenizer": "x"}, "without --endpoint"),
        ({}, {"requests_per_minute": 9}, "without --endpoint"),
        ({}, {"extra_body": {}}, "without --endpoint"),
    ],
)
def test_options_without_effect_are_refused(
    who: dict[str, Any], option: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.jsonl").write_text('{"id": "1", "response": "hello"}\n', encoding="utf-8")
    make_plan(EvalRequest("tool-world", **who))
    name = option_name(next(iter(option)))
    with pytest.raises(UserError) as caught:
        EvalRequest("tool-world", **who, **option)
    assert caught.value.problem == f"{name} has no effect {told}"


@pytest.mark.parametrize(
    ("benchmark", "options", "size"),
    [
        ("tool-world", {}, BATCH_SIZE),
        ("bfcl", {}, BATCH_SIZE),
        ("tool-world", {"vllm": True}, VLLM_BATCH_SIZE),
        ("bfcl", {"vllm": True}, BFCL_BATCH_SIZE),
        ("tool-world", {"vllm": True, "batch_size": 5}, 5),
        ("bfcl", {"vllm": True, "batch_size": 500}, 500),
    ],
)
def test_the_effective_batch_size(benchmark: str, options: dict[str, Any], size: int) -> None:
    assert EvalRequest(benchmark, "m", **options).effective_batch_size == size


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("runs/mnie", "runs/mine"),
        ("./runs/mine2", "runs/mine"),
        ("rnus/mine/model", "runs"),
        ("/no/where", None),
        ("runs", "runs/mine"),
        ("rows.jsonl", None),
        ("C:\\models\\mine", None),
        ("my model", None),
        ("m" * 300, None),
        ("Qwen/Qwen2..5", None),
    ],
)
def test_a_path_without_a_model_is_refused_offline(run_folder: Path, path: str, near: str | None) -> None:
    (run_folder / "config.json").write_text("{}")
    Path("rows.jsonl").touch()
    with pytest.raises(UserError) as refused:
        resolve_origin(path, "--tokenizer")
    assert refused.value.problem.startswith(f"--tokenizer is {path!r}")
    assert near is None or f"did you mean {near}?" in refused.value.remedy


def test_a_folder_named_like_a_hub_owner_does_not_hide_its_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    with_cached("Qwen/Qwen2.5-1.5B", tmp_path / "hub", monkeypatch)
    assert resolve_origin("Qwen/Qwen2.5-1.5B").path == "Qwen/Qwen2.5-1.5B"
    with pytest.raises(UserError, match=r"did you mean Qwen/Qwen3-0\.6B"):
        resolve_origin("Qwen/Qwen3-0.7B")


def test_a_run_folder_is_a_model_for_data_inspect_and_train(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    assert main(["data", "world", "--out", str(rows), "-n", "8"]) == 0
    assert main(["data", "check", str(rows), "--model", "runs/mine"]) == 0
    (tmp_path / "said.jsonl").write_text('{"response": "hello"}\n')
    assert main(["inspect", "said.jsonl", "--tokenizer", "runs/mine", "--json"]) == 0
    assert (
        resolve_run(f"{run_folder}/config.toml", out="new", resume=False, overrides=["model.path=runs/mine"]).model.path
        == "runs/mine/model"
    )
    for command in (["data", "check", str(rows)], ["inspect", "said.jsonl"], ["sft", "--data", str(rows)], ["probe"]):
        option = "--tokenizer" if command[0] == "inspect" else "--model"
        capsys.readouterr()
        assert main([*command, option, "runs/mnie"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option} is 'runs/mnie'")

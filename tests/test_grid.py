"""Grids: names of runs, the settings that a method changes, and grids with mistakes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rest_rl.compare.grid import DEFAULT_METHODS, METHODS, Grid, RunName, read_grid
from rest_rl.config import parse_toml
from rest_rl.errors import RenamedWarning, UserError
from rest_rl.report.tables import flatten

CONFIGS = Path(__file__).parent.parent / "configs"


def settings(grid: Grid, method: str, seed: int = 0, start: str = "") -> dict[str, Any]:
    return flatten(parse_toml(grid.run_config(method, start, seed).to_toml(), ""))


def changed(grid: Grid, ours: str, theirs: str) -> dict[str, Any]:
    new, old = settings(grid, ours), settings(grid, theirs)
    return {key: new.get(key) for key in sorted({*new, *old}) if new.get(key) != old.get(key)}


def test_names_of_runs() -> None:
    assert str(RunName("rest", "", 3)) == "rest-3"
    assert str(RunName("rest-no-reasoning", "sft", 0)) == "rest-no-reasoning@sft-0"
    for name in (RunName("rest-0.5", "", 1), RunName("grpo", "cold", 12)):
        assert RunName.parse(str(name)) == name
    assert RunName.parse("rest") is RunName.parse("rest-x") is RunName.parse("-1") is None


def test_every_method_is_a_run_and_no_two_are_the_same() -> None:
    grid = read_grid(None, methods=list(METHODS))
    assert len(grid.run_configs()) == len(METHODS) * 3
    assert [name.seed for name, _ in grid.run_configs()[: len(METHODS)]] == [0] * len(METHODS)
    assert all(METHODS[name].role != "ablation" for name in DEFAULT_METHODS)


def test_methods_differ_from_rest_in_one_thing() -> None:
    grid = read_grid(None, methods=list(METHODS))
    assert changed(grid, "inverted", "rest") == {"rest.weights.rule": "inverted"}
    assert changed(grid, "permuted", "rest") == {"rest.weights.rule": "permuted"}
    assert changed(grid, "rest-no-reasoning", "rest") == {"rest.weights.dropped": ["reasoning"]}
    curriculum = ("rest.weights.decay_format", "rest.weights.gain_arguments", "rest.weights.gain_reasoning")
    assert changed(grid, "rest-no-curriculum", "rest") == dict.fromkeys(curriculum, 0.0)
    assert (
        settings(grid, "rest")["rest.weights.rule"] == "one_minus_exp"
    )  # what permuted deals and inverted turns round
    static = changed(grid, "rest-no-dynamic-reward", "rest")  # (0.5 + 0.75) / 2
    assert static == {"rest.reward.accuracy_share_start": 0.625, "rest.reward.accuracy_share_end": 0.625}
    assert changed(grid, "rest-kl", "rest") == {"trl.beta": 0.003}
    assert changed(grid, "random", "grpo") == {"rest.reward.random": True}
    # ToolRL adds a format score in [0, 1] and an accuracy score in [-3, 3]: 6/7 of the range is accuracy
    shares = ("rest.reward.accuracy_share_start", "rest.reward.accuracy_share_end")
    assert changed(grid, "grpo-static", "grpo") == dict.fromkeys(shares, pytest.approx(6 / 7, abs=5e-4))
    assert changed(grid, "top_entropy", "grpo") == {"rest.weights.rule": "top_entropy"}
    # the baselines have the reward of rest: a comparison with them is one of weights alone
    for name in ("grpo", "dr_grpo", "dapo", "top_entropy"):
        assert not [key for key in changed(grid, name, "rest") if key.startswith("rest.reward")]


def test_seeds_change_only_the_seed_and_the_shuffle_of_permuted() -> None:
    grid = read_grid(None)
    for method in grid.methods:
        first, second = settings(grid, method, 0), settings(grid, method, 2)
        differing = {key for key in first if first[key] != second[key]}
        assert differing == {"run.seed"} | ({"rest.weights.seed"} if method == "permuted" else set())
    assert settings(grid, "permuted", 2)["rest.weights.seed"] == 2


def test_weights_of_the_base_run_apply_only_to_its_preset() -> None:
    overrides = ["rest.weights.gain_reasoning=0.9", "rest.reward.accuracy_share_end=1.0", "rest.advantage=dapo"]
    grid = read_grid(None, methods=["grpo", "rest", "rest_live", "authors-code", "permuted"], overrides=overrides)
    for name in ("rest", "permuted"):
        assert settings(grid, name)["rest.weights.gain_reasoning"] == 0.9
        assert settings(grid, name)["rest.advantage"] == "dapo"
    assert settings(grid, "grpo")["rest.weights.gain_reasoning"] == 0.0
    assert settings(grid, "grpo")["rest.advantage"] == "grpo"
    assert settings(grid, "grpo")["rest.reward.accuracy_share_end"] == 1.0  # one reward for both
    assert (
        settings(grid, "rest_live")["rest.weights.gain_reasoning"]
        == settings(read_grid(None, methods=["grpo", "rest_live"]), "rest_live")["rest.weights.gain_reasoning"]
    )
    assert "rest.reward.accuracy_share_end" not in settings(grid, "authors-code")


GRID = """
[grid]
methods = ["grpo", "mine", "rest"]
seeds = [5, 6]
base = "run.toml"
[base]
trl.max_steps = 7
[methods.mine]
rest.weights.strength = 0.25
data.num_samples = 50
[starts.cold]
model.path = "models/cold"
[starts.sft]
model.path = "models/sft"
"""


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("compare-office.toml", {"model.adapter": "smollm2-office", "rest.format": "hermes"}),
        ("compare-credit.toml", {"env.turns": 8, "trl.max_completion_length": 64}),
        ("compare-call-decides.toml", {"rest.format": "toolrl", "data.num_samples": 2000}),
    ],
)
def test_a_grid_changes_the_run_that_suits_its_data(file: str, own: dict[str, Any]) -> None:
    found = settings(read_grid(CONFIGS / file), "grpo" if "credit" not in file else "grpo-outcome")
    assert {key: found[key] for key in own} == own


def test_a_grid_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[data]\nnum_samples = 100\n[trl]\nmax_steps = 3\nlearning_rate = 1e-3\n")
    (tmp_path / "grid.toml").write_text(GRID)
    grid = read_grid(tmp_path / "grid.toml", overrides=["trl.logging_steps=1"])
    names = [str(name) for name, _ in grid.run_configs()]
    assert names[:4] == ["grpo@cold-5", "mine@cold-5", "rest@cold-5", "grpo@sft-5"]
    assert len(names) == 12
    mine = settings(grid, "mine", 6, "sft")
    assert mine["rest.weights.strength"] == 0.25
    assert (mine["data.num_samples"], mine["model.path"], mine["run.seed"]) == (50, "models/sft", 6)
    assert (mine["trl.max_steps"], mine["trl.learning_rate"], mine["trl.logging_steps"]) == (7, 1e-3, 1)
    # written and read back it is the same grid, in any folder
    (tmp_path / "kept").mkdir()
    for name, text in grid.to_files().items():
        (tmp_path / "kept" / name).write_text(text)
    assert read_grid(tmp_path / "kept" / "grid.toml") == grid
    # arguments take precedence over the file
    assert list(read_grid(tmp_path / "grid.toml", methods=["grpo"], seeds=[1]).methods) == ["grpo"]


def kept(folder: Path, grid: Grid) -> Grid:
    """The grid as a folder would keep it."""
    folder.mkdir(exist_ok=True)
    for name, text in grid.to_files().items():
        (folder / name).write_text(text)
    return read_grid(folder / "grid.toml")


def test_a_grid_grows_by_later_methods_and_seeds(tmp_path: Path) -> None:
    older = kept(tmp_path, read_grid(None, methods=["grpo", "rest"], seeds=[0, 1]))
    newer = read_grid(None, methods=["grpo", "permuted"], seeds=[5, 1])
    joined = newer.merge(older)
    assert list(joined.methods) == ["grpo", "rest", "permuted"]
    assert joined.seeds == (0, 1, 5)
    assert kept(tmp_path, joined) == joined
    assert joined.merge(joined) == joined
    cold = replace(older, starts={"cold": {"model": {"path": "a"}}})
    sft = replace(older, starts={"sft": {"model": {"path": "b"}}})
    assert list(sft.merge(cold).starts) == ["cold", "sft"]


def test_a_grid_of_other_runs_is_not_merged(tmp_path: Path) -> None:
    older = kept(tmp_path, read_grid(None, methods=["grpo", "rest"]))
    longer = read_grid(None, methods=["grpo", "rest"], overrides=["trl.max_steps=7"])
    with pytest.raises(ValueError, match=r"differs in \[base.trl\] from the one in this folder"):
        longer.merge(older)
    with pytest.raises(ValueError, match=r"\[methods.rest\]"):
        replace(older, methods={**older.methods, "rest": {"rest": {"weights": {"strength": 1.0}}}}).merge(older)
    with pytest.raises(ValueError, match=r"\[starts\]"):
        replace(older, starts={"sft": {"model": {"path": "b"}}}).merge(older)


def test_methods_of_the_grid_file_are_compared_with_grpo(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text("[methods.weak]\nrest.weights.strength = 0.1\n")
    assert list(read_grid(tmp_path / "grid.toml").methods) == ["grpo", "weak"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compare-*.toml")), ids=lambda path: path.stem)
def test_every_grid_of_configs_can_be_run(path: Path) -> None:
    text = path.read_text()
    assert f"rest-rl compare configs/{path.name}" in text
    assert len(read_grid(path).run_configs()) >= 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[grid]\nmethods = ['rest']", r"the baseline 'grpo' is not among the methods \('rest'\)"),
        ("[grid]\nmethods = ['grpo', 'best']", r"method 'best'.*\[methods.best\]"),
        ("[grid]\nmethods = 'grpo'", "grid.methods"),
        ("[grid]\nseeds = [0, 0]", "each once"),
        ("[grid]\nseed = [0]", "did you mean seeds"),
        ("[grids]\n", "did you mean grid"),
        ("[methods]\nmine = 3", "methods.mine is 3"),
        ("[methods.'a/b']\nrest.preset = 'rest'", "'a/b'"),
        ("[methods.mine]\nrest.weights.strenght = 0.1", "method 'mine'.*did you mean strength"),
        ("[methods.mine]\nrest.preset = 'best'", "method 'mine'.*'best'"),
        ("[methods.mine]\nrest.preset = 'grpo'", "grpo and mine are the same run"),
        ("[grid]\nbase = 'absent.toml'", "absent.toml"),
        ("[base]\ntrl = 3", "trl"),
        ("[grid]\nmethods = 'grpo'", "grid.methods is 'grpo', expected a list"),
        ("[grid]\nseeds = ['0']", "grid.seeds.*whole number"),
    ],
)
def test_mistakes_are_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_grid(tmp_path / "grid.toml")


OWN_RULE = """
class Rule:
    def __call__(self, batch, statistics, progress):
        return batch.mask_BT.float()

RULE = Rule()
"""


def test_module_folders_are_relative_to_the_grid_file(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "rules").mkdir(parents=True)
    (own / "rules" / "rule_below_a_grid.py").write_text(OWN_RULE)
    (own / "grid.toml").write_text(
        "[grid]\nmodules = ['rules']\n[methods.mine]\nrest.weights.rule = 'rule_below_a_grid:RULE'\n"
    )
    assert read_grid(own / "grid.toml").modules == (str(own / "rules"), str(own))


def test_your_own_rule_is_found_next_to_the_grid_file(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "kept"
    own.mkdir()
    (own / "rule_beside_a_grid.py").write_text(OWN_RULE)
    (own / "grid.toml").write_text("[methods.mine]\nrest.weights.rule = 'rule_beside_a_grid:RULE'\n")
    grid = read_grid(own / "grid.toml")
    assert settings(grid, "mine")["rest.weights.rule"] == "rule_beside_a_grid:RULE"
    assert grid.modules == (str(own),)
    again = kept(other, grid)  # the kept grid still finds the module
    assert again == grid
    assert str(own) in again.modules
    assert read_grid(None).modules == ()


def test_old_keys_of_a_grid_are_read_and_those_of_its_folder_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[eval]\nsamples = 2\n")
    text = "[grid]\nmethods = ['grpo', 'mine']\nseeds = [0]\nbase = 'run.toml'\n[base]\neval.slice = 7\n"
    text += "[methods.mine]\nrest.preset = 'rest'\ndata.samples = 50\n"
    (tmp_path / "grid.toml").write_text(text)
    with pytest.warns(RenamedWarning) as caught:
        grid = read_grid(tmp_path / "grid.toml")
    assert {str(warning.message).split()[0] for warning in caught} == {"eval.samples", "eval.slice", "data.samples"}
    run = grid.run_config("mine", "", 0)
    assert (run.eval.samples_per_prompt, run.eval.interim_prompts, run.data.num_samples) == (2, 7, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_grid(tmp_path / "grid.toml", is_recorded=True) == grid

"""The weight rule of docs/method.md, as printed there, beside a run file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli_w

import rest_rl
from rest_rl.config import embedded_run, parse_toml, read_run_file
from rest_rl.runlog import read_run

PAGE = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("### A weight rule or reward of your own") :]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    code, table = (re.search(f"```{kind}\n(.*?)```", SECTION, re.DOTALL)[1] for kind in ("python", "toml"))
    (tmp_path / "my_rules.py").write_text(code)
    run = parse_toml(embedded_run(), "the embedded run")
    run["run"] = {**run.get("run", {}), "out": str(tmp_path / "out"), "show_every": 0}
    run["eval"] = {**run.get("eval", {}), "prompts": 0}
    run["rest"] = {"preset": "grpo", **parse_toml(table, "docs")["rest"]}
    run["trl"] = {
        **run["trl"],
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations": 8,
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(run))
    return path


def test_a_rule_beside_the_run_file_trains(run_file: Path) -> None:
    result = rest_rl.train(run_file)
    row = read_run(result.folder).metrics[0]
    assert result.steps == 1
    # 3 on names and arguments, 1 elsewhere, in every response by the same mean: nothing in between but their means
    assert row["rest/weight/arguments"] > 2 * row["rest/weight/format"]
    assert row["rest/weight/name"] > 2 * row["rest/weight/format"]
    again = read_run_file(result.folder / "config.toml").rest.weights
    assert (again["rule"], again["factor"]) == ("my_rules:CallsFirst", 3.0)

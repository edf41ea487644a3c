"""Settings of verl as they are typed after `--`: read as Hydra reads them, kept in TOML."""

from __future__ import annotations

import pytest

from rest_rl.config import apply_overrides
from rest_rl.train.verl.overrides import verl_change

VALUES = {
    "true": True,
    "True": True,
    "FALSE": False,
    "null": "null",  # TOML has no none: the word stands for it
    "None": "null",
    "3": 3,
    "-1_000": -1000,
    "1e-6": 1e-6,
    ".5": 0.5,
    "007": "007",
    "sglang": "sglang",
    "some words": "some words",
    "'a, b'": "a, b",
    '"True"': "True",
    "hdfs://x:1/a=b": "hdfs://x:1/a=b",
    "${oc.env:HOME}": "${oc.env:HOME}",
    "[console,wandb]": ["console", "wandb"],
    "[1, [x, null], 'a,b']": [1, ["x", "null"], "a,b"],
    "[]": [],
    "{a: 1, b: {c: False}}": {"a": 1, "b": {"c": False}},
    "": "",
    "schön": "schön",
}


@pytest.mark.parametrize("text", VALUES)
def test_values_after_two_dashes_are_read_as_hydra_does(text: str) -> None:
    assert apply_overrides({}, [verl_change(f"a.b={text}")]) == {"verl": {"a": {"b": VALUES[text]}}}


@pytest.mark.parametrize("text", ["[a", "a]", "a,b", "{a}", "{a:1", "f(1)", "it's", "'a'b", "[a b"])
def test_values_that_hydra_would_not_take_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="as Hydra has them") as caught:
        verl_change(f"a.b={text}")
    assert "--set" not in str(caught.value)


def test_signs_after_two_dashes() -> None:
    assert verl_change("+a.b.c=1") == "verl.a.b.+c=1"
    for override, message in (
        ("++a.b=1", "remove a \\+"),
        ("~a.b=1", "settings of verl"),
        ("a..b=1", "settings of verl"),
    ):
        with pytest.raises(ValueError, match=message):
            verl_change(override)

"""Settings of verl as its users type them, `table.key=value` in Hydra's words, as changes of `[verl]`.

Without Hydra, because the run file is read where verl need not be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rest_rl.errors import UserError

UNSET = "null"
"""The word that stands for None in `[verl]`: TOML has none."""
WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}
"""Words with a meaning, in any case. `None` is a text to Hydra; whoever writes it means none."""
INTEGER = re.compile(r"[+-]?(?:0|[1-9](?:_?[0-9])*)")
DIGITS = "[0-9](?:_?[0-9])*"
DECIMAL = re.compile(
    rf"[+-]?(?:(?:{DIGITS}\.(?:{DIGITS})?|\.{DIGITS})(?:e[+-]?{DIGITS})?|{DIGITS}e[+-]?{DIGITS}|inf|nan)", re.IGNORECASE
)
QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
BARE = re.compile(r"(?:\$\{[^{}]*\}|[^\[\]{}(),'\"])+")  # ${...} is OmegaConf's
KEY = re.compile(r"[^\[\]{}(),'\":=]+")


def verl_change(override: str) -> str:
    """`a.b=value` or `+a.b=value` as a change of `[verl]` in TOML; ValueError for what is no such setting."""
    path, separator, text = override.partition("=")
    if path.startswith("++"):
        raise UserError(
            f"{override!r} after --",
            "one sign at most: table.key=value changes a setting that verl has, +table.key=value adds one that it "
            "has not",
            "remove a +",
        )
    *tables, key = path.removeprefix("+").split(".")
    if not separator or not tables or not all((*tables, key)) or path.startswith("~"):
        raise UserError(
            f"{override!r} after --",
            "settings of verl, table.key=value, such as actor_rollout_ref.rollout.tensor_model_parallel_size=2",
            "see --print-config",
        )
    key = f"+{key}" if path.startswith("+") else key
    try:
        value = hydra_value(text)
    except ValueError as error:
        raise UserError(
            f"{override!r} after -- ({error})",
            "a value as Hydra has them: true, 2, 1e-6, null, a word, 'a text', [a,b] or {a:1}",
            "mend or quote it",
        ) from error
    return f"verl.{'.'.join([*tables, key])}={toml_text(value)}"


def hydra_value(text: str) -> Any:
    """The value of one setting; what is neither quoted nor a list, a table, a number or a word like null is a text.

    ValueError for text that Hydra would not take either, such as `a,b` (several runs) or `[a`. None for null.
    """
    if not text.strip():
        return ""
    value, place = _read_value(text, 0)
    if place < len(text):
        raise ValueError(f"{text[place]!r} at {place + 1} has no place there")
    return value


def toml_text(value: Any) -> str:
    """A value in TOML, on one line; None as the word null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_text(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # JSON has another word for infinity
    return json.dumps(UNSET if value is None else value, ensure_ascii=False)


def _read_value(text: str, place: int) -> tuple[Any, int]:
    """(a value, the place after it and the spaces behind it)."""
    place = _after_spaces(text, place)
    opening = text[place : place + 1]
    if opening == "[":
        return _read_items(text, place + 1, "]", _read_value)
    if opening == "{":
        pairs, place = _read_items(text, place + 1, "}", _read_pair)
        return dict(pairs), place
    if match := QUOTED.match(text, place):
        return _unquoted(match), _after_spaces(text, match.end())
    if match := BARE.match(text, place):
        return _meaning(match[0].strip()), match.end()
    raise ValueError(f"{opening or 'the end'!r} at {place + 1} where a value should be")


def _read_items(
    text: str, place: int, closing: str, read: Callable[[str, int], tuple[Any, int]]
) -> tuple[list[Any], int]:
    items: list[Any] = []
    place = _after_spaces(text, place)
    while text[place : place + 1] != closing:
        item, place = read(text, place)
        items.append(item)
        if text[place : place + 1] == ",":
            place = _after_spaces(text, place + 1)
        elif text[place : place + 1] != closing:
            raise ValueError(f"{text[place : place + 1] or 'the end'!r} at {place + 1} where {closing} should be")
    return items, _after_spaces(text, place + 1)


def _read_pair(text: str, place: int) -> tuple[tuple[str, Any], int]:
    match = QUOTED.match(text, place) or KEY.match(text, place)
    key = (_unquoted(match) if match.re is QUOTED else match[0].strip()) if match else ""
    end = _after_spaces(text, match.end()) if match else place
    if not key or text[end : end + 1] not in (":", "="):
        raise ValueError(f"no key and colon at {place + 1}")
    value, end = _read_value(text, end + 1)
    return (key, value), end


def _after_spaces(text: str, place: int) -> int:
    return place + len(text[place:]) - len(text[place:].lstrip())


def _unquoted(match: re.Match[str]) -> str:
    return re.sub(r"\\(['\"])", r"\1", match[1] if match[1] is not None else match[2])


def _meaning(word: str) -> Any:
    if word.lower() in WORDS:
        return WORDS[word.lower()]
    if INTEGER.fullmatch(word):
        return int(word)
    return float(word) if DECIMAL.fullmatch(word) else word

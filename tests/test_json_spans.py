from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.json_spans import MAX_DEPTH, parse_bare_value, scan_object

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), json_values, max_size=5), st.sampled_from([None, 2]), st.booleans())
def test_valid_objects_agree_with_the_standard_library(value, indent, ensure_ascii):
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
    scan = scan_object(text)
    assert scan.error is None
    assert scan.end == len(text)
    assert {entry.key: entry.value for entry in scan.entries} == json.loads(text)
    for entry in scan.entries:
        assert json.loads(text[entry.start : entry.end]) == entry.value


@given(st.text(alphabet='{}[]":,\\ntf01eE.-+ \u00e9\ud800\n', max_size=40))
def test_entries_of_any_text_are_slices_of_it(text):
    text = "{" + text
    scan = scan_object(text)
    for entry in scan.entries:
        assert 0 < entry.start <= entry.end <= len(text)
    if scan.error is None:
        assert {e.key: e.value for e in scan.entries} == json.loads(text[: scan.end])


def test_a_broken_value_ends_where_its_brackets_close():
    # {"a": {"x": }, "b": 1}
    # 0     6      13
    scan = scan_object('{"a": {"x": }, "b": 1}')
    (entry,) = scan.entries
    assert (entry.key, entry.value, entry.start, entry.end) == ("a", None, 6, 13)
    assert scan.error is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a"',
        '{"a":',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1,}',
        '{"a": 1 "b": 2}',
        "{'a': 1}",
        '{"a": "\n"}',
        '{"a": ' + "9" * 401 + "}",
        '{"a": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
        '{"a": ' + "[" * 100_000,
    ],
)
def test_invalid_json_is_reported_and_never_raises(text):
    assert scan_object(text).error is not None


def test_the_deepest_allowed_nesting_and_brackets_in_strings_pass():
    assert scan_object('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}").error is None
    assert scan_object(json.dumps({"a": "[" * 500})).error is None


def test_an_unclosed_string_full_of_quotes_is_linear():
    text = '{"a": {"' + '\\"' * 2_000_000  # quadratic scanning would take hours
    (entry,) = scan_object(text).entries
    assert entry.end == len(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        (" 12\n", 12),
        ("-1.5e3", -1500.0),
        ("true", True),
        ("True", True),
        ("None", None),
        ("null", None),
        ('{"a": [1, "x"]}', {"a": [1, "x"]}),
        ("012", "012"),  # no number of JSON
        ("+1", "+1"),
        ("1 2", "1 2"),
        ("NaN", "NaN"),
        ("TRUE", "TRUE"),
        ("{'a': 1}", "{'a': 1}"),
        ('"12"', '"12"'),  # a string is no value other than a string
        ("", ""),
        (" ", " "),
        ("[" * 100 + "]" * 100, "[" * 100 + "]" * 100),
        ("9" * 500, "9" * 500),
    ],
)
def test_bare_values(text, value):
    assert repr(parse_bare_value(text)) == repr(value)

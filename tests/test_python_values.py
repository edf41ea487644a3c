"""Python literals are read as `ast.literal_eval` reads them, and nothing else is read."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.formats.python_values import BRACKET_OR_STRING, NotLiteralError, read_arguments, write_arguments
from rest_rl.json_spans import find_bracket_end
from tests.test_json_spans import json_values


def read(text):
    arguments, end = read_arguments(text, 0)
    assert end == len(text)
    return arguments


@given(json_values)
def test_the_output_of_repr_can_be_parsed(value):
    assert read(f"(a={value!r})") == {"a": value}


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_written_arguments_can_be_parsed_by_us_and_by_python(arguments):
    text = write_arguments(arguments)
    assert read(text) == arguments
    keywords = ast.parse("f" + text, mode="eval").body.keywords
    from_python = {}
    for keyword in keywords:
        value = ast.literal_eval(keyword.value)
        from_python.update(value if keyword.arg is None else {keyword.arg: value})
    if all(key.isascii() for key in arguments):  # Python normalizes other identifiers
        assert from_python == arguments


@given(st.text(alphabet="'\"\\\n\tabnrxuU01234567{}é😀", max_size=20))
def test_strings_are_parsed_as_in_python(inner):
    for quote in ("'", '"', "'''", '"""'):
        literal = f"{quote}{inner}{quote}"
        try:
            expected = ast.literal_eval(literal)
        except (SyntaxError, ValueError):
            continue
        if isinstance(expected, str) and "\\N" not in inner:
            try:
                got = read(f"(a={literal})")
            except NotLiteralError:
                # strings side by side are one string to Python, and none to us
                assert ast.dump(ast.parse(literal, mode="eval")).count("Constant") == 1
                assert literal.strip(quote[0]).count(quote[0]) or quote[0] in inner
            else:
                assert got == {"a": expected}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(a=1)", 1),
        ("( a = -1 , )", -1),
        ("(a=+2.50)", 2.5),
        ("(a=.5)", 0.5),
        ("(a=5.)", 5.0),
        ("(a=1E-2)", 0.01),
        ("(a=00)", 0),
        ("(a=[1, [2], {}, ])", [1, [2], {}]),
        ("(a={'x': {\"y\": None}})", {"x": {"y": None}}),
        ("(a=null)", None),
        (r"(a='\x41\u00e9\U0001f600\101\q')", "Aé😀A\\q"),
        ('(a="""x\n"y" \'z\'""")', "x\n\"y\" 'z'"),
        ("(a=')')", ")"),
        ("(a=1, a=2)", 2),
    ],
)
def test_literals_by_hand(text, value):
    assert read(text) == {"a": value}


@pytest.mark.parametrize(
    "text",
    [
        "(1)",
        "(x)",
        "(a)",
        "(a=x)",
        "(a=1 + 1)",
        "(a=1_000)",
        "(a=0x10)",
        "(a=012)",
        "(a=1j)",
        "(a=(1, 2))",
        "(a={1, 2})",
        "(a={1: 2})",
        "(a=[i for i in x])",
        "(a=f'{x}')",
        "(a=b'x')",
        "(a='x' 'y')",
        "(a='x\n')",
        r"(a='\U00110000')",
        "(*a)",
        "(**1)",
        "(**a)",
        "(a=__import__('os'))",
        "(a=lambda: 1)",
        "(a=...)",
        "(a=1",
        "(a=1 b=2)",
        "(,)",
        "(a==1)",
        "(a=" + "[" * 65 + "]" * 65 + ")",
        "(a=" + "9" * 401 + ")",
        "(a=nan)",
        "(a=True1)",
        "(a=1a)",
    ],
)
def test_anything_but_keyword_arguments_with_literals_is_an_error(text):
    with pytest.raises(NotLiteralError):
        read_arguments(text, 0)


def test_depth_and_digits_at_their_limits_are_accepted():
    assert read("(a=" + "[" * 64 + "]" * 64 + ")")
    assert read("(a=" + "9" * 400 + ")") == {"a": 10**400 - 1}


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("(a)", 3),
        ("(')')x", 5),
        ("(a", -1),
        ("('a)", -1),
        ("('a\n)", 5),
        ('("""\n)""")', 10),
        ("(\\'))", -1),
        ("([)", -1),
    ],
)
def test_the_closing_bracket_is_found_past_strings(text, end):
    assert find_bracket_end(text, 0, BRACKET_OR_STRING) == end  # an unclosed string ends with its line

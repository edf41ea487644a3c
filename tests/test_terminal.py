"""What is shown in the terminal: text of a model is text there, whatever it holds."""

from __future__ import annotations

import io

from rich.console import Console

from rest_rl.cli.terminal import Screen, coloured, printable, say
from rest_rl.response import Region

TITLE_AND_CLEAR = "\x1b]0;owned\x07\x1b[2J"


def shown(text: object) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system=None, width=200).print(text, end="")
    return out.getvalue()


def test_controls_become_pictures() -> None:
    assert printable(TITLE_AND_CLEAR) == "␛]0;owned␇␛[2J"
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x00\r\x7f\x9b\ud800é") == "␀␍␡\ufffd\ufffdé"


def test_a_coloured_response_commands_no_terminal() -> None:
    text = shown(coloured([(TITLE_AND_CLEAR, Region.NAME.label), ("\ud800", Region.OTHER.label)]))
    assert text == "␛]0;owned␇␛[2J\ufffd"


def test_a_line_is_said_as_it_stands() -> None:
    out = io.StringIO()
    console = Console(file=out, width=20)
    say(console, "runs/[v2]/a-name-longer-than-the-line" + TITLE_AND_CLEAR)
    Screen(console).say("in [v2]")
    assert out.getvalue() == "runs/[v2]/a-name-longer-than-the-line␛]0;owned␇␛[2J\nin [v2]\n"

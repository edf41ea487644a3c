"""Terminal output: text of a model stays text, whatever it contains."""

from __future__ import annotations

import io
import re

from rich.console import Console

from rest_rl.cli.terminal import Screen, printable, say, show_colored
from rest_rl.response import Region

TITLE_AND_CLEAR = "\x1b]0;owned\x07\x1b[2J"


def test_control_characters_become_symbols() -> None:
    assert printable(TITLE_AND_CLEAR) == "␛]0;owned␇␛[2J"
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x00\r\x7f\x9b\ud800é") == "␀␍␡\ufffd\ufffdé"


def test_a_colored_response_cannot_control_the_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=20)
    show_colored([(TITLE_AND_CLEAR, Region.NAME.label), ("\ud800", Region.OTHER.label)], console)
    assert out.getvalue() == "␛]0;owned␇␛[2J\ufffd\n"


def test_a_response_is_colored_in_one_piece_per_region_and_not_wrapped() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=20)
    show_colored([("a" * 30, "name"), ("b\n", "name"), ("c", "answer")], console)
    assert out.getvalue() == f"\x1b[38;2;214;64;31m{'a' * 30}b\n\x1b[0m\x1b[38;2;26;158;108mc\x1b[0m\n"


def test_a_line_is_printed_verbatim() -> None:
    out = io.StringIO()
    console = Console(file=out, width=20)
    say(console, "runs/[v2]/a-name-longer-than-the-line" + TITLE_AND_CLEAR)
    Screen(console).say("in [v2]")
    assert out.getvalue() == "runs/[v2]/a-name-longer-than-the-line␛]0;owned␇␛[2J\nin [v2]\n"


def test_without_a_terminal_progress_is_a_line_every_few_seconds(monkeypatch) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("rest_rl.cli.terminal.time.monotonic", lambda: clock[0])
    with Screen(Console(file=out, width=80)).track("evaluating", 90_000) as advance:
        for second in range(1, 3001):
            clock[0] = float(second)
            advance(second)
    lines = out.getvalue().splitlines()
    assert lines[:3] == [
        "evaluating ...",
        "evaluating 5/90000 1/s 1 day, 0:59:55 left",
        "evaluating 10/90000 1/s 1 day, 0:59:50 left",
    ]
    # every 5 s for 100 s, then ever later, in the end once a minute
    assert 20 + (3000 - 1200) // 60 < len(lines) < 120


def test_progress_shows_the_last_line(monkeypatch) -> None:
    out, clock = io.StringIO(), iter(range(0, 10_000, 25))
    monkeypatch.setattr("rest_rl.cli.terminal.time.monotonic", lambda: float(next(clock)))
    screen = Screen(Console(file=out, width=80))
    with screen.track("evaluating", 8, 2) as advance:
        for done in range(3, 9):
            advance(done, note="exact match 50 %")
    lines = out.getvalue().splitlines()
    assert lines[0] == "evaluating ..."
    assert re.fullmatch(r"evaluating 3/8 exact match 50 % 0\.\d+/s 0:\d\d:\d\d left", lines[1])
    assert lines[-1].startswith("evaluating 8/8 ")


def test_a_slow_first_step_does_not_count_in_the_rate(monkeypatch) -> None:
    """As in an evaluation, whose first step contains the prompts."""
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("rest_rl.cli.terminal.time.monotonic", lambda: clock[0])
    with Screen(Console(file=out, width=80)).track("decoding", 100) as advance:
        for done in range(1, 7):
            clock[0] = 90.0 + done
            advance(done)
    assert out.getvalue().splitlines() == ["decoding ...", "decoding 1/100", "decoding 6/100 1/s 0:01:34 left"]


def test_a_fast_rate_is_a_plain_number(monkeypatch) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("rest_rl.cli.terminal.time.monotonic", lambda: clock[0])
    with Screen(Console(file=out, width=80)).track("decoding", 2500) as advance:
        clock[0] = 2.0
        advance(2500)
    assert out.getvalue().splitlines() == ["decoding ...", "decoding 2500/2500 1250/s 0:00:00 left"]


def test_bars_fit_80_columns_and_leave_nothing_behind() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=True, color_system=None, width=80), show_every=1)
    row = {"response": "abc", "lengths": [1, 2], "regions": [1, 2], "reward": 0.5}
    with screen.track("training", None) as advance, screen.track("rest-0", 9):
        advance(1)
        metrics = {"reward": 0.5, "rest/accuracy": 0.25, "rest/format": 1.0, "loss": -0.1, "rest/weight/name": 1.5}
        screen.on_step(300, 900, metrics)
        screen._bars.refresh()
        screen.on_step(1000, 1000, {**metrics, "rest/accuracy_calls": 0.25, "rest/accuracy_answers": 0.75})
        screen.on_responses(3, [row])
        screen._bars.refresh()
        screen.say("a line")
    text = out.getvalue()
    assert "300/900 reward 0.500 S_acc 0.250 S_format 1.000" in text
    assert "1000/1000 reward 0.500 S_acc calls 0.250 answers 0.750" in text
    assert "…" not in text
    assert "name 1.50" in text
    assert max(len(line) for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))) <= 80

"""Tables and figures of evaluations: the paper's layout, marks for partial groups, names that are hard to print."""

from __future__ import annotations

import csv
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from rest_rl.cli.terminal import show_table
from rest_rl.evaluate.radar import Accuracy, draw_bars, draw_polygons, draw_radar
from rest_rl.evaluate.tables import (
    build_tables,
    comparison_markdown,
    comparison_tables,
    escape_latex,
    model_names,
    render_csv,
    render_latex,
    render_markdown,
    results_frame,
    terminal_table,
    write_tables,
)

PIN = "bfcl-eval 2025.6.14 (BFCL v3)"
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
NON_LIVE = ("simple", "java", "javascript", "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
CEILING = (
    "Level 1: the offered tools allow at most 98.0; tools or arguments of the gold are missing in Level1_3, Level1_4."
)


def group(accuracy: float = 0.95, n: int = 200, of: int | None = None, **more: Any) -> dict[str, Any]:
    scores = {"correct": round(n * accuracy), "accuracy": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.02}
    return {"n": n, "of": of or n, **scores, "overflow": 0, "truncated": 0, "errors": [], **more}


def bfcl(groups: dict[str, Any], official: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    about = {
        "benchmark": "bfcl",
        "version": "v3",
        "pin": PIN,
        "model": "base",
        "prompt": "training",
        "format": "toolrl",
    }
    return {**about, "metrics": ["correct"], "groups": groups, "official": official or {}, **more}


def api_bank(**more: Any) -> dict[str, Any]:
    strict = {"strict": {"correct": 1, "accuracy": 0.5, "low": 0.4, "high": 0.6}}
    groups = {name: group(0.75, 100, **strict) for name in ("Level1", "Level2", "Level3", "overall")}
    about = {
        "benchmark": "api_bank",
        "pin": "API-Bank (597)",
        "model": "base",
        "prompt": "published",
        "format": "toolrl",
    }
    ceilings = {"Level1": {"accuracy": 0.98, "ids": {"Level1_3": "why", "Level1_4": "why"}}, "Level2": {"ids": {}}}
    return {**about, "metrics": ["soft", "strict"], "groups": groups, "ceilings": ceilings, **more}


def whole_bfcl(**more: Any) -> dict[str, Any]:
    official = {
        "Non-Live": {"accuracy": 0.8, "low": 0.78, "high": 0.82, "of": list(NON_LIVE)},
        "Live": {"accuracy": 0.7, "low": 0.68, "high": 0.72, "of": list(LIVE)},
        "Multi-Turn": {"accuracy": 0.15, "low": 0.13, "high": 0.18, "of": list(MULTI_TURN)},
        "Overall": {"accuracy": 0.55, "low": 0.54, "high": 0.57, "of": [*NON_LIVE, *LIVE, *MULTI_TURN]},
    }
    return bfcl({name: group() for name in (*NON_LIVE, *LIVE, *MULTI_TURN)}, official, **more)


def columns(table: Any) -> tuple[str, ...]:
    return tuple(table.frame["column"].unique())


def accuracies(table: Any) -> list[float | None]:
    return list(table.frame["accuracy"])


def test_tables_follow_the_papers_layout() -> None:
    tables = {table.title: table for table in build_tables([whole_bfcl()])}
    assert {title: columns(table) for title, table in tables.items()} == {
        "BFCL v3, Averages": ("Overall", "Non-Live", "Live", "Multi-Turn"),
        "BFCL v3, Multi-Turn": ("Overall", "Base", "Miss Func", "Miss Param", "Long Context"),
        "BFCL v3, Non-Live": (
            *("Overall", "Simple Python", "Simple Java", "Simple JavaScript"),
            *("Multiple", "Parallel", "Parallel Multiple", "Irrelevance"),
        ),
        "BFCL v3, Live": (
            *("Overall", "Simple", "Multiple", "Parallel", "Parallel Multiple", "Irrelevance", "Relevance"),
        ),
    }
    first = tables["BFCL v3, Multi-Turn"].frame.iloc[0]
    assert [first[name] for name in ("model", "accuracy", "low", "high", "n")] == ["base", 0.15, 0.13, 0.18, None]
    assert "Overall averages all 17 categories." in tables["BFCL v3, Averages"].notes
    assert all(table.frame["accuracy"].notna().all() for table in tables.values())
    assert len(results_frame([whole_bfcl()])) == sum(len(table.frame) for table in tables.values())


def test_v4_names_fill_the_same_columns() -> None:
    summary = bfcl({"simple_python": group(0.5), "simple_java": group(0.25)}, version="v4", pin="bfcl-eval 2026.3.23")
    (table,) = build_tables([summary])
    assert table.title == "BFCL v4, Non-Live"
    assert accuracies(table) == [None, 0.5, 0.25, None, None, None, None, None]


def test_every_table_shows_pin_prompt_and_format() -> None:
    text = render_markdown([whole_bfcl(), api_bank()])
    blocks = text.split("### ")[1:]
    assert len(blocks) == 6
    for block in blocks:
        assert ("API-Bank (597)" if block.startswith("API-Bank") else PIN) in block
        assert re.search(r"prompt (training|published), format toolrl", block)
    assert all(f"{PIN}; prompt training" in part for part in render_latex([whole_bfcl()]).split(r"\end{table}")[:-1])


def test_cells_in_markdown() -> None:
    groups = {
        "multi_turn_base": group(0.95, 40, 200),
        "multi_turn_miss_func": group(0.5),
        "multi_turn_miss_param": {**group(0.5, 0, 200, errors=["a", "b"]), "accuracy": None},
    }
    text = render_markdown([bfcl(groups)])
    assert "| base | – | 95.0* [92.0, 97.0] (n = 40 of 200) | 50.0 [47.0, 52.0] | – | – |" in text
    assert "- Cells with * cover only a part of their group.\n- base: 2 not scored; Base 40 of 200." in text
    assert "Averages" not in text


def test_official_averages_have_their_interval_everywhere() -> None:
    text = render_markdown([whole_bfcl()])
    row = "| base | 55.0 [54.0, 57.0] | 80.0 [78.0, 82.0] | 70.0 [68.0, 72.0] | 15.0 [13.0, 18.0] |"
    assert row in text
    assert text.count("95 % Wilson intervals, combined by MOVER for averages.") == 4
    lines = [line for line in csv.DictReader(io.StringIO(render_csv([whole_bfcl()]))) if line["table"] == "Averages"]
    numbers = [(line["column"], line["accuracy"], line["low"], line["high"], line["n"]) for line in lines]
    assert numbers[0] == ("Overall", "0.55", "0.54", "0.57", "")
    assert numbers[3] == ("Multi-Turn", "0.15", "0.13", "0.18", "")
    assert r"base & \withinterval{55.0}{[54.0, 57.0]} & \withinterval{80.0}{" in render_latex([whole_bfcl()])
    table = terminal_table(whole_bfcl())
    assert ("Multi-Turn", "", "15.0", "[13.0, 18.0]") in table.rows
    assert table.rows[-1] == ("Overall", "", "55.0", "[54.0, 57.0]")
    assert table.title.endswith("95 % Wilson intervals, combined by MOVER for averages")
    assert all("MOVER" not in other for other in (render_markdown([api_bank()]), terminal_table(api_bank()).title))


def test_issues_are_counted_once_per_table() -> None:
    groups = {
        "simple": group(overflow=2, refused=4, truncated=3),
        "live_simple": group(truncated=1),
        "java": group(errors=["x"]),
    }
    notes = {table.title: table.notes for table in build_tables([bfcl(groups)])}
    assert notes == {
        "BFCL v3, Non-Live": ("base: 2 exceeded the context, 4 without a prompt, 3 truncated, 1 not scored.",),
        "BFCL v3, Live": ("base: 1 truncated.",),
    }
    overall = api_bank(groups={"Level1": group(truncated=4), "overall": group(truncated=4)})
    assert all("base: 4 truncated." in table.notes for table in build_tables([overall]))


def test_api_bank_has_a_table_per_metric_with_the_ceilings() -> None:
    soft, strict = build_tables([api_bank()])
    assert soft.title == "API-Bank, soft (the published metric)"
    assert columns(soft) == columns(strict) == ("Overall", "Level 1", "Level 2", "Level 3")
    assert accuracies(soft) == [0.75] * 4
    assert accuracies(strict) == [0.5] * 4
    assert soft.notes == (CEILING,)


def test_other_benchmarks_show_all_groups() -> None:
    summary = {"benchmark": "tool_world", "pin": "tool world", "model": "m", "prompt": "training", "format": "toolrl"}
    groups = {"held_out": group(0.5), "unseen_tools": group(0.25), "overall": group(0.4)}
    (table,) = build_tables([{**summary, "metrics": ["correct"], "groups": groups}])
    assert (table.title, columns(table)) == ("Tool world", ("Overall", "Held out", "Unseen tools"))
    assert accuracies(table) == [0.4, 0.5, 0.25]


def test_different_pins_get_separate_tables() -> None:
    tables = build_tables(
        [bfcl({"simple": group()}), bfcl({"simple": group()}, pin="another"), bfcl({"simple": group()})]
    )
    assert [table.frame["model"].nunique() for table in tables] == [2, 1]
    assert build_tables([]) == []
    assert render_markdown([]) == "\n"


def test_models_with_different_prompts_are_distinguished() -> None:
    pair = [bfcl({"simple": group()}), bfcl({"simple": group()}, prompt="native", format="hermes")]
    (table,) = build_tables(pair)
    assert list(table.frame["model"].unique()) == [
        "base (prompt training, format toolrl)",
        "base (prompt native, format hermes)",
    ]
    assert "prompts or formats differ" in table.caption
    assert table.notes[0].endswith(": prompt training, format toolrl.")
    assert model_names([pair[0], pair[0]]) == [f"base (prompt training, format toolrl) #{i}" for i in (1, 2)]
    assert model_names([pair[0], api_bank(), {}]) == ["base", "base", "model"]


def test_csv_has_a_line_per_model_and_column() -> None:
    summaries = [bfcl({"simple": group(0.95, 40, 200, truncated=3, refused=1)}, model='a,"b"'), whole_bfcl()]
    lines = list(csv.DictReader(io.StringIO(render_csv(summaries))))
    # both models in each column: 4 averages, 5 of multi-turn, 8 of non-live, 7 of live
    assert len(lines) == 2 * (4 + 5 + 8 + 7)
    (line,) = [one for one in lines if one["model"] == 'a,"b"' and one["column"] == "Simple Python"]
    assert [line[key] for key in ("table", "n", "of", "correct", "accuracy", "refused", "truncated", "errors")] == [
        *("Non-Live", "40", "200", "38", "0.95", "1", "3", "0")
    ]
    (missing,) = [one for one in lines if one["model"] == 'a,"b"' and one["column"] == "Base"]
    assert (missing["pin"], missing["n"], missing["accuracy"]) == (PIN, "", "")


def test_latex_is_escaped_and_its_columns_agree() -> None:
    name = r"[x]*run_50% & co #1 ~^\{$}<|>"
    text = render_latex([whole_bfcl(model=name), bfcl({"simple": group(0.9, 40, 200)}, model="other")])
    assert r"\begin{tabular}{@{}lcccccccc@{}}" in text
    shown = r"{[}x{]}{*}run\_50\% \& co \#1 \textasciitilde{}\textasciicircum{}\textbackslash{}\{\$\}"
    assert (
        shown + r"\textless{}\textbar{}\textgreater{} & \withinterval{80.0}{[78.0, 82.0]} & \withinterval{95.0}{"
        in text
    )
    assert r"other & -- & \withinterval{90.0$^{*}$}{[87.0, 92.0]} & --" in text
    assert r"for averages.}" in text
    assert r"95 \% Wilson" in text
    for block in re.findall(r"\\begin\{tabular\}\{@\{\}l(c+)@\{\}\}(.*?)\\bottomrule", text, flags=re.DOTALL):
        rows = block[1].split(r"\midrule")[1].strip().splitlines()
        assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [len(block[0])] * 2
        assert all(row.endswith(r" \\") for row in rows)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 4


@given(st.text(alphabet=r"a_&%$#{}~^\<>|[]*" + "\n"))
def test_escaped_text_contains_no_special_characters(text: str) -> None:
    commands = r"\\text(backslash|asciitilde|asciicircum|less|greater|bar)\{\}|\\[_&%$#{}]|\{[\[\]*]\}"
    assert set(re.sub(commands, "", escape_latex(text))) <= {"a", " "}


def shown(table: Any, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    show_table(table.title, table.header, table.rows, console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_an_evaluation_fits_into_80_columns() -> None:
    summary = whole_bfcl(model="base")
    summary["groups"]["multi_turn_long_context"] = group(0.2, 123, 200, overflow=77)
    del summary["official"]["Multi-Turn"], summary["official"]["Overall"]
    table = terminal_table(summary)
    lines = shown(table, 80)
    assert not any("…" in line for line in lines)
    assert [line.split() for line in lines if "multi_turn_long" in line or "Multi-Turn" in line] == [
        ["Multi-Turn", "–"],
        ["multi_turn_long_context", "123", "of", "200", "20.0", "[17.0,", "22.0]"],
    ]
    assert PIN in table.title
    assert "prompt training, format toolrl" in table.title
    assert table.notes == ["multi_turn_long_context: 77 exceeded the context."]
    assert {len(row) for row in table.rows} == {len(table.header)}


def test_the_terminal_shows_both_metrics_side_by_side() -> None:
    table = terminal_table(api_bank())
    assert table.header == ("", "n", "soft", "95 %", "strict", "95 %")
    assert table.rows[0] == (" Level1", "100", "75.0", "[72.0, 77.0]", "50.0", "[40.0, 60.0]")
    assert table.rows[-1][0] == "overall"
    assert table.notes == [CEILING]


COMPARISON = {
    "pin": PIN,
    "base": {"model": "base", "prompt": "training", "format": "toolrl"},
    "tuned": {"model": "tuned", "prompt": "native", "format": "toolrl"},
    "warnings": ["prompt differs: 'training' and 'native'"],
    "metrics": {
        "correct": [
            {"group": "multi_turn_long_context", "n": 200, "clusters": 200, "base": 0.1, "tuned": 0.2,
             "difference": 0.1, "low": 0.05, "high": 0.15, "lost": 2, "gained": 22, "p": 0.00004, "q": 0.00008},
            {"group": "java", "n": 100, "clusters": 100, "base": 0.5, "tuned": 0.48, "difference": -0.02, "low": -0.1,
             "high": 0.06, "lost": 5, "gained": 3, "p": 0.727, "q": 0.727},
            {"group": "Multi-Turn", "n": 300, "clusters": 300, "base": 0.3, "tuned": 0.34, "difference": 0.04,
             "low": 0.01, "high": 0.09, "lost": 7, "gained": 25, "p": None, "q": None},
            {"group": "all", "n": 300, "clusters": 300, "base": 0.2, "tuned": 0.29, "difference": 0.06, "low": 0.02,
             "high": 0.1, "lost": 7, "gained": 25, "p": 0.002, "q": None},
        ]
    },
}  # fmt: skip


def test_a_comparison_in_the_terminal() -> None:
    (table,) = comparison_tables(COMPARISON)
    assert table.title == f"base → tuned: {PIN}"
    assert [row[0] for row in table.rows] == [" multi_turn_long_context", " java", "Multi-Turn", "all"]
    assert table.rows[2][1:] == ("300", "30.0", "34.0", "+4.0 [1.0, 9.0]", "-7 +25", "– ")
    assert table.rows[0][1:] == ("200", "10.0", "20.0", "+10.0 [5.0, 15.0]", "-2 +22", "<.001*")
    assert [row[-1] for row in table.rows[1:]] == ["0.727 ", "– ", "0.002 "]
    assert table.notes[-1].startswith("official averages: ")
    assert table.notes[0] == "warning: prompt differs: 'training' and 'native'"
    lines = shown(table, 80)
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "multi_turn_long" in line]
    assert line.endswith(" 200  10.0   20.0  +10.0 [5.0, 15.0]  -2 +22  <.001*")
    folded = shown(table, 60)
    assert any(line.endswith("20.0  +10.0 [5.0, 15.0]  -2 +22  <.001*") for line in folded)
    nothing = {"metrics": {"soft": [{"group": "all", "n": 0}], "strict": []}}
    tables = comparison_tables({**COMPARISON, **nothing})
    assert [table.title.rsplit(", ")[-1] for table in tables] == ["soft", "strict"]
    assert tables[0].rows == [("all", "0", *["–"] * 5)]
    assert not any("official averages" in note for table in tables for note in table.notes)


def test_a_comparison_as_markdown() -> None:
    text = comparison_markdown(COMPARISON)
    assert "| &nbsp;java | 100 | 50.0 | 48.0 | -2.0 | [-10.0, 6.0] | 5 | 3 | 0.727 | 0.727 |" in text
    assert "| 2 | 22 | <.001 | <.001* |" in text
    assert "| Multi-Turn | 300 | 30.0 | 34.0 | +4.0 | [1.0, 9.0] | 7 | 25 | – | – |" in text
    assert "- official averages: " in text
    assert "| all | 300 | 20.0 | 29.0 | +6.0 | [2.0, 10.0] | 7 | 25 | 0.002 | – |" in text
    assert "- tuned: prompt native, format toolrl" in text
    assert "- **warning**: prompt differs" in text


def test_tables_are_written(tmp_path: Path) -> None:
    paths = write_tables([whole_bfcl()], tmp_path / "new")
    assert [path.name for path in paths] == ["tables.md", "tables.csv", "tables.tex"]
    assert paths[0].read_text(encoding="utf-8") == render_markdown([whole_bfcl()])
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    with pytest.raises(ValueError, match="cannot write to"):
        write_tables([whole_bfcl()], paths[0])


@pytest.mark.parametrize("number", [1, 2, 3, 17])
def test_a_radar_chart_is_drawn(tmp_path: Path, number: int) -> None:
    names = (*MULTI_TURN, *NON_LIVE, *LIVE)[:number]
    pair = [
        bfcl({name: group(level) for name in names}, model=model) for level, model in ((0.3, "_a$b"), (0.9, "tuned"))
    ]
    path = draw_radar(pair, tmp_path / "new" / "radar.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    alone = draw_radar(pair[:1], tmp_path / "alone.png").read_bytes()
    assert alone != content


def test_few_groups_are_drawn_as_bars() -> None:
    axes = draw_polygons(Figure(), ["a", "b", "c"], {"m": [Accuracy(value, value, value) for value in (0.5, 1.0, 0.0)]})
    (line,) = axes.lines
    assert list(line.get_ydata()) == [50.0, 100.0, 0.0, 50.0]
    steps = {round(float(after - before), 6) for before, after in pairwise(line.get_xdata()[:-1])}
    assert steps == {round(2 * 3.14159265358979 / 3, 6)}
    bars = draw_bars(Figure(), ["a"], {"m": [Accuracy(0.5, 0.4, 0.7)], "o": [Accuracy(0.25, 0.25, 0.25)]})
    assert [bar.get_height() for bar in bars.patches] == [50.0, 25.0]


@pytest.mark.parametrize(
    ("summaries", "message"),
    [
        ([], "no evaluations given"),
        (
            [bfcl({"simple": group()}), bfcl({"simple": group()}, pin="another")],
            "evaluations with different pins",
        ),
        ([bfcl({"simple": group()}), bfcl({"java": group()})], "share no group"),
        ([api_bank(groups={"overall": group()})], "share no group"),
    ],
)
def test_undrawable_evaluations_are_refused(tmp_path: Path, summaries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_radar(summaries, tmp_path / "radar.png")
    assert list(tmp_path.iterdir()) == []

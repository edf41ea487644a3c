"""The HTML report: the data in the page, and in a headless Chromium its behavior, also with hostile responses."""

from __future__ import annotations

import base64
import gzip
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.config import RunConfig, parse_toml
from rest_rl.report.diagnosis import diagnose
from rest_rl.report.html import MAX_POINTS, build_page_data, downsample, source_hash, write_html_report
from rest_rl.report.page import write_report
from rest_rl.report.responses import MAX_CHARACTERS, MISSING_CODE, select_rows
from rest_rl.report.tables import Curve
from rest_rl.response import Region
from rest_rl.runlog import RunLog, read_run
from tests.chromium import Page, open_browser

GOLD = {"calls": [{"name": "f", "arguments": {"x": 1}}], "answer": None}
CALL = '<think>a</think>\n<tool_call>\n{{"name": "{name}", "parameters": {{{arguments}}}}}\n</tool_call>'
RIGHT = CALL.format(name="f", arguments='"x": 1')
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "\x00\x01null",
    "\u202eright to left\u202c \u200f",
    "\ud800 alone",
    "\u2028\u2029\u0085",
    "{{data}}{{script}}",
    "שלום عالم",
    "x" * 100_000,
    "]]><!-- `${document.title='owned'}`",
    "a\u034f\u3164\uffa0\u2800\U000e0041\U000e0fff",
]


def tokens(*pieces: tuple[str, Region], advantage: float = 0.5) -> dict[str, Any]:
    """The tokens of a row: weights w = 0.5, 1.0, 1.5, ..., entropies w / 10, log-probabilities -w^2 / 5."""
    numbers = [0.5 * (i + 1) for i in range(len(pieces))]
    return {
        "response": "".join(text for text, _ in pieces),
        "lengths": [len(text) for text, _ in pieces],
        "regions": [int(region) for _, region in pieces],
        "weights": numbers,
        "entropies": [number / 10 for number in numbers],
        "logps": [-(number**2) / 5 for number in numbers],
        "advantage": advantage,
        "truncated": False,
    }


def make_run(folder: Path, rows: list[dict[str, Any]], steps: int = 3, **changes: Any) -> Path:
    overrides = ['rest.format="toolrl"', *(f"{key}={value}" for key, value in changes.items())]
    log = RunLog.create(folder, RunConfig.from_toml("", overrides).to_toml(), ["rest-rl", "train"])
    for step in range(1, steps + 1):
        log.add_metrics({"step": step, "reward": step / 10, "rest/entropy/name": 0.5, "own": 1.0})
    log.add_responses({"gold": GOLD, "reward": 0.5, "progress": 0.0, **row} for row in rows)
    return folder


def token_rows(count: int, steps: int) -> list[dict[str, Any]]:
    pieces = (("<think>", Region.FORMAT), ("why", Region.REASONING), ("</think>", Region.FORMAT), ("", Region.FORMAT))
    return [{"step": 1 + i * steps // count, "id": f"s{i // 4}", **tokens(*pieces)} for i in range(count)]


def contents(page: Path) -> tuple[dict[str, Any], bytes]:
    """The data of the page, decoded as its script does."""
    text = page.read_text(encoding="utf-8")
    parts = [re.search(rf'id="{name}">([^<]*)</script>', text) for name in ("data", "token-data")]
    data, columns = (gzip.decompress(base64.b64decode(part[1])) for part in parts if part)
    return json.loads(data), columns


# The data in the page


def test_tokens_are_stored_in_columns(tmp_path: Path) -> None:
    row = {"step": 1, "id": "a", **tokens(("ab", Region.NAME), ("", Region.FORMAT))}
    bare = {"step": 2, "id": "b", "response": "one two"}
    data, columns = contents(write_html_report([make_run(tmp_path / "run", [row, bare])]))
    first, second = data["responses"]
    assert (first["o"], first["m"], second["o"], second["m"]) == (0, 2, 2, 2)
    words = struct.unpack_from("<4I", columns)
    assert [data["words"][place] for place in words] == ["ab", "", "one ", "two"]
    weights, entropies, surprises = (struct.unpack_from("<4H", columns, 16 + 8 * i) for i in range(3))
    assert weights == (500, 1000, MISSING_CODE, MISSING_CODE)
    assert entropies == (50, 100, MISSING_CODE, MISSING_CODE)
    assert surprises == (50, 200, MISSING_CODE, MISSING_CODE)  # 0.25 / 5 and 1 / 5 nats
    assert list(columns[40:]) == [Region.NAME, Region.FORMAT, Region.OTHER, Region.OTHER]
    assert (first["u"], first["A"], second["u"], second["A"]) == (1, 0.5, 0, None)


@pytest.mark.parametrize(
    ("response", "flags"),
    [
        (RIGHT, {"exact"}),
        (CALL.format(name="f", arguments='"x": 2'), {"argument"}),
        (CALL.format(name="f", arguments='"y": 1'), {"argument"}),
        (CALL.format(name="g", arguments='"x": 1'), {"tool"}),
        (RIGHT.replace("\n</tool_call>", '\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'), {"extra"}),
        ("<think>a</think>\n<response>no</response>", {"format", "missing"}),
        ("<think>a</think>\n<tool_call>\nno json\n</tool_call>", {"unreadable"}),
        ("nothing", {"format", "missing"}),
    ],
)
def test_responses_can_be_filtered_by_their_mistakes(tmp_path: Path, response: str, flags: set[str]) -> None:
    rows = [{"step": 1, "id": "a", "response": response}]
    data, _ = build_page_data([read_run(make_run(tmp_path / "run", rows))])
    assert set(data["responses"][0]["k"]) == flags


def test_an_unneeded_call_is_extra_and_truncation_is_a_flag(tmp_path: Path) -> None:
    rows = [{"step": 1, "id": "a", "response": RIGHT, "gold": {"calls": [], "answer": "no"}, "truncated": True}]
    data, _ = build_page_data([read_run(make_run(tmp_path / "run", rows))])
    assert set(data["responses"][0]["k"]) == {"format", "extra", "truncated"}


@pytest.mark.parametrize(
    "broken",
    [
        {"lengths": [1]},
        {"lengths": [1, -1], "regions": [0, 0]},
        {"lengths": [3, 4], "regions": [0, 99]},
        {"lengths": "ab", "regions": [True]},
        {"response": 7},
        {"response": None, "id": {"a": 1}, "step": "x", "reward": "high", "advantage": [], "gold": "f"},
        {"lengths": [3, 4], "regions": [0, 0], "weights": [1], "entropies": ["a", None], "logps": {}},
    ],
)
def test_malformed_rows_are_shown_as_far_as_possible(tmp_path: Path, broken: dict[str, Any]) -> None:
    rows = [{"step": 1, "id": "a", "response": "one two", **broken}, {"step": 1, "id": "b", "response": "next"}]
    data, columns = contents(write_html_report([make_run(tmp_path / "run", rows)]))
    assert len(data["responses"]) == 2
    assert len(columns) == 11 * sum(response["m"] for response in data["responses"])
    words = struct.unpack_from(f"<{len(columns) // 11}I", columns)
    shown = "".join(data["words"][place] for place in words[: data["responses"][0]["m"]])
    assert shown == (broken.get("response", "one two") if isinstance(broken.get("response", ""), str) else "")


def test_an_unavailable_format_removes_only_the_scores(tmp_path: Path) -> None:
    rows = [{"step": 1, "id": "a", "response": RIGHT}]
    folder = make_run(tmp_path / "run", rows)
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('format = "toolrl"', 'format = "nowhere.at_all:FORMAT"'))
    data, _ = build_page_data([read_run(folder)])
    assert (data["responses"][0]["F"], data["responses"][0]["k"]) == (None, [])


def test_prompts_are_stored_once_per_group(tmp_path: Path) -> None:
    rows = [{"step": step, "id": "a", "response": "r", **({"prompt": "P"} if i == 0 else {})}
            for step in (1, 2) for i in range(3)]  # fmt: skip
    rows.append({"step": 2, "id": "b", "response": "r"})
    data, _ = build_page_data([read_run(make_run(tmp_path / "run", rows))])
    assert data["prompts"] == ["P"]
    assert [response["p"] for response in data["responses"]] == [0] * 6 + [-1]


def test_too_many_responses_leave_evenly_spaced_steps() -> None:
    rows = [{"step": step, "at": i} for step in range(1, 11) for i in range(8)]
    assert select_rows(rows, 80) == rows
    # 40 of 80 rows are 5 of 10 steps: places 0, 9 * 1 // 4 = 2, 4, 6, 9
    assert [row["step"] for row in select_rows(rows, 40)] == [step for step in (1, 3, 5, 7, 10) for _ in range(8)]
    assert [row["at"] for row in select_rows(rows[:8], 3)] == [0, 1, 2]
    assert select_rows(rows, 0) == []


def test_long_responses_are_shortened_and_marked(tmp_path: Path) -> None:
    row = {
        "step": 1,
        "id": "a",
        **tokens(("a" * MAX_CHARACTERS, Region.OTHER), ("bc", Region.NAME), ("d", Region.NAME)),
    }
    data, _ = build_page_data([read_run(make_run(tmp_path / "run", [row]))])
    assert (data["responses"][0]["n"], data["responses"][0]["m"]) == (3, 2)
    assert [len(word) for word in data["words"]] == [MAX_CHARACTERS, 0]


def test_long_curves_keep_their_extremes() -> None:
    values = [float(i) for i in range(2 * MAX_POINTS)]
    steps = list(range(1, len(values) + 1))
    line = downsample(Curve(steps, values, values, values))
    # stretches of two: 0 and 1, 2 and 3, ...
    assert (line.steps[:2], line.mean[:2], line.low[:2], line.high[:2]) == ([2, 4], [0.5, 2.5], [0.0, 2.0], [1.0, 3.0])
    assert len(line.steps) == MAX_POINTS


def test_curves_differences_and_findings_are_in_the_page(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, [], **{"rest.preset": name}) for name in ("rest", "grpo")]
    data, _ = build_page_data([read_run(folder) for folder in folders])
    titles = {chart["title"]: chart for chart in data["charts"]}
    assert [line["y"] for line in titles["Reward"]["series"]] == [[0.1, 0.2, 0.3]] * 2
    assert titles["Entropy by region"]["series"][0]["region"] == "name"
    assert titles["own"]["aside"]
    differing = {row["key"]: row["values"] for row in data["config"] if row["differs"]}
    assert differing["rest.preset"] == ['"rest"', '"grpo"']
    assert not differing.keys() & {"run.out", "trl.max_steps"}


def truncated_run(folder: Path) -> Path:
    """A run whose responses hit the length limit in every step."""
    log = RunLog.resume(make_run(folder, [], 0), 0)
    for step in range(1, 31):
        log.add_metrics({"step": step, "reward": 0.1, "completions/clipped_ratio": 0.9})
    return folder


@pytest.mark.parametrize("row", [{"loss": 2.0}, {"step": None, "loss": 2.0}, {"step": "x", "loss": 2.0}])
def test_metrics_without_a_step_are_left_out(tmp_path: Path, row: dict[str, Any]) -> None:
    folder = make_run(tmp_path / "run", [{"step": 1, "id": "a", "response": RIGHT}])
    log = RunLog(folder)
    log.add_metrics(row)
    log.add_evaluation({**row, "exact_match": 0.5})
    data, _ = contents(write_html_report([folder]))
    assert data["runs"][0]["steps"] == 3
    assert not [chart for chart in data["charts"] if chart["title"] == "Loss"]
    assert "Loss" not in write_report([folder]).read_text()


def test_findings_equal_those_of_the_diagnosis(tmp_path: Path) -> None:
    run = read_run(truncated_run(tmp_path / "run"))
    data, _ = build_page_data([read_run(make_run(tmp_path / "well", [], **{"run.seed": 7})), run])
    expected = diagnose(run.metrics, run.evaluations, parse_toml(run.config, "run"))
    assert expected
    at = [facts["name"] for facts in data["runs"]].index("run")
    found = [finding for finding in data["findings"] if finding["run"] == at]
    assert found == [{"run": at, **finding._asdict()} for finding in expected]


def test_the_page_is_one_file_without_network_access(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [{"step": 1, "id": text, "response": text} for text in HOSTILE])
    page = write_html_report([folder])
    text = page.read_text(encoding="utf-8")
    assert page == folder / "report.html"
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|\beval\(", text
    )
    assert "owned" not in text  # the data are base64 text
    assert text.count("</script>") == 3
    script, style = (
        text[text.rindex("<script>") + 8 : text.rindex("</script>")],
        re.search(r"<style>(.*?)</style>", text, re.DOTALL),
    )
    assert style is not None
    policy = f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style[1])}; "
    assert f'content="{policy}' in text
    assert write_html_report([folder], tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_names_of_folders_are_escaped(tmp_path: Path) -> None:
    page = write_html_report([make_run(tmp_path / '<b>&"', [])])
    assert "<title>&lt;b&gt;&amp;&quot; · rest-rl report</title>" in page.read_text()


def test_the_command_writes_to_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", token_rows(8, 2))
    assert main(["report", str(folder), "--html", "--out", str(tmp_path / "new" / "x.html"), "--responses", "4"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "new" / "x.html"
    assert len(contents(page)[0]["responses"]) == 4
    (tmp_path / "file").write_text("")
    for wrong in (["--responses", "-1"], ["--out", str(tmp_path / "file" / "below")]):
        assert main(["report", str(folder), "--html", *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")


# The page in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with 5,000 responses of two runs."""
    folder = tmp_path_factory.mktemp("many")
    rows = token_rows(2500, 50)
    for row in rows[::10]:
        row["response"], row["lengths"], row["truncated"] = "<think>needle</think>", [7, 6, 8, 0], True
    folders = [make_run(folder / name, rows, 50, **{"rest.preset": name}) for name in ("rest", "grpo")]
    return write_html_report(folders, folder / "page.html")


def text_of(tab: Page, selector: str) -> str:
    return tab.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def count_of(tab: Page, selector: str) -> int:
    return tab.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def selected_row(tab: Page) -> int:
    return tab.evaluate("Number(document.querySelector('[aria-selected=true]').getAttribute('aria-posinset'))")


def test_hostile_text_is_only_displayed(tab: Page, tmp_path: Path) -> None:
    rows = [{"step": 1, "id": text, "prompt": text, **tokens(("<think>", Region.FORMAT), (text, Region.REASONING))}
            for text in HOSTILE]  # fmt: skip
    rows += [{"step": 2, "id": "old", "response": text} for text in HOSTILE]
    page = write_html_report([make_run(tmp_path / "run", rows)])
    tab.problems.clear()
    shown = []
    tab.open(page)
    for _ in rows:
        shown.append(text_of(tab, "#tokens"))
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        tab.press("j")
    assert tab.problems == []
    assert tab.evaluate("document.title") == "run · rest-rl report"
    assert shown[0] == "<think>" + HOSTILE[0]
    assert shown[1] == "<think>" + HOSTILE[1]
    assert shown[2] == "<think>\\x00\\x01null"
    assert shown[3] == "<think>‹U+202E›right to left‹U+202C› ‹U+200F›"
    assert shown[4] == "<think>‹U+D800› alone"
    assert shown[5] == "<think>‹U+2028›‹U+2029›\\x85"
    assert shown[7] == "<think>שלום عالم"
    assert shown[8] == "<think>" + "x" * 4000 + "… 96,000 more characters"
    assert shown[10] == "<think>a‹U+034F›‹U+3164›‹U+FFA0›‹U+2800›‹U+E0041›‹U+E0FFF›"
    assert shown[11] == HOSTILE[0]
    assert shown[19] == "x" * 100_000


def test_the_list_contains_only_the_visible_rows(tab: Page, many: Path) -> None:
    tab.open(many)
    assert text_of(tab, "#count") == "5,000 of 5,000"
    assert 5 < count_of(tab, ".row") < 60
    last = tab.evaluate("""new Promise((resolve) => {
        const list = document.getElementById("list");
        list.addEventListener("scroll", () => setTimeout(() => {
            resolve(Math.max(...[...document.querySelectorAll(".row")].map((row) => row.ariaPosInSet)));
        }), { once: true });
        list.scrollTop = list.scrollHeight;
    })""")
    assert last == 5000
    assert count_of(tab, ".row") < 60


def test_keys_move_through_responses_tokens_and_steps(tab: Page, many: Path) -> None:
    tab.problems.clear()
    tab.open(many)
    tab.press("j", "j", "k")
    assert selected_row(tab) == 2
    tab.evaluate("document.getElementById('list').focus()")
    tab.press("ArrowDown", "End")
    assert selected_row(tab) == 5000
    tab.press("Home", "ArrowRight", "ArrowRight")
    assert text_of(tab, "#readout").startswith("needle 2 of 4 · region reasoning · weight 1.000 · entropy 0.100 nats")
    # logp -1 / 5: exp(-0.2) = 0.819; weight 1.0 times advantage 0.5
    assert text_of(tab, "#readout").endswith("probability 0.819 · weight × advantage +0.50")
    tab.press("]")
    assert (text_of(tab, "#step-shown"), text_of(tab, "#count")) == ("1 / 50", "100 of 5,000 at step 1")
    tab.press("]", "]", "[")
    assert text_of(tab, "#step-shown") == "2 / 50"
    tab.press("a", "2")
    assert text_of(tab, "#count") == "5,000 of 5,000"
    assert text_of(tab, "#modes [aria-checked=true]") == "Weight"
    dark = tab.evaluate("document.documentElement.dataset.theme")
    tab.press("t")
    assert tab.evaluate("document.documentElement.dataset.theme") != dark
    tab.press("t", "?")
    assert tab.evaluate("document.getElementById('help').open")
    tab.press("Escape")
    assert tab.problems == []


def test_search_and_filters_find_responses(tab: Page, many: Path) -> None:
    tab.open(many)
    tab.press("/", *"needle")
    assert text_of(tab, "#count") == "500 of 5,000"
    assert text_of(tab, ".t.hit") == "needle"
    tab.evaluate("document.querySelector('[data-flag=truncated]').click()")
    assert text_of(tab, "#count") == "500 of 5,000"
    tab.evaluate("document.querySelector('[data-flag=exact]').click()")
    assert text_of(tab, "#count") == "0 of 5,000"
    assert "No response matches the filters" in text_of(tab, "#detail")


def test_the_address_restores_the_view(tab: Page, many: Path) -> None:
    tab.open(many, "#step=7&color=entropy&only=truncated&order=worst&run=1&search=needle")
    assert text_of(tab, "#count") == "5 of 5,000 at step 7"
    assert text_of(tab, "#modes [aria-checked=true]") == "Entropy"
    tab.open(many, "#step=999&color=__proto__&only=nonsense,__proto__&order=constructor&run=9&response=99999999")
    assert text_of(tab, "#count") == "5,000 of 5,000"


def test_tokens_are_colored_by_the_selected_mode(tab: Page, many: Path) -> None:
    colors = {}
    tab.open(many)
    for key, mode in enumerate(("region", "weight", "entropy", "surprise", "advantage"), start=1):
        tab.press(str(key))
        colors[mode] = tab.evaluate("[...document.querySelectorAll('.t')].map((e) => e.style.backgroundColor)")
        assert tab.evaluate("document.querySelector('.strip').style.backgroundImage").startswith("linear-gradient")
    assert colors["region"][0] == colors["region"][2] != colors["region"][1]  # format, reasoning, format
    assert len(set(colors["weight"])) == 4  # 0.5, 1.0, 1.5, 2.0
    assert len({tuple(values) for values in colors.values()}) == 5


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_follows_the_system(tab: Page, many: Path, dark: bool) -> None:
    tab.open(many, dark=dark)
    tab.evaluate("localStorage.removeItem('rest-rl-theme')")
    tab.open(many, dark=dark)
    ink, paper = (
        sum(map(int, re.findall(r"\d+", tab.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) is dark
    assert abs(ink - paper) > 500  # of 765: far apart in both


def test_findings_are_at_the_top_and_link_to_their_step(tab: Page, tmp_path: Path) -> None:
    folder = truncated_run(tmp_path / "run")
    finding = build_page_data([read_run(folder)])[0]["findings"][0]
    tab.open(write_html_report([folder]))
    for part in (finding["figure"], finding["cause"], finding["remedy"]):
        assert part in text_of(tab, "#finding-list li")
    tab.evaluate("document.querySelector('#finding-list button').click()")
    assert text_of(tab, "#step-shown") == f"{finding['step']} / 30"


def test_it_fits_a_narrow_screen(tab: Page, many: Path) -> None:
    tab.open(many, width=390, height=844)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_run_without_responses_has_its_curves(tab: Page, tmp_path: Path) -> None:
    tab.problems.clear()
    tab.open(write_html_report([make_run(tmp_path / "run", [])]))
    assert count_of(tab, "figure svg") >= 2
    assert "recorded no responses" in text_of(tab, "#detail")
    assert tab.problems == []


def legend_of(tab: Page, title: str) -> list[str]:
    """The legend of a chart: its lines with their values, and the step of these values."""
    return tab.evaluate(f"""(() => {{
        const figures = [...document.querySelectorAll("figure")];
        const figure = figures.find((one) => one.querySelector("b").textContent === {json.dumps(title)});
        return [...figure.querySelector(".legend").children].map((part) => part.textContent);
    }})()""")


def test_a_line_without_a_value_at_a_step_has_a_dash(tab: Page, tmp_path: Path) -> None:
    log = RunLog(make_run(tmp_path / "run", [], 0))
    for step in range(1, 21):  # no answers after step 10; evaluated after steps 8 and 16
        answer = {"rest/entropy/answer": 0.7} if step <= 10 else {}
        log.add_metrics({"step": step, "reward": 0.1, "rest/entropy/name": 0.5, **answer})
        if step % 8 == 0:
            log.add_evaluation({"step": step, "exact_match": 0.25, "exact_match_error": 0.0})
    page, title = write_html_report([log.folder]), "Entropy by region"
    tab.problems.clear()
    tab.open(page)
    assert legend_of(tab, title) == ["name 0.500", "answer –", "at the end (–: no value)"]
    assert legend_of(tab, "Exact match, held out, sampled at T = 1") == ["rest 25.0 %", "at the end"]
    label = tab.evaluate("[...document.querySelectorAll('svg')].map((svg) => svg.ariaLabel)")
    assert "Entropy by region, at the end: name 0.500 nats, answer –" in label
    for step, shown in ((11, "answer 0.700"), (12, "answer –")):  # 11 is within a step of 10
        tab.open(page, f"#step={step}")
        assert legend_of(tab, title)[1] == shown
        assert legend_of(tab, title)[2].startswith(f"at step {step}")
        assert legend_of(tab, "Exact match, held out, sampled at T = 1")[0] == "rest 25.0 %"
    assert tab.problems == []


def test_a_killed_run_shows_its_planned_steps(tab: Page, tmp_path: Path) -> None:
    killed = make_run(tmp_path / "killed", [], 8, **{"trl.max_steps": 24})
    RunLog(killed).add_timing({"step": 9})
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (killed / name).open("a") as file:
            file.write('{"step": 9, "rew')
    endless = make_run(tmp_path / "endless", [], 2, **{"run.seed": 1})
    done = make_run(tmp_path / "done", [], 4, **{"trl.max_steps": 4})
    RunLog(done).update_summary(steps=4)
    tab.open(write_html_report([killed, endless, done], tmp_path / "page.html"))
    rows = tab.evaluate("[...document.querySelectorAll('#result-table tbody tr')].map((row) => row.cells[3].innerText)")
    assert sorted(rows) == ["2 of ?", "4", "9 of 24"]

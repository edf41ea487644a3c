"""Result tables in the paper's layout (rows are models, columns are groups), and the tables of a comparison.

The input is the contents of summary.json files, or of a comparison.json. Evaluations with different pins (versions of
data and checker) never share a table, a partially evaluated group is marked, and an average is shown only if the
summary contains it, which requires that all its categories were fully scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rest_rl.errors import UserError
from rest_rl.evaluate.benchmarks.bfcl.groups import LIVE, MULTI_TURN, NON_LIVE
from rest_rl.evaluate.harness import OVERALL
from rest_rl.jsonl import describe_os_error
from rest_rl.report.tables import format_percent, is_number, markdown_table
from rest_rl.response import TURNS
from rest_rl.runlog import replace_file

Summary = Mapping[str, Any]
Models = Sequence[tuple[str, Summary]]
"""(name, summary) of evaluations with the same benchmark and pin."""
AVERAGES = "Averages"
BENCHMARK_TITLES = {"bfcl": "BFCL", "api_bank": "API-Bank", "tool_world": "Tool world", "office": "Office"}
METRIC_TITLES = {"soft": "soft (the published metric)", "strict": "strict (exactly the one right call)"}
BFCL_LABELS = {
    "simple": "Simple Python",
    "java": "Simple Java",
    "javascript": "Simple JavaScript",
    "simple_javascript": "Simple JavaScript",
}
ISSUE_LABELS = {
    "overflow": "exceeded the context",
    "refused": "without a prompt",
    "truncated": "truncated",
    "errors": "not scored",
}
"""Counts of a group in addition to its verdicts, with their labels in tables."""
MODEL_COLUMNS = ("benchmark", "version", "pin", "model", "prompt", "format")
SCORE_FIELDS = ("n", "of", "correct", "accuracy", "low", "high")
COLUMNS = [*MODEL_COLUMNS, "metric", "table", "column", *SCORE_FIELDS, *ISSUE_LABELS]
DASH, SIGNIFICANCE_LEVEL = "–", 0.05
SHORT_LEGEND = (
    "change: percentage points with 95 % interval (Bonett-Price); flips: samples lost and gained; "
    "p: McNemar's exact test, * if q <= 0.05 among the groups (Benjamini-Hochberg)"
)
LONG_LEGEND = (
    "Only samples scored in both evaluations count. change: percentage points with the 95 % interval of Bonett and "
    "Price (2012); lost, gained: samples that only the base model or only the tuned model got right; p: McNemar's "
    "exact test; q: p adjusted over the groups by Benjamini and Hochberg (1995), * if at most 0.05."
)
ATTEMPTS_NOTE = "with several attempts at a task: t intervals over the tasks, and p of a sign-flip test over the tasks"
AVERAGES_NOTE = "official averages: intervals combined from the groups' by MOVER (Zou and Donner, 2008); no test"


class Column(NamedTuple):
    """A column: its label and the group or official average that it shows."""

    label: str
    group: str
    is_average: bool = False


class Section(NamedTuple):
    """The title, the columns and the metric of one table."""

    title: str
    columns: Sequence[Column]
    metric: str = "correct"


@dataclass(frozen=True)
class ResultTable:
    """One table. `frame` has one row per model and column, model by model, with the fields in `COLUMNS` and `group`."""

    title: str
    span: str
    """The heading over all columns."""
    caption: str
    frame: pd.DataFrame
    notes: tuple[str, ...]

    def grid(self, text: Callable[[Any], str]) -> pd.DataFrame:
        """Return the table with a row per model and a column per group; `text` turns a row of `frame` into a cell."""
        # not a pivot, which would sort: the frame is in row-major order, all columns of the first model first
        names, labels = self.frame["model"].unique(), self.frame["column"].unique()
        cells = [text(row) for row in self.frame.itertuples()]
        rows = [cells[start : start + len(labels)] for start in range(0, len(cells), len(labels))]
        return pd.DataFrame(rows, index=names, columns=labels)


class TextTable(NamedTuple):
    """A table of strings whose first column labels the rows, and notes to print below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def results_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """Return all results in one frame, with one row per table, model and column; accuracies are between 0 and 1."""
    frames = [table.frame for table in build_tables(summaries)]
    frames = frames or [pd.DataFrame(columns=COLUMNS, dtype=object)]
    return pd.concat(frames, ignore_index=True).reindex(columns=COLUMNS)


def build_tables(summaries: Sequence[Summary]) -> list[ResultTable]:
    """Return the result tables of the evaluations, separately for each combination of benchmark, version and pin."""
    return [
        build_table(section, models) for models in group_by_edition(summaries) for section in build_sections(models)
    ]


def group_by_edition(summaries: Sequence[Summary]) -> list[Models]:
    """Group the evaluations by benchmark, version and pin; each group contains pairs of model name and summary."""
    found: dict[str, list[tuple[str, Summary]]] = {}
    for name, summary in zip(model_names(summaries), summaries, strict=True):
        found.setdefault(edition_key(summary), []).append((name, summary))
    return list(found.values())


def edition_key(summary: Summary) -> str:
    return str([summary.get(key) for key in ("benchmark", "version", "pin")])


# Two passes: names that occur twice within an edition get prompt and format appended; if they still collide, a number.
def model_names(summaries: Sequence[Summary]) -> list[str]:
    """Return one model name per summary; prompt and format, then a number, are appended to names that occur twice."""
    twins = [(str(summary.get("model") or "model"), edition_key(summary)) for summary in summaries]
    twins = [
        (f"{twin[0]} ({describe_prompt(summary)})" if twins.count(twin) > 1 else twin[0], twin[1])
        for twin, summary in zip(twins, summaries, strict=True)
    ]
    numbers = [f" #{twins[:i].count(twin) + 1}" if twins.count(twin) > 1 else "" for i, twin in enumerate(twins)]
    return [name + number for (name, _), number in zip(twins, numbers, strict=True)]


def describe_prompt(summary: Summary) -> str:
    return f"prompt {summary.get('prompt', 'unknown')}, format {summary.get('format', 'unknown')}"


def build_sections(models: Models) -> list[Section]:
    """Return the non-empty tables for evaluations with the same benchmark, version and pin.

    BFCL has a table for the official averages, one per part (such as Live), and one for all other categories.
    """
    first = models[0][1]
    groups = list(dict.fromkeys(str(name) for _, summary in models for name in scored_groups(summary)))
    if first.get("benchmark") != "bfcl":
        groups.sort(key=lambda name: [*TURNS, OVERALL, name].index(name))
        columns = [Column(display_label(name), name) for name in groups]
        metrics = [str(name) for name in first.get("metrics", ["correct"])]
        return [Section(METRIC_TITLES.get(name, name) if len(metrics) > 1 else "", columns, name) for name in metrics]
    official = list(dict.fromkeys(str(name) for _, summary in models for name in summary.get("official") or {}))
    official.sort(key=lambda name: name != "Overall")
    non_live = NON_LIVE["v4" if first.get("version") == "v4" else "v3"]
    parts = {"Multi-Turn": MULTI_TURN, "Non-Live": non_live, "Live": LIVE}
    known = {name for names in parts.values() for name in names}
    found = [Section(AVERAGES, [Column(name, name, is_average=True) for name in official])]
    for title, names in parts.items():
        if set(names) & set(groups):
            columns = [Column(bfcl_label(name), name) for name in names]
            found.append(Section(title, [Column("Overall", title, is_average=True), *columns]))
    found.append(Section("Other", [Column(name, name) for name in groups if name not in known and name != OVERALL]))
    return [section for section in found if section.columns]


def scored_groups(summary: Summary) -> dict[str, Any]:
    return {**(summary.get("groups") or {}), **(summary.get("turns") or {})}


def display_label(name: str) -> str:
    """Return a group's label: `Level 1` for `Level1`, `Unseen tools` for `unseen_tools`, `Call turns` for `calls`."""
    text = {**TURNS}.get(name) or re.sub(r"(?<=[a-z])(\d+)$", r" \1", name.replace("_", " "))
    return text.capitalize()


def bfcl_label(name: str) -> str:
    """Return the label of a BFCL category, without the name of its part: `Miss Func` for `multi_turn_miss_func`."""
    return BFCL_LABELS.get(name) or name.removeprefix("multi_turn_").removeprefix("live_").replace("_", " ").title()


def column_scores(summary: Summary, column: Column, metric: str = "") -> dict[str, Any]:
    """Return a model's scores in a column, with the keys `SCORE_FIELDS`; all are None if nothing was scored."""
    found = ((summary.get("official") or {}) if column.is_average else scored_groups(summary)).get(column.group) or {}
    own = found[metric] if isinstance(found.get(metric), Mapping) else found
    if not is_number(own.get("accuracy")) or not (found.get("n") or column.is_average):
        return dict.fromkeys(SCORE_FIELDS)
    return {
        **{name: own.get(name) for name in SCORE_FIELDS},
        "n": found.get("n"),
        "of": None if column.is_average else found.get("of"),
    }


def build_table(section: Section, models: Models) -> ResultTable:
    records = []
    for name, summary in models:
        about = {**{key: summary.get(key) for key in MODEL_COLUMNS}, "model": name, "metric": section.metric}
        for column in section.columns:
            group = {} if column.is_average else scored_groups(summary).get(column.group, {})
            issues = {key: to_count(group[key]) if key in group else None for key in ISSUE_LABELS}
            place = {"table": section.title, "column": column.label, "group": column.group}
            records.append({**about, **place, **column_scores(summary, column, section.metric), **issues})
    # dtype=object keeps counts with missing values as int and None; pandas would convert them to float and NaN
    frame = pd.DataFrame(records, columns=[*COLUMNS, "group"], dtype=object)
    first, prompts = models[0][1], {describe_prompt(summary) for _, summary in models}
    benchmark = str(first.get("benchmark"))
    head = " ".join(filter(None, (BENCHMARK_TITLES.get(benchmark, benchmark), first.get("version"))))
    asked = "prompts or formats differ, see the notes" if len(prompts) > 1 else next(iter(prompts))
    intervals = interval_method(has_averages=any(column.is_average for column in section.columns))
    return ResultTable(
        title=f"{head}, {section.title}" if section.title else head,
        span=section.title,
        caption=f"{first.get('pin')}; {asked}; accuracy in per cent with {intervals}.",
        frame=frame,
        notes=tuple(_notes(section, models, frame, with_prompts=len(prompts) > 1)),
    )


def interval_method(*, has_averages: bool) -> str:
    return "95 % Wilson intervals" + (", combined by MOVER for averages" if has_averages else "")


def _notes(section: Section, models: Models, frame: pd.DataFrame, *, with_prompts: bool) -> Iterator[str]:
    # what readers must know to interpret the scores: partial groups, failures, the scope of averages, ceilings
    partial: list[Any] = [row for row in frame.itertuples() if is_partial(row)]
    if partial:
        yield "Cells with * cover only a part of their group."
    names = {column.group for column in section.columns if not column.is_average}
    for name, summary in models:
        groups = {key: group for key, group in (summary.get("groups") or {}).items() if key != OVERALL}
        # count each sample once: skip sums of groups; use all groups if the table shows only averages
        issues = format_issues([group for key, group in groups.items() if key in names or not names])
        parts = ", ".join(f"{row.column} {row.n} of {row.of}" for row in partial if row.model == name)
        if notes := [text for text in (describe_prompt(summary) if with_prompts else "", issues, parts) if text]:
            yield f"{name}: {'; '.join(notes)}."
    if section.title == AVERAGES:
        for name, average in (models[0][1].get("official") or {}).items():
            if of := average.get("of"):
                yield f"{name} averages {', '.join(of) if len(of) < 10 else f'all {len(of)} categories'}."
    yield from ceiling_notes(models[0][1])


def format_issues(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return how many samples had which problem, for example `3 truncated, 2 not scored`; empty if none had one."""
    counts = {name: sum(to_count(group.get(key)) for group in groups) for key, name in ISSUE_LABELS.items()}
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def to_count(value: Any) -> int:
    return value if isinstance(value, int) else len(value or ())


def ceiling_notes(summary: Summary) -> Iterator[str]:
    """Yield a note for each evaluated group in which correct use of the offered tools cannot reach 100 %."""
    for name, ceiling in (summary.get("ceilings") or {}).items():
        if ceiling.get("ids") and name in (summary.get("groups") or {}):
            limit = f"the offered tools allow at most {format_percent(ceiling.get('accuracy'))}"
            why = f"tools or arguments of the gold are missing in {', '.join(ceiling['ids'])}"
            yield f"{display_label(str(name))}: {limit}; {why}."


def is_partial(row: Any) -> bool:
    return row.n is not None and row.of is not None and row.n < row.of


def interval_text(low: Any, high: Any) -> str:
    """Return the interval in per cent, such as `[92.4, 96.7]`; empty if there is none."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]" if is_number(low) and is_number(high) else ""


def markdown_cell(row: Any) -> str:
    """Return a cell such as `95.0 [92.4, 96.7]`; for a partly scored group it includes the number of scored samples."""
    mark, part = ("*", f"(n = {row.n} of {row.of})") if is_partial(row) else ("", "")
    return " ".join(filter(None, (format_percent(row.accuracy) + mark, interval_text(row.low, row.high), part)))


def latex_cell(row: Any) -> str:
    if row.accuracy is None:
        return "--"
    number = format_percent(row.accuracy) + ("$^{*}$" if is_partial(row) else "")
    interval = interval_text(row.low, row.high)
    return rf"\withinterval{{{number}}}{{{interval}}}" if interval else number


def render_csv(summaries: Sequence[Summary]) -> str:
    return results_frame(summaries).to_csv(index=False, lineterminator="\n")


def render_markdown(summaries: Sequence[Summary]) -> str:
    """Render all tables as Markdown, each with title, caption and notes."""
    parts = []
    for table in build_tables(summaries):
        grid, notes = table.grid(markdown_cell), "\n".join(f"- {note}" for note in table.notes)
        parts += [
            f"### {table.title}",
            table.caption,
            markdown_table(("model", *grid.columns), grid.itertuples()),
            notes,
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


INTERVAL_MACRO = r"\providecommand{\withinterval}[2]{\begin{tabular}[t]{@{}c@{}}#1\\[-3pt]{\tiny #2}\end{tabular}}"
LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    # LaTeX reads one of these at the start of a row as an option of the preceding line break
    | {character: f"{{{character}}}" for character in "[]*"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ", "\r": " "}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "±": r"$\pm$", "≤": r"$\leq$"}
)


def escape_latex(text: str) -> str:
    return text.translate(LATEX_ESCAPES)


def render_latex(summaries: Sequence[Summary]) -> str:
    """Render all tables as LaTeX, one float per table; each word of a column header is on a separate line."""
    texts = []
    for table in build_tables(summaries):
        grid = table.grid(latex_cell)
        stacks = [r"\\".join(map(escape_latex, label.split())) for label in grid.columns]
        grid.columns = [rf"\shortstack{{{stack}}}" if r"\\" in stack else stack for stack in stacks]
        grid.insert(0, "Model", list(map(escape_latex, grid.index)))
        last = len(grid.columns)
        tabular = grid.to_latex(index=False, escape=False, column_format=f"@{{}}l{'c' * (last - 1)}@{{}}")
        over = rf"& \multicolumn{{{last - 1}}}{{c}}{{{escape_latex(table.span)}}} \\" + f"\n\\cmidrule(l){{2-{last}}}\n"
        tabular = tabular.replace("\\toprule\n", f"\\toprule\n{over}", 1) if table.span else tabular
        notes = (
            rf"\par\smallskip{{\scriptsize {escape_latex(' '.join(table.notes))}\par}}" + "\n" if table.notes else ""
        )
        begin = INTERVAL_MACRO + "\n\\begin{table}[t]\n\\centering\\footnotesize\\setlength{\\tabcolsep}{3.5pt}"
        caption = escape_latex(f"{table.title}. {table.caption}")
        texts.append(f"{begin}\n\\caption{{{caption}}}\n{tabular}{notes}\\end{{table}}\n")
    return "\n".join(texts)


def write_tables(summaries: Sequence[Summary], folder: str | Path) -> list[Path]:
    target = Path(folder)
    texts = {"md": render_markdown(summaries), "csv": render_csv(summaries), "tex": render_latex(summaries)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            replace_file(target / f"tables.{ending}", text)
    except OSError as error:
        remedy = "free some space or pass another folder"
        raise UserError(f"cannot write to {folder} ({describe_os_error(error)})", remedy=remedy) from error
    return [target / f"tables.{ending}" for ending in texts]


def terminal_table(summary: Summary) -> TextTable:
    """Return one evaluation as a table of at most 80 columns, with the issues of each group as notes.

    Each BFCL part comes before its categories; totals come last.
    """
    groups, metrics = scored_groups(summary), [str(name) for name in summary.get("metrics") or ["correct"]]
    parts = build_sections([("", summary)])
    columns = [
        column._replace(label=section.title if column.is_average else f" {column.group}")
        for section in parts[: None if len(metrics) == 1 else 1]
        for column in section.columns
        if section.title != AVERAGES and (column.is_average or column.group in groups)
    ]
    # with several metrics each has its own section with the same columns: one is enough, the metrics become columns
    shown = {column.group for column in columns}
    columns += [Column(name, name, is_average=True) for name in summary.get("official") or {} if name not in shown]
    sums = {"answers": TURNS["answers"], OVERALL: OVERALL, "calls": TURNS["calls"]}  # the headline last
    columns = [column for column in columns if column.group not in sums]
    columns += [Column(label, name) for name, label in sums.items() if name in groups]
    rows = []
    for column in columns:
        found = [column_scores(summary, column, metric) for metric in metrics]
        n, of = (groups[column.group].get(key, 0) for key in ("n", "of")) if not column.is_average else ("", "")
        cells = [
            text for own in found for text in (format_percent(own["accuracy"]), interval_text(own["low"], own["high"]))
        ]
        rows.append((column.label, f"{n}" if n == of else f"{n} of {of}", *cells))
    header = ("", "n", *(title for name in metrics for title in (name if len(metrics) > 1 else "percent", "95 %")))
    issues = {name: format_issues([group]) for name, group in groups.items() if name not in sums}
    notes = [*(f"{name}: {text}." for name, text in issues.items() if text), *ceiling_notes(summary)]
    intervals = interval_method(has_averages=bool(summary.get("official")))
    title = f"{model_names([summary])[0]}: {summary.get('pin')}; {describe_prompt(summary)}; {intervals}"
    return TextTable(title, header, rows, notes)


def comparison_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    """Return one table per metric for the terminal, given `EvalComparison.to_json()`; `*` after p means q <= 0.05."""
    tables = []
    for title, changes in _iterate_metrics(comparison):
        rows = [_comparison_row(change) for change in changes]
        # the blank after an unstarred p aligns it with starred ones
        lines = [
            (group, n, base, tuned, f"{change} {interval}", f"-{lost} +{gained}", p + ("*" if q.endswith("*") else " "))
            if n != "0"
            else (group, n, *[DASH] * 5)
            for group, n, base, tuned, change, interval, lost, gained, p, q in rows
        ]
        notes = [f"warning: {warning}" for warning in comparison.get("warnings", [])]
        notes += [SHORT_LEGEND, *_method_notes(changes)]
        tables.append(TextTable(title, ("", "n", "base", "tuned", "change", "flips", "p"), lines, notes))
    return tables


def _iterate_metrics(comparison: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    base, tuned = (str(comparison[side].get("model") or comparison[side].get("folder")) for side in ("base", "tuned"))
    for metric, changes in comparison["metrics"].items():
        what = f", {metric}" if len(comparison["metrics"]) > 1 else ""
        yield f"{base} → {tuned}: {comparison.get('pin')}{what}", changes


def _method_notes(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [change for change in changes if change["n"]]
    tested = [change for change in known if change["p"] is not None]
    notes = [ATTEMPTS_NOTE] if any((change["clusters"] or change["n"]) < change["n"] for change in known) else []
    return [*notes, AVERAGES_NOTE] if len(tested) < len(known) else notes


def _comparison_row(change: Mapping[str, Any]) -> tuple[str, ...]:
    # group, n, base, tuned, change, interval, lost, gained, p, q; dashes if the group has no samples
    q = change.get("q")
    label = str(change["group"]) if q is None else f" {change['group']}"
    if not change["n"]:
        return (label, "0", *[DASH] * 8)
    p_text, q_text = (DASH if p is None else "<.001" if p < 0.001 else f"{p:.3f}" for p in (change["p"], q))
    shares = (format_percent(change["base"]), format_percent(change["tuned"]), f"{100 * change['difference']:+.1f}")
    counts = (interval_text(change["low"], change["high"]), str(change["lost"]), str(change["gained"]))
    star = "*" if q is not None and q <= SIGNIFICANCE_LEVEL else ""
    return (label, str(change["n"]), *shares, *counts, p_text, q_text + star)


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """Render `EvalComparison.to_json()` as Markdown: one table per metric, warnings, and a legend."""
    header = ("group", "n", "base", "tuned", "change", "95 % interval", "lost", "gained", "p", "q")
    parts = []
    for title, changes in _iterate_metrics(comparison):
        parts += [f"### {title}", markdown_table(header, map(_comparison_row, changes))]
    notes = [f"{side}: {describe_prompt(comparison[side])}" for side in ("base", "tuned")]
    notes += [f"**warning**: {warning}" for warning in comparison.get("warnings", [])]
    notes += [
        LONG_LEGEND,
        *_method_notes([change for changes in comparison["metrics"].values() for change in changes]),
    ]
    return "\n\n".join([*parts, "\n".join(f"- {text}" for text in notes)]) + "\n"

"""Which tables an evaluation gives, in the paper's layout: rows are models, columns are groups.

Summaries of evaluations are read as plain mappings. Numbers of two pins never share a table, a group that was not asked
whole is marked, and an average stands only where the summary has it, that is where nothing is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rest_rl.report.tables import is_number, percent

Models = Sequence[tuple[str, Mapping[str, Any]]]
"""Names and summaries of one benchmark and pin."""
OVERALL, AVERAGES = "overall", "Averages"
BENCHMARKS = {"bfcl": "BFCL", "api_bank": "API-Bank", "tool_world": "Tool world"}
METRICS = {"soft": "soft (the published metric)", "strict": "strict (exactly the one right call)"}
MANY = 10
TROUBLES = {"overflow": "overflowed", "refused": "refused", "truncated": "truncated", "errors": "not scored"}
"""What a group counts besides its verdicts, and how tables call it."""


class Column(NamedTuple):
    """A column: its label and the group it shows, by any of its names; or an official average."""

    label: str
    names: tuple[str, ...]
    is_average: bool = False


class Section(NamedTuple):
    """The columns of one table; `average` is the official average that stands before them."""

    title: str
    columns: tuple[Column, ...]
    average: str = ""
    metric: str = ""


class Cell(NamedTuple):
    """What a model reached in a group, as shares; an average has no counts."""

    accuracy: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    of: int | None = None
    correct: int | None = None

    @property
    def is_partial(self) -> bool:
        """Whether samples of the group are missing."""
        return self.n is not None and self.of is not None and self.n < self.of


@dataclass(frozen=True)
class ResultTable:
    """One table; `span` stands over its columns, `rows` holds a name and a cell per column, None for no number."""

    title: str
    span: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    notes: tuple[str, ...]


BFCL = (
    Section(
        "Multi-Turn",
        (
            Column("Base", ("multi_turn_base",)),
            Column("Miss Func", ("multi_turn_miss_func",)),
            Column("Miss Param", ("multi_turn_miss_param",)),
            Column("Long Context", ("multi_turn_long_context",)),
        ),
        "Multi-Turn",
    ),
    Section(
        "Non-Live",
        (
            Column("Simple Python", ("simple", "simple_python")),
            Column("Simple Java", ("java", "simple_java")),
            Column("Simple JavaScript", ("javascript", "simple_javascript")),
            Column("Multiple", ("multiple",)),
            Column("Parallel", ("parallel",)),
            Column("Parallel Multiple", ("parallel_multiple",)),
            Column("Irrelevance", ("irrelevance",)),
        ),
        "Non-Live",
    ),
    Section(
        "Live",
        (
            Column("Simple", ("live_simple",)),
            Column("Multiple", ("live_multiple",)),
            Column("Parallel", ("live_parallel",)),
            Column("Parallel Multiple", ("live_parallel_multiple",)),
            Column("Irrelevance", ("live_irrelevance",)),
            Column("Relevance", ("live_relevance",)),
        ),
        "Live",
    ),
)


def eval_tables(summaries: Sequence[Mapping[str, Any]]) -> list[ResultTable]:
    """The tables of one or several evaluations, those of one pin together; none without summaries."""
    return [section_table(section, models) for models in editions(summaries) for section in sections(models)]


def editions(summaries: Sequence[Mapping[str, Any]]) -> list[Models]:
    """The evaluations by what makes them comparable, each with its model's name."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, summary in zip(model_names(summaries), summaries, strict=True):
        found.setdefault(edition(summary), []).append((name, summary))
    return list(found.values())


def edition(summary: Mapping[str, Any]) -> str:
    """What evaluations must share to be comparable."""
    return str([summary.get(key) for key in ("benchmark", "version", "pin")])


def model_names(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name per summary; namesakes on one benchmark are told apart by prompt and format, then by number."""
    names = [str(summary.get("model") or "model") for summary in summaries]
    kinds = [edition(summary) for summary in summaries]
    asked = [f"{name} ({how_asked(summary)})" for name, summary in zip(names, summaries, strict=True)]
    twins = list(zip(names, kinds, strict=True))
    names = [asked[i] if twins.count(twin) > 1 else twin[0] for i, twin in enumerate(twins)]
    twins = list(zip(names, kinds, strict=True))
    return [
        f"{name} #{twins[:i].count((name, kind)) + 1}" if twins.count((name, kind)) > 1 else name
        for i, (name, kind) in enumerate(twins)
    ]


def how_asked(summary: Mapping[str, Any]) -> str:
    """Prompt and format in words."""
    return f"prompt {summary.get('prompt', 'unknown')}, format {summary.get('format', 'unknown')}"


def sections(models: Models) -> list[Section]:
    """The tables of one edition, those without any number left out."""
    first = models[0][1]
    groups = list(dict.fromkeys(str(name) for _, summary in models for name in summary.get("groups", {})))
    if first.get("benchmark") == "bfcl":
        return bfcl_sections(models, groups)
    groups = [name for name in (OVERALL, *groups) if name in groups]
    columns = tuple(Column(group_label(name), (name,)) for name in dict.fromkeys(groups))
    metrics = [str(name) for name in first.get("metrics", ["correct"])]
    if len(metrics) == 1:
        return [Section("", columns, metric=metrics[0])]
    return [Section(METRICS.get(metric, metric), columns, metric=metric) for metric in metrics]


def bfcl_sections(models: Models, groups: Sequence[str]) -> list[Section]:
    """Official averages, then the parts of which a category was asked, then categories that belong to none."""
    official = list(dict.fromkeys(str(name) for _, summary in models for name in summary.get("official") or {}))
    official.sort(key=lambda name: name != "Overall")
    known = {name for section in BFCL for column in section.columns for name in column.names}
    others = tuple(Column(name, (name,)) for name in groups if name not in known and name != OVERALL)
    found = [Section(AVERAGES, tuple(Column(name, (name,), is_average=True) for name in official))]
    for section in (*BFCL, Section("Other", others)):
        if any(name in groups for column in section.columns for name in column.names):
            average = (Column("Overall", (section.average,), is_average=True),) if section.average else ()
            found.append(section._replace(columns=(*average, *section.columns)))
    return [section for section in found if section.columns]


def column_labels(summary: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    """What a picture calls the groups: columns of BFCL with the table they stand in."""
    if summary.get("benchmark") != "bfcl":
        return [group_label(name) for name in groups]
    labels = {name: f"{section.title} {column.label}" for section in BFCL for column in section.columns
              for name in column.names}  # fmt: skip
    return [labels.get(name, group_label(name)) for name in groups]


def group_label(name: str) -> str:
    """`Level1` as `Level 1`, `unseen_tools` as `Unseen tools`."""
    if name.startswith("Level"):
        return f"Level {name.removeprefix('Level')}"
    return name.replace("_", " ").capitalize()


def section_table(section: Section, models: Models) -> ResultTable:
    """The table of one section, a row per model."""
    rows = tuple((name, tuple(cell_of(summary, column, section.metric) for column in section.columns))
                 for name, summary in models)  # fmt: skip
    ways = {how_asked(summary) for _, summary in models}
    asked = ways.pop() if len(ways) == 1 else "prompt and format differ, see the notes"
    head = heading(models[0][1])
    intervals = interval_words(has_averages=any(column.is_average for column in section.columns))
    return ResultTable(
        title=f"{head}, {section.title}" if section.title else head,
        span=section.title,
        caption=f"{models[0][1].get('pin')}; {asked}; accuracy in per cent with {intervals}.",
        columns=tuple(column.label for column in section.columns),
        rows=rows,
        notes=tuple(table_notes(section, models, tell_asked=bool(ways))),
    )


def interval_words(*, has_averages: bool) -> str:
    """Whose intervals a table shows."""
    return "95 % Wilson intervals" + (", combined by MOVER for averages" if has_averages else "")


def heading(summary: Mapping[str, Any]) -> str:
    """Benchmark and version, such as `BFCL v3`."""
    name = BENCHMARKS.get(str(summary.get("benchmark")), str(summary.get("benchmark")))
    return f"{name} {summary['version']}" if summary.get("version") else name


def cell_of(summary: Mapping[str, Any], column: Column, metric: str) -> Cell | None:
    """The number of a model in a column, None if there is none or nothing was scored."""
    source = summary.get("official" if column.is_average else "groups") or {}
    found = next((source[name] for name in column.names if name in source), None)
    if not isinstance(found, Mapping):
        return None
    if column.is_average:
        share = found.get("accuracy")
        return Cell(float(share), found.get("low"), found.get("high")) if is_number(share) else None
    own = found[metric] if isinstance(found.get(metric), Mapping) else found
    if not found.get("n") or not is_number(own.get("accuracy")):
        return None
    return Cell(own["accuracy"], own.get("low"), own.get("high"), found["n"], found.get("of"), own.get("correct"))


def table_notes(section: Section, models: Models, *, tell_asked: bool) -> Iterator[str]:
    """What must be known to read the numbers: what is missing, what went wrong, what an average takes, ceilings."""
    if any(cell and cell.is_partial for _, summary in models for cell in cells(section, summary)):
        yield "Cells with * hold a part of their group."
    for name, summary in models:
        said = [how_asked(summary)] if tell_asked else []
        said += [
            text for text in (trouble_text(section_groups(section, summary)), partial_text(section, summary)) if text
        ]
        if said:
            yield f"{name}: {'; '.join(said)}."
    first = models[0][1]
    if section.title == AVERAGES:
        for name, average in (first.get("official") or {}).items():
            if isinstance(average, Mapping) and average.get("of"):
                of = [str(part) for part in average["of"]]
                yield f"{name} is over {', '.join(of) if len(of) < MANY else f'all {len(of)} categories'}."
    yield from ceiling_notes(first)


def cells(section: Section, summary: Mapping[str, Any]) -> list[Cell | None]:
    """The numbers of a model in a table."""
    return [cell_of(summary, column, section.metric) for column in section.columns]


def section_groups(section: Section, summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups behind a table, each sample once; all of them where the table shows averages alone."""
    groups = {name: group for name, group in (summary.get("groups") or {}).items() if name != OVERALL}
    names = {name for column in section.columns if not column.is_average for name in column.names}
    return [group for name, group in groups.items() if name in names or not names]


def trouble_text(groups: Sequence[Mapping[str, Any]]) -> str:
    """`3 overflowed, 2 truncated`, empty when all went well."""
    counts = {name: sum(count(group.get(key)) for group in groups) for key, name in TROUBLES.items()}
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def count(value: Any) -> int:
    """A count that is written as a number or as the list of what it counts."""
    return value if isinstance(value, int) else len(value) if isinstance(value, (list, tuple)) else 0


def partial_text(section: Section, summary: Mapping[str, Any]) -> str:
    """Which groups were asked in part, with how much of them."""
    pairs = zip(section.columns, cells(section, summary), strict=True)
    return ", ".join(f"{column.label} {cell.n} of {cell.of}" for column, cell in pairs if cell and cell.is_partial)


def ceiling_notes(summary: Mapping[str, Any]) -> Iterator[str]:
    """Where answers by what the prompts offer cannot reach 100, in the groups that were asked."""
    for name, ceiling in (summary.get("ceilings") or {}).items():
        if ceiling.get("ids") and name in (summary.get("groups") or {}):
            yield (
                f"{group_label(str(name))}: answers by the tools on offer reach {percent(ceiling.get('accuracy'))}; "
                f"the gold of {', '.join(ceiling['ids'])} lies outside them."
            )

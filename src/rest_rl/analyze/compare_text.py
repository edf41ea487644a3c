"""The page of a comparison: verdict, tables in the paper's layout, every run, and how each figure is reckoned."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rest_rl.analyze.compare import METRICS, Comparison, Line, compare, difference
from rest_rl.analyze.compare_plots import draw_comparison
from rest_rl.analyze.compare_verdict import p_text, points_text, verdict
from rest_rl.analyze.seed_statistics import Reach
from rest_rl.analyze.tables import is_number, markdown_table
from rest_rl.grid import METHODS, REFERENCE, TUNED_CURRICULUM
from rest_rl.jsonl import as_json
from rest_rl.runlog import PLOTS, replace_file, unwritable
from rest_rl.significance import Interval

PAGE, FIGURES = "compare.md", "compare.json"
FINAL = ("exact", "exact_greedy", "s_acc")
OVERALL = ("train_exact", "train_exact_end", "train_s_acc", "slice_exact")
SCORES = ("exact", "gain", "exact_greedy", "s_acc", "train_exact", "train_exact_end", "train_s_acc", "tokens")


def write_comparison(folder: str | Path, reference: str = REFERENCE) -> tuple[Path, Comparison]:
    """Write compare.md, compare.json and the pictures into the grid's folder; returns the page and what it says."""
    comparison = compare(folder, reference)
    target = Path(folder)
    try:
        pictures = draw_comparison(comparison, target / PLOTS)
        replace_file(target / PAGE, page_text(comparison, pictures))
        replace_file(target / FIGURES, as_json(comparison_figures(comparison), indent=1) + "\n")
    except OSError as error:
        raise unwritable(target, error) from error
    return target / PAGE, comparison


def page_text(comparison: Comparison, pictures: Mapping[str, Path]) -> str:
    """The whole page."""

    def picture(title: str, text: str, heading: str = "") -> str:
        if title not in pictures:
            return ""
        place = Path(os.path.relpath(pictures[title], comparison.folder)).as_posix()
        return f"{heading}\n\n![{title}]({place})\n\n{text}"

    parts = [
        "# Comparison",
        "\n".join(f"* {sentence}" for sentence in verdict(comparison)),
        warnings_text(comparison),
        picture("Differences", ""),
        final_section(comparison),
        pairs_section(comparison),
        training_section(comparison),
        picture("Learning", f"Exact match on the training samples, over `{comparison.reference}` in grey; ± one "
                "standard deviation over seeds."),
        picture("Held-out slice", "Exact match on the held-out slice, sampled."),
        steps_section(comparison),
        picture("Dynamics", "Means over seeds, smoothed (the paper's Fig. 3).", "## Entropy and gradient norm"),
        ablation_section(comparison),
        start_section(comparison),
        kind_section(comparison),
        runs_section(comparison),
        how_text(comparison),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def warnings_text(comparison: Comparison) -> str:
    """What is not in the page or not comparable; empty if nothing is."""
    lines = [f"* `{name}` {why} and is left out." for name, why in comparison.unfinished.items()]
    lines += [f"* Not alike in all runs: {text}" for text in comparison.unequal]
    return "**Mind**\n\n" + "\n".join(lines) if lines else ""


def final_section(comparison: Comparison) -> str:
    """The main table."""
    keys = [key for key in FINAL if any(key in line.versus for line in comparison.lines)]
    if not keys:
        return ""
    first, *others = keys
    header = (
        "percent",
        "seeds",
        METRICS[first].label,
        f"– {comparison.reference}",
        "p (t)",
        "p (flips)",
        *q_column(comparison),
        *(column for key in others for column in (METRICS[key].label, f"– {comparison.reference}")),
    )
    rows = []
    for line in comparison.lines:
        tests = tested(line, first)
        cells = [mean_text(line, first), *(tests[:3] if comparison.is_single else tests)]
        for key in others:
            cells += [mean_text(line, key), tested(line, key)[0]]
        rows.append((line.label, len(line.cells), *cells))
    rows += [(label, 0, *["–"] * (len(header) - 2)) for label in comparison.absent]
    note = f"Held-out prompts; means over seeds and differences to `{comparison.reference}` in points, [95 %]."
    return f"## After training\n\n{note}\n\n{markdown_table(header, rows)}"


def q_column(comparison: Comparison) -> tuple[str, ...]:
    """The column of what p is after correction; none where there is nothing to correct for."""
    return () if comparison.is_single else ("q",)


def pairs_section(comparison: Comparison) -> str:
    """The one method beside the reference, seed by seed."""
    key = comparison.primary
    lines = comparison.judged() if comparison.is_single else []
    rows = []
    for line in lines:
        reference = comparison.line(comparison.reference, line.start)
        theirs = reference.by_seed(key) if reference else {}
        for seed, value in sorted(line.by_seed(key).items()):
            if seed in theirs:
                pair = (f"{100 * number:.1f}" for number in (theirs[seed], value))
                rows.append((f"seed {seed}", *pair, f"{100 * (value - theirs[seed]):+.1f}"))
    if not rows:
        return ""
    header = (f"{METRICS[key].label}, percent", comparison.reference, lines[0].label, "difference")
    return f"## Seed by seed\n\n{markdown_table(header, rows)}"


def training_section(comparison: Comparison) -> str:
    """The areas under the curves."""
    keys = [key for key in OVERALL if any(key in line.versus for line in comparison.lines)]
    if not keys:
        return ""
    letter = "p" if comparison.is_single else "q"
    columns = [column for key in keys for column in (METRICS[key].label, f"– {comparison.reference}", letter)]
    rows = []
    for line in comparison.lines:
        cells: list[str] = []
        for key in keys:
            q = line.versus[key].q if key in line.versus else math.nan
            cells += [mean_text(line, key), tested(line, key)[0], p_text(q)]
        length = f"{line.versus['tokens'].mean.value:.1f}" if "tokens" in line.versus else "–"
        rows.append((line.label, *cells, length))
    note = "Means over the steps of a run (area under the curve), of the samples that it trained on."
    return f"## During training\n\n{note}\n\n{markdown_table(('percent', *columns, 'tokens'), rows)}"


def steps_section(comparison: Comparison) -> str:
    """Steps to where the reference got."""
    rows = [(line.label, *reach_cells(line.to_final), *reach_cells(line.to_best)) for line in comparison.rivals()]
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    if not rows:
        return ""
    name = comparison.reference
    header = ("share of its steps", f"to {name}'s end", "by seed", "seeds", f"to {name}'s best", "by seed", "seeds")
    note = (
        f"Steps until a method gets to where `{name}` ends, or to its best, as a share of the steps of `{name}` to "
        f"there; counted on {comparison.counted_on}. First of the mean curve, then by seed (geometric mean, [95 %], "
        "known only if every seed gets there), then how many seeds got there."
    )
    return f"## Steps\n\n{note}\n\n{markdown_table(header, rows)}"


def reach_cells(found: Reach | None) -> tuple[str, str, str]:
    """Share of the mean curve, by seed with its interval, seeds that got there."""
    if found is None:
        return "–", "–", "–"
    share = "never" if math.isnan(found.share) else f"{found.share:.2f}"
    return share, interval_text(found.by_seed, 1, 2), f"{found.reached} of {found.n}"


def ablation_section(comparison: Comparison) -> str:
    """What a change of one part of `rest` does, in the layout of the paper's Table 3."""
    parts = []
    for start in comparison.starts:
        whole = comparison.line("rest", start)
        without = [line for line in comparison.lines if line.start == start and line.role == "ablation"]
        if whole is None or not without:
            continue
        kinds = kind_names([whole, *without])
        header = (f"percent{', from ' + start if start else ''}", *kinds, "all", "– rest", "p (t)")
        rows = []
        for line in (whole, *without):
            test = difference(line, whole, comparison.primary)
            cells = ("–", "–") if line is whole else (points_text(test.difference), p_text(test.p_t))
            text = "rest" if line is whole else METHODS[line.method].text
            rows.append((text, *(kind_text(line, kind) for kind in kinds), mean_text(line, comparison.primary), *cells))
        parts.append(markdown_table(header, rows))
    note = "Each row changes one thing of `rest`; below 0, `rest` loses by the change."
    if any(line.method == TUNED_CURRICULUM for line in comparison.lines):
        note += f" {NO_CURRICULUM}"
    return "\n\n".join([f"## Ablations\n\n{note}", *parts]) if parts else ""


def start_section(comparison: Comparison) -> str:
    """The warm starts, in the layout of the paper's Table 4."""
    if len(comparison.starts) < 2:
        return ""
    kinds = kind_names(comparison.lines)
    rows: list[tuple[str, ...]] = []
    for start in comparison.starts:
        own = [line for line in comparison.lines if line.start == start]
        before = [(cell.run.summary.get("before") or {}) for line in own for cell in line.cells]
        cells = [mean_of((row.get("kinds") or {}).get(kind, {}).get("exact_match") for row in before) for kind in kinds]
        rows.append((start, *cells, mean_of(row.get("exact_match") for row in before)))
        rows += [
            (f"  + {line.method}", *(kind_text(line, kind) for kind in kinds), mean_text(line, comparison.primary))
            for line in own
        ]
    return "## Warm starts\n\nExact match, sampled, in percent; first of the start itself.\n\n" + markdown_table(
        ("start", *kinds, "all"), rows
    )


def kind_section(comparison: Comparison) -> str:
    """Exact match by kind of task."""
    kinds = kind_names(comparison.lines)
    if not kinds:
        return ""
    rows = [
        (line.label, *(kind_text(line, kind) for kind in kinds), mean_text(line, "exact")) for line in comparison.lines
    ]
    return "## By kind of task\n\nExact match, sampled, in percent; means over seeds.\n\n" + markdown_table(
        ("percent", *kinds, "all"), rows
    )


def kind_names(lines: Iterable[Line]) -> list[str]:
    """Kinds of task that were measured."""
    found = (cell.run.summary.get("after") or {} for line in lines for cell in line.cells)
    return list(dict.fromkeys(kind for after in found for kind in after.get("kinds") or {}))


def kind_text(line: Line, kind: str) -> str:
    """Mean over seeds of one kind's exact match, in percent."""
    after = [(cell.run.summary.get("after") or {}).get("kinds") or {} for cell in line.cells]
    return mean_of(kinds.get(kind, {}).get("exact_match") for kinds in after)


def mean_of(values: Iterable[Any]) -> str:
    """Mean of what is a number, in percent."""
    known = [value for value in values if is_number(value)]
    return f"{100 * statistics.fmean(known):.1f}" if known else "–"


def runs_section(comparison: Comparison) -> str:
    """Every run: nothing is picked."""
    keys = [key for key in SCORES if any(key in line.versus for line in comparison.lines)]
    rows = [
        (str(cell.name), *(figure_text(key, cell.values.get(key)) for key in keys))
        for line in comparison.lines
        for cell in line.cells
    ]
    header = ("percent", *(METRICS[key].label for key in keys))
    return f"## Every run\n\n{markdown_table(header, rows)}"


def figure_text(key: str, value: float | None) -> str:
    """A figure of a run."""
    if value is None:
        return "–"
    return f"{100 * value:+.1f}" if key == "gain" else f"{100 * value:.1f}" if METRICS[key].is_share else f"{value:.1f}"


def mean_text(line: Line, key: str) -> str:
    """Mean and interval of a figure over seeds, in percent."""
    return interval_text(line.versus[key].mean, 100, 1) if key in line.versus else "–"


def interval_text(interval: Interval, scale: float, digits: int) -> str:
    """`41.2 [38.0, 44.4]`; the value alone without an interval, a dash without a value."""
    if math.isnan(interval.value):
        return "–"
    value, low, high = (f"{scale * number:.{digits}f}" for number in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def tested(line: Line, key: str) -> tuple[str, str, str, str]:
    """Difference to the reference, its two p-values and q; dashes for the reference itself."""
    versus = line.versus.get(key)
    if versus is None or versus.paired is None:
        return "–", "–", "–", "–"
    test = versus.paired
    return points_text(test.difference), p_text(test.p_t), p_text(test.p_flip), p_text(versus.q)


def comparison_figures(comparison: Comparison) -> dict[str, Any]:
    """Everything on the page as plain values."""
    return {
        "reference": comparison.reference,
        "primary": comparison.primary,
        "verdict": verdict(comparison),
        "sd_of_differences": comparison.sd,
        "detectable_difference": comparison.detectable,
        "steps_counted_on": comparison.counted_on,
        "unfinished": comparison.unfinished,
        "without_a_finished_run": comparison.absent,
        "unequal": comparison.unequal,
        "methods": {line.label: line_figures(line) for line in comparison.lines},
    }


def line_figures(line: Line) -> dict[str, Any]:
    """One method as plain values."""
    figures = {
        key: {
            "mean": versus.mean._asdict(),
            "by_seed": line.by_seed(key),
            "q": versus.q,
            **({} if versus.paired is None else paired_figures(versus.paired)),
        }
        for key, versus in line.versus.items()
    }
    steps = {
        name: None if found is None else {**found._asdict(), "by_seed": found.by_seed._asdict()}
        for name, found in (("to_final", line.to_final), ("to_best", line.to_best))
    }
    return {"role": line.role, "seeds": line.seeds, "figures": figures, "steps": steps}


def paired_figures(test: Any) -> dict[str, Any]:
    """A paired difference as plain values."""
    return {**test._asdict(), "difference": test.difference._asdict()}


NO_CURRICULUM = (
    "The paper's row without a curriculum is `rest` itself, which has none: the last row adds the published one, and a "
    "difference above 0 is what it is worth. The paper takes it from its own whole method, so the two figures are of "
    "one question and not of one experiment."
)

HOW = """## How it is reckoned

Intervals are of 95 %, Student's over seeds: they hold for new seeds on this data, not for new data. A difference is
paired by seed: the same samples in the same order. p (t) is the paired t test's; p (flips) that of random signs, which
assumes no normal distribution and with n seeds is never below 2/2ⁿ (0.25 for 3, 0.06 for 5).{many} The verdict is about
the first figure of the first table and about nothing else."""
MANY = """ q corrects p (t) for
the number of methods (Benjamini and Hochberg): of those with q ≤ 0.05 at most 5 % are expected to be chance."""


def how_text(comparison: Comparison) -> str:
    """How each figure is reckoned."""
    return HOW.format(many="" if comparison.is_single else MANY)

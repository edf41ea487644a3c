"""The page of a comparison: verdict, tables in the paper's layout, every run, and how each figure is reckoned."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rest_rl.compare.collect import (
    EXACT,
    METRICS,
    Cell,
    Comparison,
    Line,
    compare,
    difference,
    metric_curve,
    slice_curve,
)
from rest_rl.compare.grid import METHODS, REFERENCE, TUNED_CURRICULUM
from rest_rl.compare.statistics import Reach
from rest_rl.compare.verdict import p_text, points_text, verdict
from rest_rl.jsonl import as_json
from rest_rl.report.palette import SERIES_COLOURS
from rest_rl.report.plots import FAINT, INK, colours, draw_curve, legend_style, new_figure, save, style
from rest_rl.report.tables import Curve, curve, curve_of, is_number, markdown_table, mean_and_sd
from rest_rl.runlog import PLOTS, replace_file, unwritable
from rest_rl.statistics import Interval

ROLE_COLOURS: Mapping[str, str] = {
    "method": SERIES_COLOURS[0],
    "ablation": SERIES_COLOURS[4],
    "baseline": SERIES_COLOURS[2],
    "rival": SERIES_COLOURS[3],
    "control": SERIES_COLOURS[1],
}
REFERENCE_COLOUR = "#9a9a9a"
ACROSS = 4
DYNAMICS = {"entropy": "entropy of the policy (nats)", "grad_norm": "gradient norm"}
CurveOf = Callable[[Cell], Mapping[int, float]]


def draw_comparison(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Every picture for which there are numbers: title -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "Differences": draw_differences(comparison, folder / "differences.png"),
        "Learning": draw_beside(comparison, training_curve, folder / "learning.png"),
        "Held-out slice": draw_beside(comparison, held_out_curve, folder / "slice.png"),
        "Dynamics": draw_dynamics(comparison, folder / "dynamics.png"),
    }
    return {title: path for title, path in drawn.items() if path}


def training_curve(cell: Cell) -> Mapping[int, float]:
    """Exact match on the training samples."""
    return metric_curve(cell.run, EXACT)


def held_out_curve(cell: Cell) -> Mapping[int, float]:
    """Exact match on the held-out slice."""
    return slice_curve(cell.run)


def draw_differences(comparison: Comparison, path: Path) -> Path | None:
    """The primary figure minus the reference's: a dot a seed, the mean and its interval, one row per method."""
    lines = [line for line in comparison.rivals() if comparison.primary in line.versus]
    lines = [line for line in lines if line.versus[comparison.primary].paired]
    if not lines:
        return None
    figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(lines)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for row, line in enumerate(reversed(lines)):
        reference = comparison.line(comparison.reference, line.start)
        test = line.versus[comparison.primary].paired
        assert reference is not None
        assert test is not None
        theirs = reference.by_seed(comparison.primary)
        dots = [
            100 * (value - theirs[seed]) for seed, value in line.by_seed(comparison.primary).items() if seed in theirs
        ]
        draw_row(axes, row, test.difference, dots, ROLE_COLOURS[line.role])
    axes.set_yticks(range(len(lines)), [line.label for line in reversed(lines)])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    style(axes, f"{METRICS[comparison.primary].label}, points above {comparison.reference} on the same seed")
    axes.set_xlabel("points; bar: 95 % interval of the mean over seeds, dots: seeds", fontsize=8, color=INK)
    axes.margins(x=0.06)
    axes.grid(axis="y", visible=False)
    roles = dict.fromkeys(line.role for line in lines)
    for role in roles:
        axes.plot([], [], color=ROLE_COLOURS[role], linewidth=2.2, label=role)
    if len(roles) > 1:
        axes.legend(**{**legend_style(), "loc": "upper left"}, bbox_to_anchor=(1.01, 1.0))
    return save(figure, path)


def draw_row(axes: Axes, row: int, difference: Interval, dots: Sequence[float], colour: str) -> None:
    """One method: its interval as a bar, its mean as a diamond, its seeds as dots."""
    if not math.isnan(difference.low):
        axes.plot([100 * difference.low, 100 * difference.high], [row, row], color=colour, linewidth=2.2, zorder=2,
                  solid_capstyle="butt")  # fmt: skip
    axes.plot(
        dots, [row - 0.22] * len(dots), linestyle="", marker="o", markersize=3, color=colour, alpha=0.55, zorder=3
    )
    axes.plot(
        [100 * difference.value], [row], marker="D", markersize=6, color=colour, zorder=4, markeredgecolor="white"
    )


def draw_beside(comparison: Comparison, curve_of_cell: CurveOf, path: Path) -> Path | None:
    """A panel per method, its curve over the reference's in grey; bands are one standard deviation over seeds."""
    lines = [line for line in comparison.lines if line.method != comparison.reference]
    lines = [line for line in lines or comparison.lines if seed_curve(line, curve_of_cell).steps]
    if not lines:
        return None
    across, down = min(ACROSS, len(lines)), -(-len(lines) // ACROSS)
    figure = Figure(figsize=(max(5.2, 2.55 * across + 0.6), 2.3 * down), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for index, line in enumerate(lines):
        axes = panels[index // across][index % across]
        reference = comparison.line(comparison.reference, line.start)
        if reference is not None:
            draw_curve(axes, seed_curve(reference, curve_of_cell), REFERENCE_COLOUR, reference.label)
        draw_curve(axes, seed_curve(line, curve_of_cell), ROLE_COLOURS[line.role], line.label)
        style(axes, line.label)
        if index < len(lines) - across:
            axes.set_xlabel("")
        axes.tick_params(labelbottom=index >= len(lines) - across)
        if len(lines) == 1:
            axes.legend(**legend_style())
    for index in range(len(lines), across * down):
        panels[index // across][index % across].set_visible(False)
    return save(figure, path)


def seed_curve(line: Line, curve_of_cell: CurveOf) -> Curve:
    """Mean and one standard deviation over the seeds of a method."""
    by_step: dict[int, list[float]] = {}
    for cell in line.cells:
        for step, value in curve_of_cell(cell).items():
            by_step.setdefault(step, []).append(value)
    return curve_of({step: mean_and_sd(values) for step, values in by_step.items()})


def draw_dynamics(comparison: Comparison, path: Path) -> Path | None:
    """Policy entropy and gradient norm over steps, one line per method (the paper's Fig. 3)."""
    keys = [
        key for key in DYNAMICS if any(key in row for line in comparison.lines for row in line.cells[0].run.metrics)
    ]
    if not keys:
        return None
    figure, panels = new_figure(len(keys))
    figure.set_size_inches(4.2 * len(keys) + 1.8, 3.4)
    for axes, key in zip(panels, keys, strict=True):
        for index, (line, own) in enumerate(zip(comparison.lines, colours(len(comparison.lines)), strict=True)):
            colour = ROLE_COLOURS[line.role] if len(comparison.lines) == 2 else own
            colour = REFERENCE_COLOUR if line.method == comparison.reference else colour
            whole = curve([cell.run for cell in line.cells], key)
            if len(comparison.lines) > 2:  # bands of ten methods hide each other: the means alone
                whole = Curve(whole.steps, whole.mean, whole.mean, whole.mean)
            draw_curve(axes, whole, colour, line.label)
            if axes.lines:
                axes.lines[-1].set_linestyle(("-", (0, (4, 2)), (0, (1, 1.5)))[index // len(SERIES_COLOURS) % 3])
        style(axes, DYNAMICS[key])
        for drawn in axes.lines:
            if drawn.get_linewidth() < 1:
                drawn.remove()
    panels[-1].legend(**legend_style(), bbox_to_anchor=(1.01, 1.0))
    panels[0].axhline(0, color=FAINT, linewidth=0.6)
    return save(figure, path)


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

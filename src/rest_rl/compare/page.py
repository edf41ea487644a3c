"""Renderers of a `ComparisonReport`: the page with its plots, the JSON file, and the table for the terminal."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from rest_rl.compare.collect import (
    DIFFERENCE_METRICS,
    EXACT,
    METRICS,
    REST,
    ComparisonReport,
    FinishedRun,
    MethodResult,
    slice_curve,
)
from rest_rl.compare.grid import METHODS
from rest_rl.compare.statistics import StepsToTarget
from rest_rl.compare.verdict import format_interval, format_p, format_points, p_or_q
from rest_rl.jsonl import as_json
from rest_rl.report.palette import SERIES_COLORS
from rest_rl.report.plots import (
    FAINT,
    INK,
    draw_curve,
    legend_style,
    new_axes,
    new_figure,
    save_figure,
    series_colors,
    style_axes,
    white_figure,
)
from rest_rl.report.tables import (
    Curve,
    average_curves,
    greedy_if_recorded,
    headline_key,
    headline_turn,
    is_number,
    markdown_table,
    metric_curve,
    scores_for_turn,
    values_by_step,
)
from rest_rl.response import TURNS, Turn
from rest_rl.runlog import PLOTS, replace_file, unwritable_folder_error

PAGE_FILE, FIGURES_FILE = "compare.md", "compare.json"
FINAL_METRICS = ("exact_greedy", "s_acc")
SAMPLED_METRICS = ("exact", "exact_low", "policy_entropy")
TRAINING_METRICS = ("train_exact", "train_exact_end", "train_s_acc", "slice_exact")
RUN_METRICS = (
    *("exact_greedy", "gain", "exact", "exact_low", "policy_entropy", "s_acc"),
    *("train_exact", "train_exact_end", "train_s_acc", "tokens"),
)
ROLE_COLORS: Mapping[str, str] = {
    "method": SERIES_COLORS[0],
    "ablation": SERIES_COLORS[4],
    "baseline": SERIES_COLORS[2],
    "rival": SERIES_COLORS[3],
    "control": SERIES_COLORS[1],
}
REFERENCE_COLOR = "#9a9a9a"
PANELS_PER_ROW = 4
DYNAMICS_METRICS = {"entropy": "policy entropy (nats)", "grad_norm": "gradient norm"}

Row = tuple[Any, ...]
RunCurve = Callable[[FinishedRun], Mapping[int, float]]


def write_page(report: ComparisonReport) -> ComparisonReport:
    """Write compare.md, compare.json and the plots into the grid's folder; return the report with `page` set."""
    folder = report.folder
    try:
        plots = draw_plots(report, folder / PLOTS)
        replace_file(folder / PAGE_FILE, render_page(report, plots))
        replace_file(folder / FIGURES_FILE, as_json(build_figures(report), indent=1) + "\n")
    except OSError as error:
        raise unwritable_folder_error(folder, error) from error
    return replace(report, page=folder / PAGE_FILE)


# Terminal and JSON


def terminal_table(report: ComparisonReport) -> tuple[str, tuple[str, ...], list[Row]]:
    """Return the title, header and rows of a table that shows the primary metric of each method."""
    key = report.primary
    header = ("percent", "seeds", METRICS[key].label, f"- {report.reference}", p_or_q(report))
    rows: list[Row] = [(line.label, str(len(line.runs)), *format_test(line, key)) for line in report.lines]
    return METRICS[key].text, header, [*rows, *((label, "0", "–", "–", "–") for label in report.absent)]


def build_figures(report: ComparisonReport) -> dict[str, Any]:
    return {
        "reference": report.reference,
        "primary": report.primary,
        "verdict": [statement.text for statement in report.verdict],
        "sd_of_differences": report.sd,
        "detectable_difference": report.detectable,
        "steps_counted_on": report.counted_on,
        "unfinished": report.unfinished,
        "without_a_finished_run": report.absent,
        "unequal": report.unequal,
        "methods": {line.label: build_method_figures(line) for line in report.lines},
    }


def build_method_figures(line: MethodResult) -> dict[str, Any]:
    metrics = {}
    for key, result in line.metrics.items():
        test = {} if result.paired is None else to_plain(result.paired)
        metrics[key] = {"mean": to_plain(result.mean), "by_seed": result.by_seed, "q": result.q, **test}
    steps = {"to_final": to_plain(line.to_final), "to_best": to_plain(line.to_best)}
    at_entropy = to_plain(line.at_entropy)
    return {
        "role": line.role, "seeds": line.seeds, "figures": metrics, "at_equal_entropy": at_entropy, "steps": steps
    }  # fmt: skip


def to_plain(value: Any) -> Any:
    return {key: to_plain(part) for key, part in value._asdict().items()} if hasattr(value, "_asdict") else value


# Markdown


def render_page(report: ComparisonReport, plots: Mapping[str, Path]) -> str:

    def picture(title: str, text: str = "") -> str:
        if title not in plots:
            return ""
        path = Path(os.path.relpath(plots[title], report.folder)).as_posix()
        return f"![{title}]({path})\n\n{text}"

    dynamics = picture("Dynamics", "Smoothed means over seeds (the paper's Fig. 3).")
    parts = [
        "# Comparison",
        "\n".join(f"* {statement.text}" for statement in report.verdict),
        render_warnings(report),
        picture("Differences"),
        render_final_scores(report),
        render_seed_pairs(report),
        render_sampled_scores(report),
        render_equal_entropy(report),
        render_turn_scores(report),
        render_training_scores(report),
        picture("Learning", f"Exact match on the training samples; `{report.reference}` is grey, bands are ± "
                "one standard deviation over seeds."),
        picture("Held-out slice", "Exact match on the held-out slice."),
        render_steps_to_target(report),
        dynamics and f"## Entropy and gradient norm\n\n{dynamics}",
        render_ablations(report),
        render_warm_starts(report),
        render_task_kinds(report),
        render_runs(report),
        METHOD_NOTE + ("" if report.is_single else CORRECTION_NOTE),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def render_section(title: str, note: str, header: Sequence[str], rows: Sequence[Row]) -> str:
    return f"## {title}\n\n{note}\n\n{markdown_table(header, rows)}" if rows else ""


def render_warnings(report: ComparisonReport) -> str:
    lines = [f"* `{name}` {why} and is left out." for name, why in report.unfinished.items()]
    lines += [f"* Differs between runs: {text}" for text in report.unequal]
    return "**Warnings**\n\n" + "\n".join(lines) if lines else ""


def available_metrics(report: ComparisonReport, keys: Sequence[str]) -> list[str]:
    # Returns the headline metrics of `keys` (over call turns if the runs separate them) that at least one run recorded.
    return [key for key in map(report.headline, keys) if any(key in line.metrics for line in report.lines)]


def render_final_scores(report: ComparisonReport) -> str:
    # Tests are shown for the first metric only; the other metrics get no test.
    keys = available_metrics(report, FINAL_METRICS if has_greedy(report) else ("exact", "s_acc"))
    if not keys:
        return ""
    minus = f"– {report.reference}"
    q_column = () if report.is_single else ("q",)
    header = ["percent", "seeds", METRICS[keys[0]].label, minus, "p (t)", "p (flips)", *q_column]
    header += [column for key in keys[1:] for column in (METRICS[key].label, minus)]
    rows: list[Row] = []
    for line in report.lines:
        test = line.metrics[keys[0]].paired if keys[0] in line.metrics else None
        cells = [format_score(line, keys[0]), format_difference(line, keys[0])]
        cells += [format_p(test.p_t), format_p(test.p_flip)] if test else ["–", "–"]
        cells += [format_q(line, keys[0])] if q_column else []
        for key in keys[1:]:
            cells += [format_score(line, key), format_difference(line, key)]
        rows.append((line.label, len(line.runs), *cells))
    rows += [(label, 0, *["–"] * (len(header) - 2)) for label in report.absent]
    note = f"Held-out prompts: means over seeds and differences to `{report.reference}` in points, [95 % interval]."
    return render_section("After training", note, header, rows)


def has_greedy(report: ComparisonReport) -> bool:
    return bool(available_metrics(report, ("exact_greedy",)))


def render_sampled_scores(report: ComparisonReport) -> str:
    keys = available_metrics(report, SAMPLED_METRICS) if has_greedy(report) else []
    greedy = report.headline("exact_greedy")
    header = ["percent", METRICS[greedy].label]
    for key in keys:
        header += [METRICS[key].label, f"– {report.reference}"]
    rows: list[Row] = []
    for start in report.starts if keys else ():
        own = [line for line in report.lines if line.start == start]
        cells = [cell for key in keys for cell in (format_before(own, key), "")]
        rows.append((f"before training{start and f', {start}'}", format_before(own, greedy), *cells))
        for line in own:
            cells = [cell for key in keys for cell in (format_score(line, key), format_difference(line, key))]
            rows.append((line.label, format_score(line, greedy), *cells))
    note = (
        "The same prompts, sampled, with the policy entropy in nats. The first row shows the model before training: a "
        "method that reaches at T = 1 only what the low temperature gives before training has become sharper and may "
        "have learned nothing."
    )
    return render_section("Sampled responses and policy entropy", note, header, rows)


def format_before(lines: Iterable[MethodResult], key: str) -> str:
    # The mean over the runs' evaluations before training.
    turn: Turn | None = "calls" if key.endswith("_calls") else None
    evaluations = [scores for line in lines for scores in select_evaluations(line, "before")]
    if key == "policy_entropy":
        values = [scores[key] for scores in evaluations if is_number(scores.get(key))]
        return f"{statistics.fmean(values):.{METRICS[key].digits}f}" if values else "–"
    parts = {"exact_greedy": "greedy", "exact_low": "low_temperature"}
    part, own = parts.get(key.removesuffix("_calls")), [scores_for_turn(scores, turn) for scores in evaluations]
    return format_mean(((scores.get(part) or {}) if part else scores).get("exact_match") for scores in own)


def render_equal_entropy(report: ComparisonReport) -> str:
    rows: list[Row] = []
    for line in report.rivals():
        if (found := line.at_entropy) is not None:
            scores = (f"{100 * found.ours:.1f}", f"{100 * found.theirs:.1f}", format_points(found.paired.difference))
            rows.append((line.label, found.paired.n, f"{found.entropy:.3f}", *scores, format_p(found.paired.p_t)))
    name = report.reference
    header = ("percent", "seeds", "entropy (nats)", "exact match", name, f"– {name}", "p (t)")
    note = (
        f"Exact match on the training samples where the policy entropy of a method and of `{name}` is equal: at the "
        "larger of their two final entropies, seed by seed. Sharpening alone gives no difference here. Both curves are "
        "trailing means over a tenth of the steps."
    )
    return render_section("At equal policy entropy", note, header, rows)


def render_seed_pairs(report: ComparisonReport) -> str:
    if not report.is_single:
        return ""
    key, (line,) = report.primary, report.judged()
    reference = report.line(report.reference, line.start)
    theirs = reference.metrics[key].by_seed if reference and key in reference.metrics else {}
    rows: list[Row] = [
        (f"seed {seed}", f"{100 * theirs[seed]:.1f}", f"{100 * ours:.1f}", f"{100 * (ours - theirs[seed]):+.1f}")
        for seed, ours in sorted(line.metrics[key].by_seed.items())
        if seed in theirs
    ]
    header = (f"{METRICS[key].label}, percent", report.reference, line.label, "difference")
    return f"## Seed by seed\n\n{markdown_table(header, rows)}" if rows else ""


def render_training_scores(report: ComparisonReport) -> str:
    keys = available_metrics(report, TRAINING_METRICS)
    header = ["percent"]
    for key in keys:
        header += [METRICS[key].label, f"– {report.reference}", p_or_q(report)]
    rows: list[Row] = []
    for line in report.lines if keys else ():
        cells = [cell for key in keys for cell in format_test(line, key)]
        length = f"{line.metrics['tokens'].mean.value:.1f}" if "tokens" in line.metrics else "–"
        rows.append((line.label, *cells, length))
    note = "Scores on the samples that the runs trained on: means over all steps (area under the curve)."
    return render_section("During training", note, [*header, "tokens"], rows)


def render_turn_scores(report: ComparisonReport) -> str:
    all_bases = ("exact_greedy", "exact", "s_acc", *TRAINING_METRICS)
    bases = [base for base in all_bases if report.headline(base) != base]
    header = ["percent", *(METRICS[base].label + over for base in bases for over in (", calls", ", answers", ", all"))]
    rows: list[Row] = [
        (line.label, *(format_score(line, base + end) for base in bases for end in ("_calls", "_answers", "")))
        for line in report.lines
        if bases
    ]
    note = (
        "The verdict is about call turns. The text of an answer is not compared, so any answer without a call counts "
        "as right. Means over seeds: over call turns, answer turns and all turns."
    )
    return render_section("Call turns and answer turns", note, header, rows)


def render_steps_to_target(report: ComparisonReport) -> str:
    rows = [(line.label, *format_steps(line.to_final), *format_steps(line.to_best)) for line in report.rivals()]
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    name = report.reference
    header = ("ratio of steps", f"to final {name}", "by seed", "seeds", f"to best {name}", "by seed", "seeds")
    note = (
        f"Steps until a method first reaches the final or the best score of `{name}`, divided by the steps that "
        f"`{name}` needed for it; below 1 is faster. Measured on {report.counted_on}. The first number is from the "
        "mean curve, the second is the geometric mean over seeds with its 95 % interval (only if all seeds reach the "
        "score), the third counts the seeds that reach it."
    )
    return render_section("Steps to the same score", note, header, rows)


def format_steps(steps: StepsToTarget | None) -> tuple[str, str, str]:
    if steps is None:
        return "–", "–", "–"
    share = "never" if math.isnan(steps.share) else f"{steps.share:.2f}"
    return share, format_interval(steps.by_seed, 1, 2), f"{steps.reached} of {steps.n}"


def render_ablations(report: ComparisonReport) -> str:
    # The layout of the paper's Table 3.
    tables = []
    for start in report.starts:
        whole = report.line(REST, start)
        without = [line for line in report.lines if line.start == start and line.role == "ablation"]
        if whole is None or not without:
            continue
        kinds = find_task_kinds([whole, *without])
        over = TURNS["calls"] if report.primary.endswith("_calls") else "all"
        header = (f"percent{', from ' + start if start else ''}", *kinds, over, "– rest", "p (t)")
        rows = []
        for line in (whole, *without):
            test = line.over_rest
            cells = (format_points(test.difference), format_p(test.p_t)) if test else ("–", "–")
            text = REST if line is whole else METHODS[line.method].text
            rows.append((text, *format_kinds(line, kinds), format_score(line, report.primary), *cells))
        tables.append(markdown_table(header, rows))
    note = "Each row changes one part of `rest`. A negative difference means that the change makes `rest` worse."
    return "\n\n".join([f"## Ablations\n\n{note}", *tables]) if tables else ""


def render_warm_starts(report: ComparisonReport) -> str:
    # The layout of the paper's Table 4.
    if len(report.starts) < 2:
        return ""
    kinds, all_turns = find_task_kinds(report.lines), report.primary.removesuffix("_calls")
    rows: list[Row] = []
    for start in report.starts:
        own = [line for line in report.lines if line.start == start]
        before = greedy_if_recorded(*(scores for line in own for scores in select_evaluations(line, "before")))
        overall = format_mean(scores.get("exact_match") for scores in before)
        rows.append((start, *format_exact_match(before, kinds), overall))
        rows += [(f"  + {line.method}", *format_kinds(line, kinds), format_score(line, all_turns)) for line in own]
    note = (
        f"{describe_decoding(report)} exact match in percent, means over seeds: first the warm start before training, "
        "then each method."
    )
    return render_section("Warm starts", note, ("start", *kinds, "all"), rows)


def render_task_kinds(report: ComparisonReport) -> str:
    kinds = find_task_kinds(report.lines)
    all_turns = report.primary.removesuffix("_calls")
    rows = [(line.label, *format_kinds(line, kinds), format_score(line, all_turns)) for line in report.lines if kinds]
    note = f"{describe_decoding(report)} exact match in percent, means over seeds."
    return render_section("By kind of task", note, ("percent", *kinds, "all"), rows)


def describe_decoding(report: ComparisonReport) -> str:
    return "Greedy" if has_greedy(report) else "Sampled"


def select_evaluations(line: MethodResult, when: str) -> list[dict[str, Any]]:
    return [run.run.summary.get(when) or {} for run in line.runs]


def find_task_kinds(lines: Iterable[MethodResult]) -> list[str]:
    after = greedy_if_recorded(*(scores for line in lines for scores in select_evaluations(line, "after")))
    return list(dict.fromkeys(kind for scores in after for kind in scores.get("kinds") or {}))


def format_kinds(line: MethodResult, kinds: Sequence[str]) -> list[str]:
    return format_exact_match(greedy_if_recorded(*select_evaluations(line, "after")), kinds)


def format_exact_match(scores: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    by_kind = [row.get("kinds") or {} for row in scores]
    return [format_mean(row.get(kind, {}).get("exact_match") for row in by_kind) for kind in kinds]


def format_mean(values: Iterable[Any]) -> str:
    known = [value for value in values if is_number(value)]
    return f"{100 * statistics.fmean(known):.1f}" if known else "–"


def render_runs(report: ComparisonReport) -> str:
    keys = available_metrics(report, RUN_METRICS)
    rows = [
        (str(run.name), *(format_value(key, run.values.get(key)) for key in keys))
        for line in report.lines
        for run in line.runs
    ]
    return f"## Every run\n\n{markdown_table(('percent', *(METRICS[key].label for key in keys)), rows)}"


def format_value(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key in DIFFERENCE_METRICS:
        return f"{100 * value:+.1f}"
    return f"{100 * value:.1f}" if METRICS[key].is_share else f"{value:.{METRICS[key].digits}f}"


def format_score(line: MethodResult, key: str) -> str:
    scale = 100 if METRICS[key].is_share else 1
    return format_interval(line.metrics[key].mean, scale, METRICS[key].digits) if key in line.metrics else "–"


def format_difference(line: MethodResult, key: str) -> str:
    test = line.metrics[key].paired if key in line.metrics else None
    scale = 100 if METRICS[key].is_share else 1
    return format_interval(test.difference, scale, METRICS[key].digits, sign="+") if test else "–"


def format_test(line: MethodResult, key: str) -> tuple[str, str, str]:
    return format_score(line, key), format_difference(line, key), format_q(line, key)


def format_q(line: MethodResult, key: str) -> str:
    return format_p(line.metrics[key].q) if key in line.metrics else "–"


METHOD_NOTE = """## How it is computed

Intervals are 95 % Student intervals over seeds. They describe new seeds on this data, not new data. Intervals of shares
end at 0 and 100 %: the true mean lies between them, so the cut loses no coverage. Differences are paired by seed: both
methods see the same samples in the same order. p (t) is the paired t test. p (flips) is the sign-flip permutation test,
which assumes no normal distribution; with n seeds it is never below 2/2ⁿ (0.25 for 3, 0.06 for 5). The verdict rests
only on the first metric of the first table, which was fixed in advance; all others are descriptive."""
CORRECTION_NOTE = """ q is p (t) corrected for the number of methods (Benjamini and Hochberg): of the methods with
q ≤ 0.05, at most 5 % are expected to be false positives."""


# Plots


def draw_plots(report: ComparisonReport, folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run.run for line in report.lines for run in line.runs]
    exact, turn = headline_key(runs, EXACT), headline_turn(row for run in runs for row in run.evaluations)
    drawn = {
        "Differences": draw_differences(report, folder / "differences.png"),
        "Learning": draw_panels(report, lambda run: values_by_step(run.run.metrics, exact), folder / "learning.png"),
        "Held-out slice": draw_panels(report, lambda run: slice_curve(run.run, turn), folder / "slice.png"),
        "Dynamics": draw_dynamics(report, folder / "dynamics.png"),
    }
    return {title: path for title, path in drawn.items() if path}


def draw_differences(report: ComparisonReport, path: Path) -> Path | None:
    key = report.primary
    lines = [line for line in report.rivals() if key in line.metrics and line.metrics[key].paired]
    if not lines:
        return None
    figure, axes = new_axes(7.2, 0.9 + 0.36 * len(lines))
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for row, line in enumerate(reversed(lines)):
        draw_difference(axes, row, report, line)
    axes.set_yticks(range(len(lines)), [line.label for line in reversed(lines)])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    style_axes(axes, f"{METRICS[key].label}: difference to {report.reference} on the same seed")
    axes.set_xlabel("points (diamond: mean over seeds, bar: its 95 % interval, dots: seeds)", fontsize=8, color=INK)
    axes.margins(x=0.06)
    axes.grid(axis="y", visible=False)
    roles = dict.fromkeys(line.role for line in lines)
    for role in roles:
        axes.plot([], [], color=ROLE_COLORS[role], linewidth=2.2, label=role)
    if len(roles) > 1:
        axes.legend(**legend_style(), bbox_to_anchor=(1.01, 1.0))
    return save_figure(figure, path)


def draw_difference(axes: Axes, row: int, report: ComparisonReport, line: MethodResult) -> None:
    reference, result = report.line(report.reference, line.start), line.metrics[report.primary]
    assert reference is not None
    assert result.paired is not None
    theirs, difference = reference.metrics[report.primary].by_seed, result.paired.difference
    color = ROLE_COLORS[line.role]
    if not math.isnan(difference.low):
        axes.plot([100 * difference.low, 100 * difference.high], [row, row], color=color, linewidth=2.2, zorder=2,
                  solid_capstyle="butt")  # fmt: skip
    dots = [100 * (value - theirs[seed]) for seed, value in result.by_seed.items() if seed in theirs]
    axes.plot(dots, [row - 0.22] * len(dots), "o", markersize=3, color=color, alpha=0.55, zorder=3)
    axes.plot([100 * difference.value], [row], "D", markersize=6, color=color, zorder=4, markeredgecolor="white")


def draw_panels(report: ComparisonReport, curve_of_run: RunCurve, path: Path) -> Path | None:

    def seed_curve(line: MethodResult) -> Curve:
        return average_curves([curve_of_run(run) for run in line.runs])

    # One panel per method, because the bands of ten methods in one plot would hide each other.
    lines = [line for line in report.rivals() or report.lines if seed_curve(line).steps]
    if not lines:
        return None
    across, down = min(PANELS_PER_ROW, len(lines)), -(-len(lines) // PANELS_PER_ROW)
    figure = white_figure(max(5.2, 2.55 * across + 0.6), 2.3 * down)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    for index, line in enumerate(lines):
        axes = panels[index]
        reference = report.line(report.reference, line.start)
        if reference is not None:
            draw_curve(axes, seed_curve(reference), REFERENCE_COLOR, reference.label)
        draw_curve(axes, seed_curve(line), ROLE_COLORS[line.role], line.label)
        style_axes(axes, line.label)
        is_lowest = index >= len(lines) - across
        axes.tick_params(labelbottom=is_lowest)
        if not is_lowest:
            axes.set_xlabel("")
    if len(lines) == 1:
        panels[0].legend(**legend_style())
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    return save_figure(figure, path)


def draw_dynamics(report: ComparisonReport, path: Path) -> Path | None:
    first_runs = [line.runs[0].run for line in report.lines]
    keys = [key for key in DYNAMICS_METRICS if any(key in row for run in first_runs for row in run.metrics)]
    if not keys:
        return None
    figure, panels = new_figure(len(keys))
    figure.set_size_inches(4.2 * len(keys) + 1.8, 3.4)
    is_pair = len(report.lines) == 2
    for axes, key in zip(panels, keys, strict=True):
        for index, (line, own) in enumerate(zip(report.lines, series_colors(len(report.lines)), strict=True)):
            color = ROLE_COLORS[line.role] if is_pair else own
            color = REFERENCE_COLOR if line.method == report.reference else color
            whole = metric_curve([run.run for run in line.runs], key)
            if not is_pair:  # the bands of ten methods would hide each other, so draw only the means
                whole = Curve(whole.steps, whole.mean, whole.mean, whole.mean)
            draw_curve(axes, whole, color, line.label)
            if axes.lines:
                axes.lines[-1].set_linestyle(("-", (0, (4, 2)), (0, (1, 1.5)))[index // len(SERIES_COLORS) % 3])
        style_axes(axes, DYNAMICS_METRICS[key])
        for drawn in axes.lines:
            if drawn.get_linewidth() < 1:  # the unsmoothed means of ten methods would hide the smoothed ones
                drawn.remove()
    panels[-1].legend(**legend_style(), bbox_to_anchor=(1.01, 1.0))
    panels[0].axhline(0, color=FAINT, linewidth=0.6)
    return save_figure(figure, path)

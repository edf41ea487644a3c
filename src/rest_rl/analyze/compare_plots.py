"""Pictures of a comparison: differences to the reference, learning curves beside it, entropy and gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rest_rl.analyze.compare import EXACT, METRICS, Cell, Comparison, Line, metric_curve, slice_curve
from rest_rl.analyze.palette import SERIES_COLOURS
from rest_rl.analyze.plots import FAINT, INK, colours, draw_curve, legend_style, new_figure, save, style
from rest_rl.analyze.tables import Curve, curve, curve_of, mean_and_sd
from rest_rl.significance import Interval

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

"""The HTML report: run folders as one interactive file that opens from disk and loads nothing from the network.

The page consists of its style, its script and its data. The data are compressed and encoded as base64, so that no
response can close the element that contains it. A content security policy allows only the page's own style and script,
by their hashes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.config import parse_recorded_run
from rest_rl.errors import UserError
from rest_rl.jsonl import replace_non_finite
from rest_rl.report.palette import REGION_COLORS, SERIES_COLORS
from rest_rl.report.responses import FLAG_LABELS, pack_responses
from rest_rl.report.tables import (
    Curve,
    RunGroup,
    diagnose_run,
    evaluation_curve,
    flatten,
    group_runs,
    headline_key,
    headline_turn,
    headline_turn_of_runs,
    is_number,
    last_finished_step,
    metric_curve,
    scores_for_turn,
)
from rest_rl.response import TURNS, Turn
from rest_rl.runlog import Row, Run, read_run, replace_file, unwritable_folder_error

PAGE_FILE = "report.html"
MAX_RESPONSES = 5000
MAX_POINTS = 1500
"""Longer curves are reduced to the means of equal intervals, with a band from the smallest to the largest value."""
SCRIPTS = ("data.js", "colors.js", "charts.js", "list.js", "detail.js", "page.js")
REGION_QUANTITIES = {
    "entropy": ("Entropy by region", "nats"),
    "weight": ("Weight by region", ""),
    "share": ("Share of tokens by region", "%"),
    "collision": ("Collision mass by region", ""),
}


class Chart(NamedTuple):
    """A metric with the title and unit of its chart; the unit % multiplies by 100."""

    key: str
    title: str
    unit: str = ""


CHARTS = (
    Chart("rest/exact_match", "Exact match, training samples", "%"),
    Chart("reward", "Reward"),
    Chart("rest/accuracy", "S_acc"),
    Chart("rest/format", "S_format"),
    Chart("rest/call_rate", "Responses with a call", "%"),
    Chart("frac_reward_zero_std", "Groups with equal rewards", "%"),
    Chart("completions/clipped_ratio", "Truncated responses", "%"),
    Chart("completions/mean_length", "Length", "tokens"),
    Chart("entropy", "Entropy", "nats"),
    Chart("grad_norm", "Gradient norm"),
    Chart("loss", "Loss"),
    Chart("mean_token_accuracy", "Token accuracy", "%"),
)
"""Charts that the page shows at first; all other metrics are folded away."""


def write_html_report(
    folders: Sequence[str | Path], out: str | Path | None = None, responses: int = MAX_RESPONSES
) -> Path:
    """Write one HTML page about run folders, with at most about `responses` responses, and return its path.

    `out` is a folder or a file that ends in .html; by default it is the folder of a single run.

    Raises:
        UserError: a folder has no run, or its run has neither a finished step nor a response.
    """
    if responses < 0:
        raise UserError(f"--responses is {responses}", "0 or more", "pass a larger number")
    runs = [read_run(folder) for folder in folders]
    empty = [str(run.folder) for run in runs if not last_finished_step(run) and not run.responses]
    if empty:
        raise UserError(f"no training step is finished in {', '.join(empty)}", remedy="resume the run, or leave it out")
    target = Path(out) if out else runs[0].folder if len(runs) == 1 else Path("report")
    page = target if target.suffix == ".html" else target / PAGE_FILE
    text = render_page(*build_page_data(runs, responses))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_file(page, text)
    except OSError as error:
        raise unwritable_folder_error(page.parent, error) from error
    return page


def build_page_data(runs: Sequence[Run], limit: int = MAX_RESPONSES) -> tuple[Row, bytes]:
    """Return everything that the page shows: values for JSON, and the columns of `TokenColumns` as bytes."""
    groups = group_runs(runs)
    order = [run for group in groups for run in group.runs]
    turn = headline_turn_of_runs(order)
    packed, tokens = pack_responses(order, limit)
    data = {
        "regions": dict(REGION_COLORS),
        "series": list(SERIES_COLORS),
        "flags": dict(FLAG_LABELS),
        "groups": [group.label for group in groups],
        "turns": TURNS[turn] if turn else "prompts",
        "runs": [build_run_row(run, at, turn) for at, group in enumerate(groups) for run in group.runs],
        "charts": list(build_charts(groups)),
        "config": build_config_rows(order),
        "findings": [{"run": at, **found._asdict()} for at, run in enumerate(order) for found in diagnose_run(run)],
        **packed,
    }
    return data, tokens


def build_run_row(run: Run, group: int, turn: Turn | None) -> Row:
    libraries, config = run.environment.get("libraries"), flatten(parse_recorded_run(run.config, str(run.folder)))
    planned = config.get("trl.max_steps")
    command = run.environment.get("command")
    return {
        "name": run.name,
        "group": group,
        "seed": config.get("run.seed"),
        "steps": last_finished_step(run),
        "finished": "steps" in run.summary,
        "planned": planned if is_number(planned) and planned > 0 else None,
        "recorded": len(run.responses),
        "before": select_scores(scores_for_turn(run.summary.get("before"), turn)),
        "after": select_scores(scores_for_turn(run.summary.get("after"), turn)),
        "answers": select_scores(scores_for_turn(run.summary.get("after"), "answers")) if turn else None,
        "libraries": libraries if isinstance(libraries, Mapping) else {},
        "commit": run.environment.get("commit"),
        "command": " ".join(map(str, command)) if isinstance(command, list) else "",
    }


def select_scores(scores: Any) -> Row | None:
    if not isinstance(scores, Mapping):
        return None
    names = ("exact_match", "exact_match_error", "s_acc", "s_format", "n", "temperature", "policy_entropy")
    kept = {name: scores[name] for name in names if is_number(scores.get(name))}
    return kept | {name: select_scores(scores[name]) for name in ("greedy", "low_temperature") if scores.get(name)}


def build_charts(groups: Sequence[RunGroup]) -> Iterator[Row]:
    runs = [run for group in groups for run in group.runs]
    turn = headline_turn(row for run in runs for row in run.evaluations)
    over = f", {TURNS[turn]}" if turn else ""
    for greedy, how in ((True, "greedy"), (False, "sampled at T = 1")):
        lines = [evaluation_curve(group.runs, turn, greedy=greedy) for group in groups]
        yield from build_chart(Chart("", f"Exact match, held out, {how}{over}", "%"), enumerate(lines), dots=True)
    headlines = [chart._replace(key=headline_key(runs, chart.key)) for chart in CHARTS]
    for chart in headlines:
        title = f"{chart.title}, {TURNS['calls']}" if chart.key.endswith("_calls") else chart.title
        yield from build_chart(chart._replace(title=title), group_curves(groups, chart.key))
    for quantity, (title, unit) in REGION_QUANTITIES.items():
        series = (
            (at, region, metric_curve(group.runs, f"rest/{quantity}/{region}"))
            for at, group in enumerate(groups)
            for region in REGION_COLORS
        )
        drawn = [build_series(line, at) | {"region": region} for at, region, line in series if line.steps]
        if drawn:
            yield {"title": title, "unit": unit, "kind": "region", "aside": quantity == "collision", "series": drawn}
    for key in find_other_keys(groups, headlines):
        yield from build_chart(Chart(key, key), group_curves(groups, key), aside=True)


def find_other_keys(groups: Sequence[RunGroup], shown: Iterable[Chart]) -> list[str]:
    keys = {key for group in groups for run in group.runs for row in run.metrics for key in row}
    keys -= {"step", "epoch", *(chart.key for chart in shown)}
    by_region = tuple(f"rest/{quantity}/" for quantity in REGION_QUANTITIES)
    return sorted(key for key in keys if not key.startswith(by_region))


def group_curves(groups: Sequence[RunGroup], key: str) -> Iterator[tuple[int, Curve]]:
    for at, group in enumerate(groups):
        yield at, metric_curve(group.runs, key)


def build_chart(
    spec: Chart, lines: Iterable[tuple[int, Curve]], *, aside: bool = False, dots: bool = False
) -> Iterator[Row]:
    # `aside` folds the chart away until the reader opens all metrics.
    drawn = [build_series(line, at) for at, line in lines if line.steps]
    if drawn:
        yield {"title": spec.title, "unit": spec.unit, "kind": "group", "aside": aside, "dots": dots, "series": drawn}


def build_series(line: Curve, group: int) -> Row:
    steps, mean, low, high = downsample(line)
    row: Row = {"group": group, "x": steps, "y": [round_for_page(value) for value in mean]}
    if low != high:
        row |= {"low": [round_for_page(value) for value in low], "high": [round_for_page(value) for value in high]}
    return row


def downsample(line: Curve) -> Curve:
    """Reduce a curve to at most `MAX_POINTS` points; the band still covers all extremes, so spikes stay visible."""
    if len(line.steps) <= MAX_POINTS:
        return line
    size = -(-len(line.steps) // MAX_POINTS)
    cuts = [slice(at, at + size) for at in range(0, len(line.steps), size)]
    return Curve(
        [line.steps[cut][len(line.steps[cut]) // 2] for cut in cuts],
        [sum(line.mean[cut]) / len(line.mean[cut]) for cut in cuts],
        [min(line.low[cut]) for cut in cuts],
        [max(line.high[cut]) for cut in cuts],
    )


def round_for_page(value: float) -> float:
    return float(f"{value:.6g}")


def build_config_rows(runs: Sequence[Run]) -> list[Row]:
    # Every key of any configuration, with its value in each run; None where a run lacks it.
    tables = [flatten(parse_recorded_run(run.config, str(run.folder))) for run in runs]
    keys = sorted({key for table in tables for key in table})
    rows = []
    for key in keys:
        values = [json.dumps(table[key], default=str) if key in table else None for table in tables]
        rows.append({"key": key, "values": values, "differs": key != "run.out" and len(set(values)) > 1})
    return rows


def render_page(data: Row, tokens: bytes) -> str:
    style, script = read_asset("page.css"), "\n".join(read_asset(name) for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}\n}})();\n'
    names = [run["name"] for run in data["runs"]]
    parts = {
        "title": html.escape(", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")),
        "policy": f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": compress_to_base64(json.dumps(replace_non_finite(data), separators=(",", ":")).encode("ascii")),
        "tokens": compress_to_base64(tokens),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read_asset("page.html"))


def compress_to_base64(content: bytes) -> str:
    # mtime=0 keeps the time out of the gzip header: equal content gives equal bytes.
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def source_hash(text: str) -> str:
    """Return the hash by which a content security policy allows this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def read_asset(name: str) -> str:
    return resources.files("rest_rl").joinpath("assets", "report", name).read_text(encoding="utf-8")

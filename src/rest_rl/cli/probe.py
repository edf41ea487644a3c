"""The command `probe`: estimate, without training, whether token weights would help a model."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rest_rl.cli.options import AsJson, OutFolder, Overrides, Progress, is_debug

if TYPE_CHECKING:
    from rest_rl.cli.terminal import Screen
    from rest_rl.probe.report import ProbeReport

MaxNewTokens = Annotated[int | None, typer.Option(metavar="N", help="tokens per response (default: as in the run)")]
Env = Annotated[
    str | None, typer.Option(metavar="ENV", help="environment instead of data (default: that of the model's run)")
]
Formats = Annotated[
    list[str],
    typer.Option("--format", metavar="F", help="tool-call format; repeat it to compare formats (default: auto)"),
]
Lora = Annotated[
    int | None, typer.Option(metavar="R", help="LoRA adapter of rank R, as in train (default: as in the run)")
]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="responses in one pass (default: eval.batch_size)")]

EPILOG = """\
examples:
  rest-rl probe                                    the embedded model
  rest-rl probe --model Qwen/Qwen3-0.6B --data dialogues.jsonl --lora 16 --out probes/base
  rest-rl probe --model runs/mine --progress 0.5   a trained model, with the data of its run
  rest-rl probe --model DIR --data FILE --format hermes --format toolrl
  rest-rl probe --model shop --env shop            rollouts in an environment, with the credit of its turns
"""


def probe(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="run folder, model or adapter folder, or hub name")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="dialogues (default: those of the model's run)")
    ] = None,
    env: Env = None,
    lora: Lora = None,
    formats: Formats = [],
    prompts: Annotated[int, typer.Option(metavar="N", help="number of prompts, at least 8")] = 96,
    group_size: Annotated[int, typer.Option(metavar="G", help="responses per prompt")] = 8,
    seed: Annotated[int, typer.Option(metavar="S", help="seed of prompts and sampling")] = 0,
    progress: Progress = 0.0,
    prompts_per_step: Annotated[
        int | None, typer.Option(metavar="P", help="prompts in the step to predict (default: as in the run)")
    ] = None,
    norm_cap: Annotated[
        float, typer.Option(metavar="C", help="scale down prompts whose gradient norm exceeds C medians (0: off)")
    ] = 0.0,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = None,
    overrides: Overrides = [],
    out: OutFolder = None,
    json: AsJson = False,
) -> None:
    """Estimate, without training, how much each region contributes to reward and gradient.

    The report predicts the effect of each weight rule on the next step and ends with a recommendation. It is written to
    --out, by default runs/probe-MODEL. With --json, the command prints one JSON object per format instead of tables.
    """
    overrides = [*([] if lora is None else [f"peft.r={lora}"]), *overrides]
    check(model, [f"env.path={dumps(env)}", *overrides] if env else overrides, formats)
    from rich.console import Console

    from rest_rl.cli.terminal import Screen
    from rest_rl.jsonl import as_json
    from rest_rl.probe.page import to_mapping
    from rest_rl.probe.run import JSON_FILE, PAGE_FILE, choose_unused_folder
    from rest_rl.probe.run import probe as run_probe
    from rest_rl.train.policy import silence_transformers

    if not is_debug(context):
        silence_transformers()
    screen = Screen(Console(stderr=json))  # with --json, stdout carries only JSON

    def show(report: ProbeReport) -> None:
        if json:
            print(as_json(to_mapping(report)), flush=True)
        else:
            show_report(report, screen)

    folder = Path(out) if out else choose_unused_folder("probe", model, JSON_FILE)
    run_probe(
        model, data, env=env, formats=formats, prompts=prompts, group=group_size, seed=seed, progress=progress,
        step=prompts_per_step, norm_cap=norm_cap, max_new_tokens=max_new_tokens, batch_size=batch_size,
        overrides=overrides, out=folder, on_report=show, observer=screen,
    )  # fmt: skip
    screen.say(f"{folder / PAGE_FILE}, {JSON_FILE} and plots")


def check(model: str | None, overrides: Sequence[str], formats: Sequence[str]) -> None:
    # Raise UserError for mistakes that can be found before torch is loaded.
    from rest_rl.config import RunConfig, read_run_file
    from rest_rl.evaluate.origin import resolve_origin
    from rest_rl.train.request import check_names

    check_names(RunConfig() if model else read_run_file(None, overrides), formats)
    if model:
        resolve_origin(model)


def show_report(report: ProbeReport, screen: Screen) -> None:
    from rest_rl.cli.terminal import say
    from rest_rl.probe.page import build_tables, describe_gradients, describe_samples, format_advice

    for table in build_tables(report):
        screen.show_table(*table)
    console = screen.console
    say(console, f"{describe_samples(report)}.\n{describe_gradients(report)}\n")
    for remark in report.verdict:
        console.print(f"• {remark.text}.", highlight=False, markup=False)
    console.print()
    console.print(format_advice(report.advice).replace("**", ""), highlight=False, markup=False, style="bold")
    console.print()

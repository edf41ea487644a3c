"""One evaluation as the command does it: what is asked, what fits, the bar, the folder, the tables."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from rest_rl.cli.eval_models import Plan, make_model, make_plan, model_settings, shown_command
from rest_rl.cli.eval_origin import model_label
from rest_rl.cli.eval_tables import show_summary, write_tables
from rest_rl.cli.terminal import eval_bar
from rest_rl.errors import UserError
from rest_rl.evaluate.benchmarks.api_bank import ApiBank
from rest_rl.evaluate.benchmarks.tool_world import ToolWorldTasks
from rest_rl.evaluate.conversation import Benchmark, Request
from rest_rl.evaluate.harness import evaluate_all, label, summarise
from rest_rl.evaluate.log import SUMMARY, EvalLog, Row
from rest_rl.evaluate.models.recorded import Recorded
from rest_rl.jsonl import as_json

NEW_TOKENS = {"tool-world": 160}
"""Length of a response where `--max-new-tokens` does not say; else 4096, with which API-Bank was published."""
DEFAULT_NEW_TOKENS = 4096
Room = Callable[[Request], tuple[int, int] | None]


def evaluate(arguments: argparse.Namespace) -> int:
    """Ask, judge, write and show; returns 1 if a sample was left without a response."""
    if not (arguments.oracle or arguments.responses or arguments.debug):
        from rest_rl.train.policy import quiet_loading

        quiet_loading()
    console = Console()
    check_numbers(arguments)
    plan = make_plan(arguments)
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = NEW_TOKENS.get(arguments.action, DEFAULT_NEW_TOKENS)
    with closing(make_benchmark(arguments, plan)) as benchmark:
        identities = chosen(benchmark, arguments)
        say(console, f"{benchmark.pin}: {len(identities)} of {len(benchmark.groups)} samples")
        say(console, f"prompt {plan.prompt}, format {plan.format} ({plan.why})")
        if arguments.dry_run:
            return dry_run(arguments, plan, benchmark, identities, console)
        settings = all_settings(arguments, plan, benchmark)
        out = Path(arguments.out or default_folder(arguments))
        log = EvalLog.resume(out, settings) if arguments.resume else EvalLog.unused(out)
        with console.status("loading"):
            model, notes = make_model(arguments, plan, dict.fromkeys(identities))
        for note in notes:
            say(console, note)
        if isinstance(model, Recorded):
            identities = [identity for identity in identities if identity in model.responses]
        say_what_fits(benchmark, model.room, plan, identities, console)
        if not arguments.resume:
            log.begin(settings, shown_command(arguments, sys.argv))
        with shown_rows(benchmark, log, len(identities), console) as on_row:
            rows = evaluate_all(benchmark, model, plan.tool_format, identities, log, on_row)
        return finish(arguments, plan, benchmark, rows, log, settings, console)


def say(console: Console, text: str) -> None:
    """Text without colours of its own, and without breaks that it does not have: a prompt is shown as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def check_numbers(arguments: argparse.Namespace) -> None:
    """ValueError for a number that is not above 0."""
    names = ("max_new_tokens", "batch_size", "concurrency", "limit", "requests_per_minute", "prompts", "timeout")
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}", "more than 0", "raise it")
    if arguments.retries < 0:
        raise UserError(f"--retries {arguments.retries}", "0 or more", "raise it")
    for name in ("categories", "ids"):
        if getattr(arguments, name) is not None and not listed(getattr(arguments, name)):
            raise UserError(f"--{name} without a name", "some with commas between them", "leave it out for all")


def make_benchmark(arguments: argparse.Namespace, plan: Plan) -> Benchmark:
    """The benchmark that was asked for, with all its samples of the asked categories."""
    if arguments.action == "api-bank":
        return ApiBank(arguments.data, keep_prompts=plan.keep_prompts)
    if arguments.action == "tool-world":
        return ToolWorldTasks(seed=arguments.seed, prompts=arguments.prompts, decision=arguments.decision)
    from rest_rl.evaluate.benchmarks.bfcl.benchmark import Bfcl

    return Bfcl(arguments.edition, listed(arguments.categories) or None)


def listed(text: str | None) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def chosen(benchmark: Benchmark, arguments: argparse.Namespace) -> list[str]:
    """The samples to ask for, in the benchmark's order; ValueError for names it does not have, and for none."""
    groups = benchmark.groups
    names = {name for group in groups.values() for name in (str(group), label(benchmark, group))}
    wanted = set(listed(arguments.categories)) if arguments.action != "bfcl" else set()  # BFCL has chosen itself
    refuse_unknown("categories", wanted, names)
    ids = set(listed(arguments.ids))
    refuse_unknown("ids", ids, set(groups))
    taken: dict[str, int] = {}
    found = []
    for identity, group in groups.items():
        is_wanted = not wanted or str(group) in wanted or label(benchmark, group) in wanted
        if not is_wanted or (ids and identity not in ids):
            continue
        taken[str(group)] = taken.get(str(group), 0) + 1
        if not arguments.limit or taken[str(group)] <= arguments.limit:
            found.append(identity)
    if not found:
        raise UserError("--categories and --ids that share no sample", "at least one", "leave one of them out")
    return found


def refuse_unknown(option: str, wanted: set[str], known: set[str]) -> None:
    """ValueError for names that the benchmark does not have."""
    if unknown := sorted(wanted - known):
        near = difflib.get_close_matches(unknown[0], known, n=1) or sorted(known)[:1]
        raise ValueError(f"got --{option} {', '.join(unknown)}, expected names of what is asked for, such as {near[0]}")


def all_settings(arguments: argparse.Namespace, plan: Plan, benchmark: Benchmark) -> dict[str, Any]:
    """Everything that the numbers depend on, as the folder records it."""
    # sorted: samples are asked for in the benchmark's order, whatever that of the options is
    selection = {name: sorted(set(listed(getattr(arguments, name)))) for name in ("categories", "ids")}
    about = {"benchmark": benchmark.name, "pin": benchmark.pin, **model_settings(arguments, plan)}
    return {**about, **selection, "limit": arguments.limit}


def default_folder(arguments: argparse.Namespace) -> str:
    """`runs/eval-BENCHMARK-MODEL`."""
    who = "oracle" if arguments.oracle else "responses" if arguments.responses else model_label(arguments.model)
    edition = f"-{arguments.edition}" if arguments.action == "bfcl" else ""
    return f"runs/eval-{arguments.action}{edition}-{who}"


def dry_run(
    arguments: argparse.Namespace, plan: Plan, benchmark: Benchmark, identities: Sequence[str], console: Console
) -> int:
    """The first prompt as the model would be given it, and what fits; nothing is asked."""
    request = opening(benchmark, plan, identities[0])
    console.rule(identities[0], align="left", style="dim")
    if plan.layout:
        say(console, plan.layout.render(request.sample))
        console.rule(f"{plan.layout.count_tokens(request.sample)} tokens", align="left", style="dim")
    elif plan.frame:
        for message in plan.frame.flatten(request.sample).messages:
            console.rule(message["role"], align="left", style="dim")
            say(console, message["content"])
    elif arguments.endpoint:
        from rest_rl.evaluate.models.chat_messages import chat_body

        body = chat_body(request.sample, plan.tool_format, native=plan.prompt == "native")
        say(console, as_json(body, indent=2))
    else:
        say(console, "nobody is shown a prompt: the responses are there")
    if plan.layout and plan.table:
        say_what_fits(benchmark, planned_room(arguments, plan), plan, identities, console)
    return 0


def planned_room(arguments: argparse.Namespace, plan: Plan) -> Room:
    """What `Model.room` will say of a checkpoint, from its configuration alone."""
    from rest_rl.evaluate.models.local import context_length
    from rest_rl.evaluate.models.token_prompts import room_of
    from rest_rl.train.policy import policy_config

    assert plan.table is not None
    layout = plan.layout
    assert layout is not None
    context = arguments.context or context_length(policy_config(plan.table), layout.tokenizer)
    return lambda request: room_of(request, layout, arguments.max_new_tokens, context)


def say_what_fits(benchmark: Benchmark, room: Room, plan: Plan, identities: Sequence[str], console: Console) -> None:
    """Per category what does not fit the model, before anything is asked; later turns are longer still."""
    longest: dict[str, tuple[int, int, int]] = {}
    context = 0
    with console.status("measuring the prompts"):
        for identity in identities:
            taken = room(opening(benchmark, plan, identity))
            if taken is None:
                return
            needed, context = taken
            group = label(benchmark, benchmark.groups[identity])
            most, tight, count = longest.get(group, (0, 0, 0))
            longest[group] = max(most, needed), tight + (needed > context), count + 1
    for group, (most, tight, count) in longest.items():
        if tight:
            say(
                console,
                f"{group}: {tight} of {count} first prompts and a response of full length exceed the {context} tokens "
                f"that the model holds (the longest take {most}); responses end there, and a prompt that leaves no "
                "room counts as wrong",
            )
    if longest and not any(tight for _, tight, _ in longest.values()):
        most = max(most for most, _, _ in longest.values())
        say(console, f"all first prompts fit: the longest takes {most} of {context} tokens with its response")


def opening(benchmark: Benchmark, plan: Plan, identity: str) -> Request:
    """The first request of a sample."""
    with closing(benchmark.start(identity, plan.tool_format)) as conversation:
        request = conversation.request()
    assert request is not None
    return request


@contextmanager
def shown_rows(benchmark: Benchmark, log: EvalLog, total: int, console: Console) -> Iterator[Callable[[Row], None]]:
    """A bar over the samples, with the rate, the headline so far and the time left."""
    headline = benchmark.metrics[0]
    rows = log.read_rows()
    counts = {"done": len(rows), "correct": sum(bool(row.get(headline)) for row in rows), "errors": 0}
    # of what is there already nothing has failed: that is asked for again
    with eval_bar(console, counts["done"], total) as advance:

        def on_row(row: Mapping[str, Any]) -> None:
            counts["done"] += 1
            counts["correct"] += bool(row.get(headline))
            counts["errors"] += "error" in row
            failed = f", {counts['errors']} failed" if counts["errors"] else ""
            scored = counts["done"] - counts["errors"]
            advance(counts["done"], f"{headline} {counts['correct'] / max(scored, 1):.1%}{failed}")

        yield on_row


def finish(
    arguments: argparse.Namespace,
    plan: Plan,
    benchmark: Benchmark,
    rows: Sequence[Row],
    log: EvalLog,
    settings: Mapping[str, Any],
    console: Console,
) -> int:
    """Summary, tables, and the samples without a response by their ids."""
    model = str(settings["model"])
    name = arguments.name or (model_label(model) if Path(model).is_dir() else model)
    version = {"version": arguments.edition} if arguments.action == "bfcl" else {}
    about = {"model": name, "prompt": plan.prompt, "format": plan.format, "settings": settings}
    summary = {**summarise(benchmark, list(rows)), **version, **about}
    log.write(SUMMARY, as_json(summary, indent=2) + "\n")
    write_tables([summary], log.folder)
    show_summary(summary, console)
    failed = [row for row in rows if "error" in row]
    for row in failed[:10]:
        say(console, f"no response to {row['id']}: {row['error']}")
    if failed:
        say(console, f"{len(failed)} samples are not scored; ask for them again with --resume --out {log.folder}")
    say(console, f"written to {log.folder}")
    return 1 if failed else 0

"""The commands `env`: check an environment, and write demonstrations, before training in it."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from rest_rl.cli.options import AsJson, Verb, verb_group
from rest_rl.errors import UserError

EPILOG = """\
examples:
  rest-rl env check shop                        a world that ships
  rest-rl env check my_tools.py:Shop            a class of yours
  rest-rl env check 'mcp:python server.py'      an MCP server
  rest-rl env demonstrate shop --out demos.jsonl
"""
group = verb_group(epilog=EPILOG, help="Prepare training in an environment: tools that run, over several turns.")
ENV = typer.Argument(
    metavar="ENV",
    help="a world that ships (shop, bfcl-tasks, tau2-telecom), FILE.py:OBJECT, module:OBJECT or mcp:COMMAND",
)
Tasks = Annotated[str, typer.Option(metavar="FILE", help="task rows, for an environment that has none")]
Reward = Annotated[str, typer.Option(metavar="MODULE:OBJECT", help="a function that scores rollouts")]
Options = Annotated[str, typer.Option(metavar="JSON", help="options, such as the verify_tool of a server")]
Seed = Annotated[int, typer.Option(metavar="N", help="seed of the tasks and sessions")]
Timeout = Annotated[float, typer.Option(metavar="S", help="seconds per call")]


def parse_options(text: str) -> dict[str, Any]:
    """Return the options of an environment from JSON text."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UserError(f"--options is not JSON ({error})", "an object", "quote it for the shell") from error
    if not isinstance(options, dict):
        raise UserError(f"--options is {text}", "a JSON object", "correct it")
    return options


@group.command("check", cls=Verb)
def check(
    env: Annotated[str, ENV],
    tasks: Tasks = "",
    reward: Reward = "",
    options: Options = "{}",
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="tasks per split")] = 20,
    seed: Seed = 0,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> int:
    """Check schemas, seeds, isolation, the end and the rewards with scripted policies; exit with 1 if a check failed.

    No model is needed. The gold calls, no calls, random calls, one call repeated and a part of the gold calls should
    earn different rewards; the table shows what each of them earns.
    """
    from rich.console import Console

    from rest_rl.cli.terminal import Screen
    from rest_rl.envs.check import check_environment
    from rest_rl.envs.guard import Limits
    from rest_rl.envs.load import load_environment

    screen = Screen(Console(stderr=as_json))
    environment = load_environment(env, tasks=tasks or None, reward=reward or None, options=parse_options(options))
    with screen.track(f"trying {env}", n * len(environment.splits)) as advance:
        report = check_environment(environment, number=n, seed=seed, limits=Limits(timeout=timeout), on_task=advance)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "findings": [found._asdict() for found in report.findings]}))
    else:
        for found in report.findings:
            screen.say(f"{found.status:<11}  {found.name}: {found.text}")
        header = ("policy", "n", "reward", "spread", "success %")
        rows = [
            (name, int(own["n"]), f"{own['reward']:.2f}", f"{own['spread']:.2f}", f"{100 * own['success']:.0f}")
            for name, own in report.policies.items()
        ]
        screen.show_table("what scripted policies earn", header, rows)
    return int(report.has_failed)


@group.command("demonstrate", cls=Verb)
def demonstrate(
    env: Annotated[str, ENV],
    out: Annotated[str, typer.Option("--out", metavar="OUT", help="file to write: NAME.jsonl or NAME.parquet")],
    tasks: Tasks = "",
    reward: Reward = "",
    options: Options = "{}",
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="tasks to solve")] = 400,
    split: Annotated[str, typer.Option(metavar="S", help="split of the tasks (default: the one for training)")] = "",
    seed: Seed = 0,
    timeout: Timeout = 30.0,
) -> None:
    """Solve tasks with their gold calls, and write the turns as training data for `rest-rl sft`.

    A model that solves no task at all learns nothing from reinforcement learning. Train it on such demonstrations
    first, until it solves some. Tasks that their gold calls do not solve are left out.
    """
    from rich.console import Console

    from rest_rl.cli.terminal import Screen
    from rest_rl.envs.demonstrate import write_demonstrations
    from rest_rl.envs.guard import Limits
    from rest_rl.envs.load import load_environment

    environment = load_environment(env, tasks=tasks or None, reward=reward or None, options=parse_options(options))
    screen, limits = Screen(Console(stderr=True)), Limits(timeout=timeout)
    with screen.track(f"solving {env}", n) as advance:
        written = write_demonstrations(
            environment, out, number=n, split=split, seed=seed, limits=limits, on_task=advance
        )
    if written.failures:
        screen.say(f"{len(written.failures)} tasks are left out, unsolved by their gold calls: {written.failures[0]}")
    print(f"wrote {out}: {written.samples} samples from {written.tasks} tasks")
    print(f"next: rest-rl sft --data {out} --model DIR_OR_ID")

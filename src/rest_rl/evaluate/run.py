"""`rest_rl.evaluate`: run one evaluation and write its folder, or preview its first prompt."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.config import AUTO, WORLDS
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Benchmark, Model, Request
from rest_rl.evaluate.harness import evaluate_all, group_label, summarize
from rest_rl.evaluate.log import SUMMARY, EvalLog, Row
from rest_rl.evaluate.models.recorded import Oracle, Recorded, read_responses
from rest_rl.evaluate.models.token_prompts import compute_context_usage
from rest_rl.evaluate.origin import compute_digest, model_label, weights_digest
from rest_rl.evaluate.plan import Plan, extra_request_fields, make_plan
from rest_rl.evaluate.request import EvalRequest
from rest_rl.evaluate.tables import write_tables
from rest_rl.jsonl import as_json
from rest_rl.objects import check_signature, load_object
from rest_rl.runlog import SILENT, Observer
from rest_rl.train.named_models import locate_model

MAX_VLLM_CONTEXT = 65_536
"""The largest context length, in tokens, that vLLM reserves memory for; BFCL's longest prompts need about half."""
ContextUsage = Callable[[Request], tuple[int, int] | None]


class Score(NamedTuple):
    """The score of one group by one metric: samples, correct samples, accuracy and its 95 % interval."""

    n: int
    correct: int
    accuracy: float | None
    low: float
    high: float


@dataclass(frozen=True)
class EvalResult:
    """A finished evaluation; `summary` and `rows` are the contents of summary.json and samples.jsonl."""

    folder: Path
    summary: Mapping[str, Any]
    rows: tuple[Row, ...]

    def scores(self, metric: str | None = None) -> dict[str, Score]:
        """Return the score of each group by one of the benchmark's metrics (default: the headline metric)."""
        is_headline = metric in (None, self.summary["metrics"][0])
        found = {
            name: (group, group if is_headline else group[metric]) for name, group in self.summary["groups"].items()
        }
        return {
            name: Score(group["n"], own["correct"], own["accuracy"], own["low"], own["high"])
            for name, (group, own) in found.items()
        }

    @property
    def failed(self) -> list[Row]:
        """The rows of samples without a response; `resume=True` evaluates these samples again."""
        return [row for row in self.rows if "error" in row]


class Preview(NamedTuple):
    """The first sample's prompt: the sample's id, (title, text) of each part, and the number of tokens if known."""

    identity: str
    parts: tuple[tuple[str, str], ...]
    tokens: int | None


def evaluate(
    benchmark: str | Benchmark, model: str | Path | Model | None = None, *, observer: Observer = SILENT, **options: Any
) -> EvalResult:
    """Evaluate a model on a benchmark and write the evaluation folder.

    Args:
        benchmark: `bfcl`, `api-bank`, `tool-world`, `office`, `shop`, a `package.module:OBJECT`, or a `Benchmark`.
        model: A run folder, model or adapter folder, Hub name or `Model`; None with `responses=` or `oracle=`.
        observer: Receives progress and notes.
        options: The other fields of `EvalRequest`: `data=`, `endpoint=`, `format=`, `limit=`, `out=`, `resume=`, ...

    Raises:
        UserError: The options contradict each other, or something they refer to is missing.
    """
    return run_request(EvalRequest(benchmark, str(model) if isinstance(model, Path) else model, **options), observer)


def run_request(request: EvalRequest, observer: Observer = SILENT) -> EvalResult:
    """Run the evaluation described by `request`; see `evaluate`."""
    with _open_evaluation(request, observer) as (plan, benchmark, identities):
        settings = _collect_settings(request, plan, benchmark)
        out = Path(request.out or _default_folder(request))
        log = EvalLog.resume(out, settings) if request.resume else EvalLog.new(out)
        with observer.track("loading"):
            model, notes = _make_model(request, plan, identities)
        try:
            available = identities
            if isinstance(model, Recorded):
                available = [identity for identity in identities if identity in model.responses]
            with observer.track("measuring the prompts"):
                notes += context_notes(benchmark, model.context_usage, plan, available)
            for note in notes:
                observer.say(note)
            if not request.resume:
                log.begin(settings, _public_command(request))
            rows = _evaluate_samples(benchmark, model, plan, available, log, observer)
        finally:
            if request.source != "object":
                model.stop()
        return _write_results(request, plan, benchmark, rows, log, settings)


def preview(request: EvalRequest, observer: Observer = SILENT) -> Preview:
    """Return the first prompt without calling the model. Loads only the tokenizer and writes nothing."""
    with _open_evaluation(request, observer) as (plan, benchmark, identities):
        # the branches follow the three ways to build a prompt: a chat template, ToolRL's texts, a server's messages
        first = first_request(benchmark, plan, identities[0])
        if first is None:
            remedy = f"run rest-rl env check {request.env}" if request.env else "correct the benchmark"
            raise UserError(f"the sample {identities[0]} has no prompt: it could not be started", remedy=remedy)
        sample = first.sample
        if plan.layout and plan.table:
            from rest_rl.train.policy import context_length, load_policy_config

            layout, context = plan.layout, request.context
            context = context or context_length(load_policy_config(plan.table), layout.tokenizer)
            for note in context_notes(
                benchmark,
                lambda asked: compute_context_usage(asked, layout, request.response_limit, context),
                plan,
                identities,
            ):
                observer.say(note)
        if plan.layout:
            parts, tokens = ((("", plan.layout.render(sample)),), plan.layout.count_tokens(sample))
        elif plan.frame:
            messages = plan.frame.flatten(sample).messages
            parts, tokens = tuple((message["role"], message["content"]) for message in messages), None
        elif request.source == "endpoint":
            from rest_rl.evaluate.models.chat_messages import build_chat_body

            body = build_chat_body(sample, plan.tool_format, native=plan.prompt == "native")
            parts, tokens = (("", as_json(body, indent=2)),), None
        else:
            parts, tokens = (("", "no prompt: no model is called"),), None
        return Preview(identities[0], parts, tokens)


@contextmanager
def _open_evaluation(request: EvalRequest, observer: Observer) -> Iterator[tuple[Plan, Benchmark, list[str]]]:
    plan = make_plan(request, observer)
    is_ours = isinstance(request.benchmark, str)
    benchmark = open_benchmark(request, plan)
    with closing(benchmark) if is_ours else nullcontext():
        identities = choose_samples(benchmark, request)
        observer.say(f"{benchmark.pin}: {len(identities)} of {len(benchmark.groups)} samples")
        observer.say(f"prompt {plan.prompt}, format {plan.format} ({plan.format_reason})")
        yield plan, benchmark, identities


def open_benchmark(request: EvalRequest, plan: Plan) -> Benchmark:
    """Return the benchmark of a request: a built-in one, an object, or the user's `package.module:OBJECT`.

    A class or a factory function at OBJECT is called without arguments.
    """
    name = request.benchmark
    if not isinstance(name, str):
        return name
    if name == "api-bank":
        from rest_rl.evaluate.benchmarks.api_bank import ApiBank

        if not request.data:
            remedy = "pass the folder with ToolRL's level-1-, level-2- and level-3-api_processed.json as --data"
            raise UserError("api-bank needs its data", remedy=remedy)
        return ApiBank(request.data, keep_prompts=plan.keep_prompts)
    if name in WORLDS.values():
        from rest_rl.evaluate.benchmarks.world import WorldTasks

        world = next(path for path, title in WORLDS.items() if title == name)
        return WorldTasks(world, seed=request.seed, prompts=request.prompts, decision=request.decision)
    if name == "bfcl":
        from rest_rl.evaluate.benchmarks.bfcl.benchmark import Bfcl

        return Bfcl(request.version, request.categories or None)
    if name == "env":
        return open_environment(request, plan)
    if ":" not in name:
        expected = "bfcl, api-bank, tool-world, office, shop, env or package.module:OBJECT"
        raise UserError(f"unknown benchmark {name!r}", expected, "correct the name")
    found: Any = load_object(name, "benchmark")
    makes_one = isinstance(found, type) or (callable(found) and not hasattr(found, "start"))
    benchmark: Any = found() if makes_one else found
    if missing := [
        part for part in ("name", "pin", "metrics", "group_field", "groups", "start") if not hasattr(benchmark, part)
    ]:
        raise UserError(
            f"benchmark {name!r} lacks the attributes {', '.join(map(repr, missing))}",
            "a rest_rl.Benchmark",
            "add them",
        )
    check_signature(benchmark.start, f"start of benchmark {name!r}", "identity", "tool_format")
    return benchmark


def open_environment(request: EvalRequest, plan: Plan) -> Benchmark:
    """Return the tasks of the environment of a request as a benchmark."""
    from rest_rl.envs.guard import Limits
    from rest_rl.envs.load import load_environment
    from rest_rl.evaluate.benchmarks.environment import EnvironmentTasks

    environment = load_environment(request.env, tasks=request.tasks, reward=request.reward, options=request.options)
    numbers = {"seed": request.seed, "prompts": request.prompts, "attempts": request.attempts}
    keeps = request.thoughts == "keep"
    limits = Limits(turns=request.turns)
    return EnvironmentTasks(environment, **numbers, limits=limits, layout=plan.layout if keeps else None)


def choose_samples(benchmark: Benchmark, request: EvalRequest) -> list[str]:
    """Return the ids of the samples to evaluate, in the benchmark's order."""
    groups = benchmark.groups
    names = {group: {str(group), group_label(benchmark.group_field, group)} for group in set(groups.values())}
    wanted = set(request.categories) if request.benchmark != "bfcl" else set()  # Bfcl selected its own
    _check_known("categories", wanted, set().union(*names.values()))
    _check_known("ids", request.ids, groups)
    counts: dict[str | int, int] = {}
    found = []
    for identity, group in groups.items():
        if (wanted and not names[group] & wanted) or (request.ids and identity not in request.ids):
            continue
        counts[group] = counts.get(group, 0) + 1
        if not request.limit or counts[group] <= request.limit:
            found.append(identity)
    if not found:
        raise UserError("no sample matches both --categories and --ids", remedy="remove one of the two options")
    return found


def _check_known(option: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(wanted) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1) or sorted(known)[:1]
        expected = f"names such as {', '.join(near)}"
        raise UserError(f"--{option} contains unknown names: {', '.join(unknown)}", expected, "correct the name")


# None if the conversation cannot start, for example because a session of an environment fails.
def first_request(benchmark: Benchmark, plan: Plan, identity: str) -> Request | None:
    with closing(benchmark.start(identity, plan.tool_format)) as conversation:
        return conversation.request()


def context_notes(
    benchmark: Benchmark, context_usage: ContextUsage, plan: Plan, identities: Sequence[str]
) -> list[str]:
    """Return notes on how many first prompts plus a response of maximum length exceed the context length, per group."""
    longest: dict[str, tuple[int, int, int]] = {}
    context = 0
    number = getattr(benchmark, "measured_prompts", None) or len(identities)
    measured = identities[:: max(1, -(-len(identities) // number))]
    kind = "first prompts" if len(measured) == len(identities) else "measured first prompts"
    for identity in measured:
        if (request := first_request(benchmark, plan, identity)) is None:
            continue
        usage = context_usage(request)
        if usage is None:
            return []
        needed, context = usage
        group = group_label(benchmark.group_field, benchmark.groups[identity])
        most, over, count = longest.get(group, (0, 0, 0))
        longest[group] = max(most, needed), over + (needed > context), count + 1
    notes = [
        f"{group}: {over} of {count} {kind} plus a response of maximum length exceed the context length "
        f"of {context} tokens (the longest needs {most}); responses are cut off there, and a prompt that leaves no "
        "room for a response counts as wrong"
        for group, (most, over, count) in longest.items()
        if over
    ]
    if longest and not notes:
        most = max(most for most, _, _ in longest.values())
        return [f"all {kind} fit: the longest needs {most} of {context} tokens, response included"]
    return notes


def _make_model(request: EvalRequest, plan: Plan, identities: Sequence[str]) -> tuple[Model, list[str]]:
    if request.source == "object":
        assert not isinstance(request.model, (str, type(None)))
        return request.model, []
    if request.oracle:
        return Oracle(plan.tool_format), []
    if request.responses:
        responses, unknown_ids = read_responses(request.responses, dict.fromkeys(identities))
        notes = [f"{request.responses} contains responses to {len(responses)} of {len(identities)} samples"]
        if unknown_ids:
            notes.append(f"ignored responses to other samples: {len(unknown_ids)} (first id {unknown_ids[0]!r})")
        return Recorded(responses), notes
    return _make_server(request, plan) if request.endpoint else _make_checkpoint(request, plan)


def _make_server(request: EvalRequest, plan: Plan) -> tuple[Model, list[str]]:
    from rest_rl.evaluate.models.endpoint import Endpoint

    server = Endpoint(
        str(request.endpoint),
        request.checkpoint,
        plan.tool_format,
        native=plan.prompt == "native",
        max_new_tokens=request.response_limit,
        concurrency=request.concurrency,
        timeout=request.timeout,
        retries=request.retries,
        requests_per_minute=request.requests_per_minute,
        api_key_env=request.api_key_env,
        extra_body=extra_request_fields(request),
        layout=plan.layout,
        frame=plan.frame,
        context=request.context,
    )
    server.check()
    return server, [f"requests at the same time to {server.url}: {request.concurrency}"]


def _make_checkpoint(request: EvalRequest, plan: Plan) -> tuple[Model, list[str]]:
    import torch

    from rest_rl.evaluate.models.local import LocalModel
    from rest_rl.train.policy import context_length, load_policy, load_policy_config

    table, layout, context = plan.table, plan.layout, request.context
    assert table is not None
    assert layout is not None
    sizes: dict[str, Any] = {"batch_size": request.effective_batch_size, "max_new_tokens": request.response_limit}
    if request.vllm:
        from rest_rl.evaluate.models.vllm import VllmModel

        model_context = context_length(load_policy_config(table), layout.tokenizer) or MAX_VLLM_CONTEXT
        context = min(model_context, MAX_VLLM_CONTEXT) if context is None else context
        path = str(locate_model(table.path))
        return VllmModel(path, layout, **sizes, context=context), [f"vLLM, context length {context} tokens"]
    device = torch.accelerator.current_accelerator()
    # on an accelerator, evaluation needs no more than 16 bits; `load_policy` would choose float32, as in training
    dtype = "bfloat16" if device and table.dtype == AUTO else table.dtype
    weights, _ = load_policy(replace(table, dtype=dtype))
    weights = weights if table.load_in_4bit else weights.to(device or "cpu")
    sizes["temperature"] = request.sampling_temperature
    return LocalModel(weights, layout, **sizes, context=context), [f"transformers on {device or 'the CPU'}"]


def _collect_settings(request: EvalRequest, plan: Plan, benchmark: Benchmark) -> dict[str, Any]:
    # Everything that the scores depend on; `resume` compares it with settings.json. The selection is sorted because
    # samples run in the benchmark's order, independent of the order of the options.
    selection = {"categories": sorted(set(request.categories)), "ids": sorted(set(request.ids)), "limit": request.limit}
    about = {"benchmark": benchmark.name, "pin": benchmark.pin, "prompt": plan.prompt, "format": plan.format}
    return {**about, **_collect_model_settings(request, plan), **selection}


def _collect_model_settings(request: EvalRequest, plan: Plan) -> dict[str, Any]:
    texts = {"prompt_texts": plan.frame.digest} if plan.frame else {}
    if request.source == "object":
        return {"model": request.name or type(request.model).__name__, **texts}
    if request.oracle:
        return {"model": "oracle", **texts}
    if request.responses:
        return {"model": "recorded", **texts, "responses": compute_digest(Path(request.responses))}
    settings: dict[str, Any] = {"model": request.checkpoint, **texts, "max_new_tokens": request.response_limit}
    if request.sampling_temperature:
        settings["temperature"] = request.sampling_temperature
    if request.context is not None:
        settings["context"] = request.context
    # users edit the chat template in a model's folder, and the prompts change with it
    template = hashlib.sha256(str(plan.layout.tokenizer.chat_template if plan.layout else "").encode()).hexdigest()[:12]
    if request.endpoint:
        from rest_rl.evaluate.models.endpoint import public_url

        route = "chat" if plan.layout is None or plan.prompt == "native" else "completions"
        settings |= {"backend": "endpoint", "endpoint": public_url(request.endpoint), "route": route}
        settings["body"] = extra_request_fields(request)
        return {**settings, "chat_template": template} if request.tokenizer else settings
    assert plan.table is not None
    return {
        **settings,
        "backend": "vllm" if request.vllm else "transformers",
        "batch_size": request.effective_batch_size,
        "weights": weights_digest(plan.table),
        "chat_template": template,
        "chat_template_kwargs": dict(plan.table.chat_template_kwargs),
        "dtype": plan.table.dtype,
    }


def _public_command(request: EvalRequest) -> list[str]:
    # environment.json is shared with others, but the server's URL may contain a password or a key
    if not request.endpoint:
        return list(request.command)
    from rest_rl.evaluate.models.endpoint import public_url

    return [part.replace(request.endpoint, public_url(request.endpoint)) for part in request.command]


def _default_folder(request: EvalRequest) -> str:
    names = {"oracle": "oracle", "responses": "responses", "object": request.name or type(request.model).__name__}
    edition = f"-{request.version}" if request.benchmark == "bfcl" else ""
    who = names.get(request.source) or model_label(request.checkpoint)
    name = request.benchmark if isinstance(request.benchmark, str) else request.benchmark.name
    name = f"env-{request.env}" if name == "env" else name.rpartition(":")[2]
    return f"runs/eval-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}{edition}-{who}"


def _evaluate_samples(
    benchmark: Benchmark, model: Model, plan: Plan, identities: Sequence[str], log: EvalLog, observer: Observer
) -> list[Row]:
    headline, rows = benchmark.metrics[0], log.read_rows()
    done, correct, failed = len(rows), sum(bool(row.get(headline)) for row in rows), 0
    # a resumed log contains no failed sample: EvalLog.resume dropped them
    with observer.track("evaluating", len(identities), done) as advance:

        def on_row(row: Row) -> None:
            nonlocal done, correct, failed
            done, correct, failed = done + 1, correct + bool(row.get(headline)), failed + ("error" in row)
            note = f"{headline} {correct / max(done - failed, 1):.1%}"
            advance(done, note=f"{note}, {failed} failed" if failed else note)

        return evaluate_all(benchmark, model, plan.tool_format, identities, log, on_row)


def _write_results(
    request: EvalRequest, plan: Plan, benchmark: Benchmark, rows: list[Row], log: EvalLog, settings: Mapping[str, Any]
) -> EvalResult:
    model = str(settings["model"])
    name = request.name or (model_label(model) if Path(model).is_dir() else model)
    about = {"model": name, "prompt": plan.prompt, "format": plan.format, "settings": settings}
    summary = {**summarize(benchmark, rows), **about}
    log.write(SUMMARY, as_json(summary, indent=2) + "\n")
    write_tables([summary], log.folder)
    return EvalResult(log.folder, summary, tuple(rows))

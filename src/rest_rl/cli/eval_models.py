"""Who answers an evaluation, and how it is asked: read off the options and the run that the model comes from."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rest_rl.cli.eval_origin import digest_of, recorded_run, weights_digest
from rest_rl.config import AUTO, EMBEDDED, ModelTable, RunConfig, apply_overrides, from_mapping
from rest_rl.data.flattened_layout import FlattenedLayout, Frame, frame_of
from rest_rl.data.layout import PromptLayout, resolve_format, template_format
from rest_rl.data.reading import load_json
from rest_rl.data.shapes.flattened import FORMAT
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Model
from rest_rl.evaluate.log import SETTINGS
from rest_rl.evaluate.models.recorded import Oracle, Recorded, read_responses
from rest_rl.formats import ToolFormat, get_format
from rest_rl.formats.opened_think import SUFFIX
from rest_rl.runlog import read_object

DEFAULT_FORMAT = FORMAT
"""Of recorded responses and of the oracle."""
VLLM_CONTEXT = 65_536
"""Tokens of context that vLLM is asked to make room for at most; the longest prompts of BFCL take about half of it."""
BATCH_SIZE, VLLM_BATCH_SIZE = 16, 256
"""Where `--batch-size` does not say; vLLM makes batches of its own out of what it is given."""
BFCL_BATCH_SIZE = 64
"""At most of BFCL where `--batch-size` does not say: each of its conversations of several turns holds a process."""
NOT_RECORDED = ("set", "context", "max_new_tokens", "tokenizer", "requests_per_minute", "extra_body")
"""Options that mean nothing where no model is asked."""
OF_A_SERVER = ("tokenizer", "requests_per_minute", "extra_body")
OF_A_CHECKPOINT = ("vllm", "batch_size")


@dataclass(frozen=True)
class Plan:
    """How the model is asked, settled before any weights are loaded."""

    prompt: str
    format: str
    why: str
    keep_prompts: bool = False
    table: ModelTable | None = None
    """Of a local model."""
    layout: PromptLayout | None = None
    frame: Frame | None = None
    """ToolRL's texts, where the model is asked by its published prompts."""

    @property
    def tool_format(self) -> ToolFormat:
        """The format that responses are read in."""
        return self.layout.format if self.layout else get_format(self.format)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Prompt and format for the options; ValueError for options that contradict each other or leave it open."""
    check_who(arguments)
    refuse_idle(arguments)
    told = arguments.prompt or ("as recorded" if arguments.responses else "not asked")
    arguments.prompt = arguments.prompt or "training"
    if arguments.oracle or arguments.responses:
        name, why = recorded_format(arguments)
        get_format(name)
        frame, why = published_frame(arguments, name, why)
        return Plan(told, name, why, arguments.prompt == "published", frame=frame)
    if arguments.endpoint:
        return endpoint_plan(arguments)
    return local_plan(arguments)


def recorded_format(arguments: argparse.Namespace) -> tuple[str, str]:
    """(format, why) where no model is asked: an earlier evaluation says what its responses are written in."""
    if arguments.format:
        return arguments.format, "as asked"
    if arguments.responses:
        beside = read_object(Path(arguments.responses).with_name(SETTINGS))
        if isinstance(beside.get("format"), str):
            return beside["format"], f"as in the {SETTINGS} beside the responses"
    return DEFAULT_FORMAT, "the default without a model"


def check_who(arguments: argparse.Namespace) -> None:
    """ValueError unless exactly one answers."""
    chosen = [name for name in ("oracle", "responses", "endpoint") if getattr(arguments, name)]
    if len(chosen) > 1 or (arguments.model and chosen not in ([], ["endpoint"])):
        given = " and ".join(f"--{name}" for name in [*chosen, *(["model"] if arguments.model else [])])
        raise UserError(f"{given}", "one that answers", "leave the others out")
    if not chosen and not arguments.model:
        if arguments.action == "tool-world":
            arguments.model = EMBEDDED
            return
        raise ValueError("got nobody who answers, expected --model, --endpoint with --model, --responses or --oracle")
    if chosen == ["endpoint"] and not arguments.model:
        raise UserError("--endpoint without --model", "the name that the server holds", "pass --model NAME")


def refuse_idle(arguments: argparse.Namespace) -> None:
    """ValueError for an option that would change nothing, because it is of another kind of model."""
    if arguments.oracle or arguments.responses:
        chosen, idle = "--oracle" if arguments.oracle else "--responses", (*OF_A_CHECKPOINT, *NOT_RECORDED)
        told = f"with {chosen}, expected it with --model alone"
    elif arguments.endpoint:
        idle, told = OF_A_CHECKPOINT, "with --endpoint, expected it with a checkpoint as --model"
    else:
        idle, told = OF_A_SERVER, "without --endpoint, expected a server that it is for"
    for name in idle:
        value = getattr(arguments, name)
        if value not in (None, False, []):
            raise ValueError(f"got --{name.replace('_', '-')} {told}; leave it out")


def local_plan(arguments: argparse.Namespace) -> Plan:
    """Of a checkpoint: in the format and by the template variables of the run it comes from, if it comes from one."""
    from rest_rl.train.policy import policy_tokenizer

    path, run, folder = recorded_run(arguments.model)
    recorded = {"path": path, "chat_template_kwargs": dict(run.model.chat_template_kwargs) if run else {}}
    changes = apply_overrides({"model": recorded}, arguments.set)
    if set(changes) != {"model"}:
        raise ValueError(f"got --set of {', '.join(sorted(set(changes) - {'model'}))}, expected keys of [model] alone")
    table = from_mapping(ModelTable, changes["model"], "model")
    tokenizer = policy_tokenizer(table)
    keeps = arguments.prompt == "published" or bool(arguments.prompt == "training" and run and run.data.keep_prompts)
    asked = arguments.format or (run.rest.format if run and arguments.prompt == "training" else None)
    if arguments.prompt == "native":
        own = native_format(tokenizer, arguments.model)
        if asked not in (None, own):
            raise UserError(
                f"--prompt native and format {asked}",
                f"{own}, which the model's template writes",
                "leave --format out, or --prompt",
            )
        asked = own
    elif asked is None:
        asked = FORMAT if keeps else AUTO
    name, why = resolve_format(asked, tokenizer, table.chat_template_kwargs)
    why = f"as in {folder}" if run and not arguments.format and arguments.prompt == "training" else why
    frame, why = published_frame(arguments, name, why, run)
    layout = layout_of(tokenizer, name, frame, table.chat_template_kwargs)
    return Plan(arguments.prompt, name, why, keeps and arguments.action == "api-bank", table, layout, frame)


def layout_of(
    tokenizer: Any, name: str, frame: Frame | None, variables: Mapping[str, Any] | None = None
) -> PromptLayout:
    """How prompts are laid out in a format; around the texts of a frame where there is one."""
    return FlattenedLayout(tokenizer, frame, name, variables) if frame else PromptLayout(tokenizer, name, variables)


def published_frame(
    arguments: argparse.Namespace, name: str, why: str, run: RunConfig | None = None
) -> tuple[Frame | None, str]:
    """(ToolRL's texts, why with the file they come from) if the model is asked by its prompts; (None, why) if not.

    So it is asked where the options say so, and where its run has trained on them. API-Bank brings its own texts.
    ValueError for a contradiction, and without a file that has the texts.
    """
    given = getattr(arguments, "prompt_from", None)
    is_toolrl = name.removesuffix(SUFFIX) == FORMAT
    kept = run.data.path if run and run.data.keep_prompts and is_toolrl else None
    is_asked = arguments.prompt == "published" or (arguments.prompt == "training" and kept is not None)
    if arguments.action == "api-bank" or not is_asked:
        if given:
            raise UserError(
                f"--prompt-from with --prompt {arguments.prompt}",
                f"--prompt published, or the folder of a run that kept its prompts in {FORMAT}",
                "leave it out",
            )
        return None, why
    if not is_toolrl:
        raise UserError(
            f"--prompt published and format {name}", f"{FORMAT}, which those prompts ask for", "leave --format out"
        )
    if not (path := given or kept):
        raise UserError(
            "--prompt published without --prompt-from",
            "a file of ToolRL's rows, whose texts are no part of this package",
            "pass --prompt-from rlla_sft.json",
        )
    try:
        return frame_of(path), f"{why}; texts from {path}"
    except ValueError as error:
        told = str(error) if given else f"{error}; --prompt-from names another file than the run's data.path"
        raise ValueError(told) from error


def native_format(tokenizer: Any, model: str) -> str:
    """The format of the template; ValueError where it shows none."""
    if found := template_format(tokenizer):
        return found
    raise UserError(
        f"--prompt native and {model}, whose chat template shows no known format of calls",
        "one that does",
        "leave --prompt out",
    )


def endpoint_plan(arguments: argparse.Namespace) -> Plan:
    """Of a server: its own tool calling, or the tools described in words in a format that must be named."""
    from rest_rl.train.policy import policy_tokenizer

    tokenizer, variables = None, server_body(arguments).get("chat_template_kwargs")
    if arguments.tokenizer:
        tokenizer = policy_tokenizer(ModelTable(path=arguments.tokenizer))
        default = FORMAT if arguments.prompt == "published" else AUTO
        name, why = resolve_format(arguments.format or default, tokenizer, variables)
    elif arguments.format or arguments.prompt == "native":
        name, why = arguments.format or "hermes", "as asked" if arguments.format else "where the server reads out none"
        get_format(name)
    elif arguments.prompt == "published":
        name, why = FORMAT, "the published texts ask for it"
    else:
        raise UserError(
            "--endpoint without --format",
            "the format that the model writes calls in",
            "pass --format hermes (or toolrl, llama3, ...), --tokenizer DIR_OR_ID to tell it from, or --prompt "
            "native for the server's own function calling",
        )
    frame, why = published_frame(arguments, name, why)
    layout = layout_of(tokenizer, name, frame, variables) if tokenizer is not None else None
    return Plan(arguments.prompt, name, why, arguments.prompt == "published", layout=layout, frame=frame)


def make_model(arguments: argparse.Namespace, plan: Plan, groups: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """(whoever answers, what to say about it): weights are loaded here."""
    if arguments.oracle:
        return Oracle(plan.tool_format), []
    if arguments.responses:
        responses, strangers = read_responses(arguments.responses, groups)
        notes = [f"{len(responses)} responses in {arguments.responses} to {len(groups)} samples"]
        if strangers:
            notes.append(f"{len(strangers)} of others are left aside, the first of {strangers[0]!r}")
        return Recorded(responses), notes
    if arguments.endpoint:
        return endpoint_model(arguments, plan)
    return local_model(arguments, plan)


def local_model(arguments: argparse.Namespace, plan: Plan) -> tuple[Model, list[str]]:
    """A checkpoint by transformers or vLLM."""
    import torch

    from rest_rl.evaluate.models.local import LocalModel, context_length
    from rest_rl.train.policy import load_policy, policy_config

    assert plan.table is not None
    assert plan.layout is not None
    if arguments.vllm:
        from rest_rl.evaluate.models.vllm import VllmModel

        holds = context_length(policy_config(plan.table), plan.layout.tokenizer) or VLLM_CONTEXT
        context = min(holds, VLLM_CONTEXT) if arguments.context is None else arguments.context
        sizes = {"batch_size": batch_size(arguments), "max_new_tokens": arguments.max_new_tokens, "context": context}
        model = VllmModel(plan.table.path, plan.layout, **sizes)
        return model, [f"vLLM, {context} tokens of context"]
    device = torch.accelerator.current_accelerator()
    dtype = "bfloat16" if device and plan.table.dtype == AUTO else plan.table.dtype
    weights, _ = load_policy(replace(plan.table, dtype=dtype))
    weights = weights if plan.table.load_in_4bit else weights.to(device or "cpu")
    sizes = {"batch_size": batch_size(arguments), "max_new_tokens": arguments.max_new_tokens}
    sizes["context"] = arguments.context
    return LocalModel(weights, plan.layout, **sizes), [f"transformers on {device or 'the CPU'}"]


def batch_size(arguments: argparse.Namespace) -> int:
    """How many conversations a checkpoint goes on with at once."""
    if arguments.batch_size is not None:
        return arguments.batch_size
    size = VLLM_BATCH_SIZE if arguments.vllm else BATCH_SIZE
    return min(size, BFCL_BATCH_SIZE) if arguments.action == "bfcl" else size


def endpoint_model(arguments: argparse.Namespace, plan: Plan) -> tuple[Model, list[str]]:
    """A server, after it was asked for its models."""
    from rest_rl.evaluate.models.endpoint import Endpoint

    server = Endpoint(
        arguments.endpoint,
        arguments.model,
        plan.tool_format,
        native=plan.prompt == "native",
        max_new_tokens=arguments.max_new_tokens,
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        retries=arguments.retries,
        requests_per_minute=arguments.requests_per_minute,
        api_key_env=arguments.api_key_env,
        extra_body=server_body(arguments),
        layout=plan.layout,
        frame=plan.frame,
        context=arguments.context,
    )
    server.check()
    return server, [f"{arguments.concurrency} requests at once to {server.url}"]


def server_body(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--extra-body` and `--set model.chat_template_kwargs.X=...` add to every request.

    ValueError for other keys in `--set`, and for an extra body that is no object.
    """
    changes = arguments.set
    table = apply_overrides({"model": {}}, changes)
    if set(table) != {"model"} or set(table["model"]) - {"chat_template_kwargs"}:
        raise UserError(
            f"--set {' '.join(changes)} with --endpoint",
            "keys of model.chat_template_kwargs alone, which are sent with every request",
            "leave the others out",
        )
    body = extra_body(arguments.extra_body) if arguments.extra_body else {}
    variables = {**body.get("chat_template_kwargs", {}), **table["model"].get("chat_template_kwargs", {})}
    return {**body, "chat_template_kwargs": variables} if variables else body


def extra_body(text: str) -> dict[str, Any]:
    """The object of `--extra-body`; ValueError for anything else."""
    try:
        body = load_json(text)
    except ValueError as error:
        body = str(error)
    if not isinstance(body, dict) or not isinstance(body.get("chat_template_kwargs", {}), dict):
        raise UserError(
            f"--extra-body {text:.80}",
            "a JSON object (and so its chat_template_kwargs)",
            "write --extra-body '{\"repetition_penalty\": 1.0}'",
        )
    return body


def model_settings(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What tells one model and way of asking from another, for `--resume`."""
    settings: dict[str, Any] = {"prompt": plan.prompt, "format": plan.format, "model": arguments.model}
    if plan.frame:
        settings["prompt_texts"] = plan.frame.digest
    if arguments.oracle:
        return {**settings, "model": "oracle"}
    if arguments.responses:
        return {**settings, "model": "recorded", "responses": digest_of(Path(arguments.responses))}
    settings["max_new_tokens"] = arguments.max_new_tokens
    if arguments.context is not None:
        settings["context"] = arguments.context
    template = str(plan.layout.tokenizer.chat_template if plan.layout else "")
    if arguments.endpoint:
        return {**settings, **endpoint_settings(arguments, plan, template)}
    assert plan.table is not None
    return {
        **settings,
        "backend": "vllm" if arguments.vllm else "transformers",
        "batch_size": batch_size(arguments),
        "weights": weights_digest(plan.table),
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:12],
        "chat_template_kwargs": dict(plan.table.chat_template_kwargs),
        "dtype": plan.table.dtype,
    }


def endpoint_settings(arguments: argparse.Namespace, plan: Plan, template: str) -> dict[str, Any]:
    """Of a server; without what its URL may hold in secret."""
    from rest_rl.evaluate.models.endpoint import public_url

    route = "chat" if plan.layout is None or plan.prompt == "native" else "completions"
    endpoint = public_url(arguments.endpoint)
    settings: dict[str, Any] = {"backend": "endpoint", "endpoint": endpoint, "route": route}
    settings["body"] = server_body(arguments)
    if arguments.tokenizer:
        settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()[:12]
    return settings


def shown_command(arguments: argparse.Namespace, command: Sequence[str]) -> list[str]:
    """A command line without what the server's URL may hold in secret."""
    from rest_rl.evaluate.models.endpoint import public_url

    url = arguments.endpoint
    return [part.replace(url, public_url(url)) for part in command] if url else list(command)

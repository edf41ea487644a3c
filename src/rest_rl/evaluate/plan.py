"""How a model is asked: prompt and format, read off the request and the run that the model comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rest_rl.config import AUTO, ModelTable, RunConfig, apply_overrides, from_mapping
from rest_rl.data.flattened_layout import FlattenedLayout, Frame, frame_of
from rest_rl.data.layout import PromptLayout, detect_tokenizer_format, resolve_format
from rest_rl.data.shapes.toolrl import FORMAT
from rest_rl.errors import UserError
from rest_rl.evaluate.log import SETTINGS
from rest_rl.evaluate.origin import resolve_origin
from rest_rl.evaluate.request import EvalRequest
from rest_rl.formats import ToolFormat, get_format
from rest_rl.formats.detect import choose_format
from rest_rl.formats.opened_think import THINK_SUFFIX
from rest_rl.jsonl import read_lines, response_texts
from rest_rl.runlog import read_json_object


@dataclass(frozen=True)
class Plan:
    """How the model is asked, settled before any weights are loaded."""

    prompt: str
    format: str
    format_reason: str
    keep_prompts: bool = False
    """Whether API-Bank's published texts are the prompts."""
    table: ModelTable | None = None
    """Of a checkpoint."""
    layout: PromptLayout | None = None
    frame: Frame | None = None
    """ToolRL's texts, where the model is asked by its published prompts."""

    @property
    def tool_format(self) -> ToolFormat:
        return self.layout.format if self.layout else get_format(self.format)


def make_plan(request: EvalRequest) -> Plan:
    """Prompt and format for a request; UserError for options that contradict each other or leave it open."""
    if request.source == "endpoint":
        return _server_plan(request)
    if request.source == "checkpoint":
        return _checkpoint_plan(request)
    placeholder = {"oracle": "not asked", "responses": "as recorded", "object": "training"}[request.source]
    name, reason = _format_without_tokenizer(request)
    get_format(name)
    frame, reason = _resolve_published_frame(request, name, reason)
    return Plan(request.prompt or placeholder, name, reason, request.prompt == "published", frame=frame)


def _format_without_tokenizer(request: EvalRequest) -> tuple[str, str]:
    """(format, why); an earlier evaluation says what its responses are written in."""
    if request.format and request.format != AUTO:
        return request.format, "as set"
    if request.responses:
        recorded = read_json_object(Path(request.responses).with_name(SETTINGS))
        if isinstance(recorded.get("format"), str):
            return recorded["format"], f"as in the {SETTINGS} beside the responses"
        return choose_format(AUTO, response_texts(line for _, line in read_lines(request.responses)))
    return FORMAT, "the default without a model"


def _checkpoint_plan(request: EvalRequest) -> Plan:
    """In the format and by the template variables of the run that a checkpoint comes from, if it comes from one."""
    from rest_rl.train.policy import load_policy_tokenizer

    path, run, folder = resolve_origin(request.checkpoint)
    recorded = {"path": path, "chat_template_kwargs": dict(run.model.chat_template_kwargs) if run else {}}
    tables = apply_overrides({"model": recorded}, request.changes)
    if others := sorted(set(tables) - {"model"}):
        raise UserError(f"--set of {', '.join(others)}", "only keys of [model]", "leave the others out")
    table = from_mapping(ModelTable, tables["model"], "model")
    tokenizer = load_policy_tokenizer(table)
    is_training = request.prompt_mode == "training"
    keeps = request.prompt == "published" or bool(is_training and run and run.data.keep_prompts)
    asked = request.format or (run.rest.format if run and is_training else None)
    if request.prompt == "native":
        asked = _native_format(tokenizer, request.checkpoint, asked)
    name, reason = resolve_format(asked or (FORMAT if keeps else AUTO), tokenizer, table.chat_template_kwargs)
    reason = f"as in {folder}" if run and not request.format and is_training else reason
    frame, reason = _resolve_published_frame(request, name, reason, run)
    layout = _layout(tokenizer, name, frame, table.chat_template_kwargs)
    return Plan(request.prompt_mode, name, reason, keeps and request.benchmark == "api-bank", table, layout, frame)


def _server_plan(request: EvalRequest) -> Plan:
    """The server's own tool calling, or the tools described in words in a format that must be named."""
    from rest_rl.train.policy import load_policy_tokenizer

    tokenizer, variables = None, extra_request_fields(request).get("chat_template_kwargs")
    if request.tokenizer:
        tokenizer = load_policy_tokenizer(ModelTable(path=request.tokenizer))
        default = FORMAT if request.prompt == "published" else AUTO
        name, reason = resolve_format(request.format or default, tokenizer, variables)
    elif request.format or request.prompt == "native":
        name, reason = request.format or "hermes", "as set" if request.format else "where the server reads out none"
        get_format(name)
    elif request.prompt == "published":
        name, reason = FORMAT, "the published texts ask for it"
    else:
        raise UserError(
            "--endpoint without --format",
            "the format that the model writes calls in",
            "pass --format hermes (or toolrl, llama3, ...), --tokenizer DIR_OR_ID to read it off, or --prompt native "
            "for the server's own function calling",
        )
    frame, reason = _resolve_published_frame(request, name, reason)
    layout = _layout(tokenizer, name, frame, variables) if tokenizer is not None else None
    return Plan(request.prompt_mode, name, reason, request.prompt == "published", layout=layout, frame=frame)


def _layout(tokenizer: Any, name: str, frame: Frame | None, variables: Mapping[str, Any] | None) -> PromptLayout:
    return FlattenedLayout(tokenizer, frame, name, variables) if frame else PromptLayout(tokenizer, name, variables)


def _native_format(tokenizer: Any, model: str, asked: str | None) -> str:
    own = detect_tokenizer_format(tokenizer)
    if not own:
        shown = f"--prompt native and {model}, whose chat template shows no known format of calls"
        raise UserError(shown, "one that does", "leave --prompt out")
    if asked not in (None, own):
        expected = f"{own}, which the model's template writes"
        raise UserError(f"--prompt native and format {asked}", expected, "leave --format out, or --prompt")
    return own


def _resolve_published_frame(
    request: EvalRequest, name: str, reason: str, run: RunConfig | None = None
) -> tuple[Frame | None, str]:
    """(ToolRL's texts, why with the file they come from) if the model is asked by its prompts; (None, why) if not.

    So it is asked where the request says so, and where its run has trained on them. API-Bank brings its own texts.
    """
    given, is_toolrl = request.prompt_from, name.removesuffix(THINK_SUFFIX) == FORMAT
    kept = run.data.path if run and run.data.keep_prompts and is_toolrl else None
    is_asked = request.prompt == "published" or (request.prompt_mode == "training" and kept is not None)
    if request.benchmark == "api-bank" or not is_asked:
        if given:
            raise UserError(
                f"--prompt-from with --prompt {request.prompt_mode}",
                f"--prompt published, or the folder of a run that kept its prompts in {FORMAT}",
                "leave it out",
            )
        return None, reason
    if not is_toolrl:
        expected = f"{FORMAT}, which those prompts ask for"
        raise UserError(f"--prompt published and format {name}", expected, "leave --format out")
    if not (path := given or kept):
        expected = "a file of ToolRL's rows, whose texts are no part of this package"
        raise UserError("--prompt published without --prompt-from", expected, "pass --prompt-from rlla_sft.json")
    try:
        return frame_of(path), f"{reason}; texts from {path}"
    except UserError as error:
        other = "" if given else "; --prompt-from names another file than the run's data.path"
        raise UserError(error.problem, error.expected, error.remedy + other) from error


def extra_request_fields(request: EvalRequest) -> dict[str, Any]:
    """What `--extra-body` and `--set model.chat_template_kwargs.X=...` add to every request to a server."""
    table = apply_overrides({"model": {}}, request.changes)
    if set(table) != {"model"} or set(table["model"]) - {"chat_template_kwargs"}:
        raise UserError(
            f"--set {' '.join(request.changes)} with --endpoint",
            "only keys of model.chat_template_kwargs, which are sent with every request",
            "leave the others out",
        )
    body = dict(request.extra_body or {})
    variables = {**body.get("chat_template_kwargs", {}), **table["model"].get("chat_template_kwargs", {})}
    return {**body, "chat_template_kwargs": variables} if variables else body

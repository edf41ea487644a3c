"""Choose prompt and tool-call format from the request and from the model's training run."""

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
from rest_rl.runlog import SILENT, Observer, read_json_object


@dataclass(frozen=True)
class Plan:
    """The prompt and format of an evaluation, resolved before any weights are loaded."""

    prompt: str
    format: str
    format_reason: str
    keep_prompts: bool = False
    """Whether to use API-Bank's published prompts."""
    table: ModelTable | None = None
    """The `[model]` table of a checkpoint; None for other kinds of model."""
    layout: PromptLayout | None = None
    frame: Frame | None = None
    """The fixed wording of ToolRL's published prompts, if the model gets these prompts."""

    @property
    def tool_format(self) -> ToolFormat:
        return self.layout.format if self.layout else get_format(self.format)


def make_plan(request: EvalRequest, observer: Observer = SILENT) -> Plan:
    """Choose prompt and format. Raises UserError if options contradict each other or do not determine the format."""
    if request.source == "endpoint":
        return _server_plan(request, observer)
    if request.source == "checkpoint":
        return _checkpoint_plan(request, observer)
    placeholder = {"oracle": "not asked", "responses": "as recorded", "object": "training"}[request.source]
    name, reason = _format_without_tokenizer(request)
    get_format(name)
    frame, reason = _resolve_published_frame(request, name, reason)
    return Plan(request.prompt or placeholder, name, reason, request.prompt == "published", frame=frame)


def _format_without_tokenizer(request: EvalRequest) -> tuple[str, str]:
    if request.format and request.format != AUTO:
        return request.format, "as specified"
    if request.responses:
        recorded = read_json_object(Path(request.responses).with_name(SETTINGS))
        if isinstance(recorded.get("format"), str):
            return recorded["format"], f"from the {SETTINGS} next to the responses"
        return choose_format(AUTO, response_texts(line for _, line in read_lines(request.responses)))
    return FORMAT, "default without a model"


def _checkpoint_plan(request: EvalRequest, observer: Observer) -> Plan:
    # a checkpoint of a run keeps the format and the chat-template variables that it was trained with
    from rest_rl.train.policy import load_policy_tokenizer

    path, run, folder = resolve_origin(request.checkpoint)
    recorded = {"path": path, "chat_template_kwargs": dict(run.model.chat_template_kwargs) if run else {}}
    tables = apply_overrides({"model": recorded}, request.changes)
    if others := sorted(set(tables) - {"model"}):
        raise UserError(f"--set changes {', '.join(others)}", "only keys of [model]", "remove it, or write model.KEY")
    table = from_mapping(ModelTable, tables["model"], "model")
    tokenizer = load_policy_tokenizer(table, observer)
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


def _server_plan(request: EvalRequest, observer: Observer) -> Plan:
    # Without a tokenizer nothing reveals the model's format: the user names it or leaves calls to the server.
    from rest_rl.train.policy import load_policy_tokenizer

    tokenizer, variables = None, extra_request_fields(request).get("chat_template_kwargs")
    if request.tokenizer:
        tokenizer = load_policy_tokenizer(ModelTable(path=request.tokenizer), observer)
        default = FORMAT if request.prompt == "published" else AUTO
        name, reason = resolve_format(request.format or default, tokenizer, variables)
    elif request.format or request.prompt == "native":
        name, reason = request.format or "hermes", "as specified" if request.format else "if the server parses no calls"
        get_format(name)
    elif request.prompt == "published":
        name, reason = FORMAT, "required by the published texts"
    else:
        raise UserError(
            "the format of the model's tool calls is unknown",
            remedy="pass --format hermes (or toolrl, llama3, ...), --tokenizer DIR_OR_ID to detect it, or "
            "--prompt native for the server's function calling",
        )
    frame, reason = _resolve_published_frame(request, name, reason)
    layout = _layout(tokenizer, name, frame, variables) if tokenizer is not None else None
    return Plan(request.prompt_mode, name, reason, request.prompt == "published", layout=layout, frame=frame)


def _layout(tokenizer: Any, name: str, frame: Frame | None, variables: Mapping[str, Any] | None) -> PromptLayout:
    return FlattenedLayout(tokenizer, frame, name, variables) if frame else PromptLayout(tokenizer, name, variables)


def _native_format(tokenizer: Any, model: str, asked: str | None) -> str:
    own = detect_tokenizer_format(tokenizer)
    if not own:
        raise UserError(
            f"--prompt native: the chat template of {model} renders tool calls in no known format",
            remedy="remove --prompt",
        )
    if asked not in (None, own):
        expected = f"{own}, the format of the model's chat template"
        raise UserError(f"--prompt native with format {asked}", expected, "remove --format or --prompt")
    return own


def _resolve_published_frame(
    request: EvalRequest, name: str, reason: str, run: RunConfig | None = None
) -> tuple[Frame | None, str]:
    # ToolRL's prompts apply if the request names them, or if the model's run trained on them. API-Bank has its own.
    given, is_toolrl = request.prompt_from, name.removesuffix(THINK_SUFFIX) == FORMAT
    kept = run.data.path if run and run.data.keep_prompts and is_toolrl else None
    is_asked = request.prompt == "published" or (request.prompt_mode == "training" and kept is not None)
    if request.benchmark == "api-bank" or not is_asked:
        if given:
            raise UserError(
                f"--prompt-from has no effect with --prompt {request.prompt_mode}"
                + ("" if request.prompt else " (the default), unless the run was trained on published prompts"),
                remedy="add --prompt published, or remove --prompt-from",
            )
        return None, reason
    if not is_toolrl:
        expected = f"{FORMAT}, which these prompts describe"
        raise UserError(f"--prompt published with format {name}", expected, "remove --format")
    if not (path := given or kept):
        problem = "--prompt published needs a file with ToolRL's rows, whose texts are not part of this package"
        raise UserError(problem, remedy="download rlla_sft.json and pass it as --prompt-from")
    try:
        return frame_of(path), f"{reason}; texts from {path}"
    except UserError as error:
        other = "" if given else "; or pass --prompt-from to replace the run's data.path"
        raise UserError(error.problem, error.expected, error.remedy + other) from error


def extra_request_fields(request: EvalRequest) -> dict[str, Any]:
    """Return the fields that `--extra-body` and `--set model.chat_template_kwargs.X=...` add to every request."""
    table = apply_overrides({"model": {}}, request.changes)
    if set(table) != {"model"} or set(table["model"]) - {"chat_template_kwargs"}:
        raise UserError(
            f"--set {' '.join(request.changes)} with --endpoint",
            "only keys of model.chat_template_kwargs, which are sent with every request",
            "remove the others",
        )
    body = dict(request.extra_body or {})
    variables = {**body.get("chat_template_kwargs", {}), **table["model"].get("chat_template_kwargs", {})}
    return {**body, "chat_template_kwargs": variables} if variables else body

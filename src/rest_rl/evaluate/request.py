"""What an evaluation is asked to do, parsed once and checked; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from rest_rl.errors import UserError
from rest_rl.formats import get_format

if TYPE_CHECKING:
    from rest_rl.evaluate.conversation import Benchmark, Model

Source = Literal["oracle", "responses", "endpoint", "object", "checkpoint"]
DEFAULT_MAX_NEW_TOKENS, TOOL_WORLD_MAX_NEW_TOKENS = 4096, 160
"""Tokens of a response where nobody says: API-Bank was published with the first; the tool world is small."""
BATCH_SIZE, VLLM_BATCH_SIZE, BFCL_BATCH_SIZE = 16, 256, 64
"""Conversations at once. vLLM makes batches of its own; each conversation of BFCL may hold a process."""
MODEL_OPTIONS = ("changes", "context", "max_new_tokens", "tokenizer", "requests_per_minute", "extra_body")
SERVER_OPTIONS = ("tokenizer", "requests_per_minute", "extra_body")
CHECKPOINT_OPTIONS = ("vllm", "batch_size")
POSITIVE_FIELDS = ("max_new_tokens", "batch_size", "concurrency", "limit", "requests_per_minute", "prompts", "timeout")
BENCHMARK_PANEL, MODEL_PANEL, PROMPT_PANEL = "the benchmark", "who answers", "how it is asked"
SERVER_PANEL, SAMPLES_PANEL, OUTPUT_PANEL = "a server", "which samples", "where to"
MODEL_HELP = "a run folder, a model or adapter folder, a hub name; a server's model (tool-world: the embedded one)"
PROMPT_HELP = (
    "training (the default): laid out as in the model's run, or in --format; native: the model's (server's) own "
    "function calling; published: ToolRL's prompts with the texts of --prompt-from, for api-bank the benchmark's own"
)
TOKENIZER_HELP = (
    "the model's: prompts exactly as in training are sent to /completions as token ids, instead of messages to "
    "/chat/completions; also tells the format and what fits"
)


def _option(default: Any, panel: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    """A field, and the option that the command makes of it; a metavar N is an integer."""
    return field(default=default, metadata={"panel": panel, "help": help, "metavar": metavar, **more})


@dataclass(frozen=True)
class EvalRequest:
    """What is asked of whom, and how; the fields are the options of `rest-rl eval`, which explains each.

    `benchmark` is `bfcl`, `api-bank`, `tool-world`, a `package.module:OBJECT`, or a `Benchmark` itself; `model` may be
    a `Model` itself.
    """

    benchmark: str | Benchmark
    model: str | Model | None = _option(None, MODEL_PANEL, MODEL_HELP, "DIR_OR_ID")  # noqa: RUF009 - a field
    endpoint: str | None = _option(None, MODEL_PANEL, "an OpenAI-compatible server that holds --model", "URL")
    vllm: bool = _option(False, MODEL_PANEL, "generate with vLLM instead of transformers")
    responses: str | None = _option(None, MODEL_PANEL, 'score recorded responses: JSONL of {"id", "response"}', "FILE")
    oracle: bool = _option(False, MODEL_PANEL, "answer with the gold: a self-test of the whole path")
    changes: tuple[str, ...] = _option((), MODEL_PANEL, "a key of [model], as in a run: model.dtype=bfloat16", "A.B=C")
    prompt: str | None = _option(None, PROMPT_PANEL, PROMPT_HELP, choices=("training", "native", "published"))
    prompt_from: str | None = _option(
        None, PROMPT_PANEL, "rows as ToolRL published them, such as rlla_sft.json", "FILE"
    )
    format: str | None = _option(
        None, PROMPT_PANEL, "how the model writes calls (default: as its run or template)", "F"
    )
    max_new_tokens: int | None = _option(None, PROMPT_PANEL, "per response (default: 4096; tool world: 160)", "N")
    context: int | None = _option(None, PROMPT_PANEL, "tokens that the model holds (default: what it says)", "N")
    batch_size: int | None = _option(None, PROMPT_PANEL, "of a local model (default: 16; vLLM 256, BFCL 64)", "N")
    concurrency: int = _option(8, SERVER_PANEL, "requests at once", "N")
    timeout: float = _option(120.0, SERVER_PANEL, "seconds", "S")
    retries: int = _option(5, SERVER_PANEL, "per request", "N")
    requests_per_minute: int | None = _option(None, SERVER_PANEL, "at most (default: no limit)", "N")
    api_key_env: str = _option("OPENAI_API_KEY", SERVER_PANEL, "the environment variable that holds the key", "NAME")
    tokenizer: str | None = _option(None, SERVER_PANEL, TOKENIZER_HELP, "DIR_OR_ID")
    extra_body: Mapping[str, Any] | None = _option(
        None, SERVER_PANEL, "an object whose fields go into every request", "JSON"
    )
    categories: tuple[str, ...] = _option((), SAMPLES_PANEL, "groups of samples, as the tables name them", "A,B")
    limit: int | None = _option(None, SAMPLES_PANEL, "the first N samples of each category", "N")
    ids: tuple[str, ...] = _option((), SAMPLES_PANEL, "these samples only", "A,B")
    out: str | None = _option(None, OUTPUT_PANEL, "the evaluation's folder (default: runs/eval-BENCHMARK-MODEL)", "DIR")
    name: str | None = _option(None, OUTPUT_PANEL, "what tables call the model (default: its path)", "NAME")
    resume: bool = _option(False, OUTPUT_PANEL, "ask for what is missing or failed in the folder")
    data: str | None = _option(
        None, BENCHMARK_PANEL, "folder of level-{1,2,3}-api_processed.json", "DIR", only_for="api-bank"
    )
    version: Literal["v3", "v4"] = _option(
        "v3", BENCHMARK_PANEL, "bfcl-eval 2025.6.14, the paper's, or 2026.3.23", only_for="bfcl", choices=("v3", "v4")
    )
    prompts: int = _option(256, BENCHMARK_PANEL, "per split", "N", only_for="tool-world")
    seed: int = _option(20_000, BENCHMARK_PANEL, "of the prompts", "N", only_for="tool-world")
    decision: Literal["reasoning", "call"] = _option(
        "reasoning",
        BENCHMARK_PANEL,
        "where it is decided what to call, as in [data]",
        only_for="tool-world",
        choices=("reasoning", "call"),
    )
    command: tuple[str, ...] = field(default=(), repr=False)
    """The command line, for the record."""

    def __post_init__(self) -> None:
        for name in POSITIVE_FIELDS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{option_name(name)} {value}", "more than 0", "raise it")
        if self.retries < 0:
            raise UserError(f"--retries {self.retries}", "0 or more", "raise it")
        for own in fields(self):
            choices, value = own.metadata.get("choices"), getattr(self, own.name)
            if choices and value not in (own.default, *choices):
                raise UserError(
                    f"{option_name(own.name)} {value!r}", f"one of {', '.join(choices)}", "choose one of them"
                )
        self._check_source()
        self._check_options()
        if self.format not in (None, "auto"):
            get_format(self.format)

    @property
    def source(self) -> Source:
        """Where responses come from."""
        if self.oracle:
            return "oracle"
        if self.responses:
            return "responses"
        if self.endpoint:
            return "endpoint"
        return "checkpoint" if self.model is None or isinstance(self.model, str) else "object"

    @property
    def checkpoint(self) -> str:
        """The model's address; the tool world is the embedded model's home."""
        return str(self.model or "embedded")

    @property
    def prompt_mode(self) -> str:
        return self.prompt or "training"

    @property
    def response_limit(self) -> int:
        """Tokens of a response at most."""
        default = TOOL_WORLD_MAX_NEW_TOKENS if self.benchmark == "tool-world" else DEFAULT_MAX_NEW_TOKENS
        return default if self.max_new_tokens is None else self.max_new_tokens

    @property
    def effective_batch_size(self) -> int:
        """How many conversations a checkpoint goes on with at once."""
        if self.batch_size is not None:
            return self.batch_size
        size = VLLM_BATCH_SIZE if self.vllm else BATCH_SIZE
        return min(size, BFCL_BATCH_SIZE) if self.benchmark == "bfcl" else size

    def _check_source(self) -> None:
        chosen = [name for name in ("oracle", "responses", "endpoint") if getattr(self, name)]
        if len(chosen) > 1 or (self.model and chosen not in ([], ["endpoint"])):
            given = " and ".join(f"--{name}" for name in [*chosen, *(["model"] if self.model else [])])
            raise UserError(given, "one that answers", "leave the others out")
        if not chosen and not self.model and self.benchmark != "tool-world":
            raise UserError("no model", "--model, --endpoint with --model, --responses or --oracle", "pass one of them")
        if chosen == ["endpoint"] and not isinstance(self.model, str):
            raise UserError("--endpoint without --model", "the name that the server holds", "pass --model NAME")

    def _check_options(self) -> None:
        """UserError for an option that would change nothing, because it is for another kind of model."""
        if self.source in ("oracle", "responses", "object"):
            unused = (*CHECKPOINT_OPTIONS, *MODEL_OPTIONS)
            where = "a model object" if self.source == "object" else f"--{self.source}"
            found, expected = f"with {where}", "it with a checkpoint or a server"
        elif self.source == "endpoint":
            unused, found, expected = CHECKPOINT_OPTIONS, "with --endpoint", "it with a checkpoint as --model"
        else:
            unused, found, expected = SERVER_OPTIONS, "without --endpoint", "a server that it is for"
        for name in unused:
            if getattr(self, name) not in (None, False, ()):
                raise UserError(f"{option_name(name)} {found}", expected, "leave it out")


def option_name(name: str) -> str:
    """A field as the command line writes it."""
    return {"changes": "--set", "context": "--context-length"}.get(name, f"--{name.replace('_', '-')}")

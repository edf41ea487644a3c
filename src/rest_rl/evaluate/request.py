"""The options of an evaluation, validated once. Importing this module loads neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from rest_rl.errors import UserError
from rest_rl.formats import get_format

if TYPE_CHECKING:
    from rest_rl.evaluate.conversation import Benchmark, Model

Source = Literal["oracle", "responses", "endpoint", "object", "checkpoint"]
WORLD_BENCHMARKS = ("tool-world", "office", "shop")
TASK_BENCHMARKS = (*WORLD_BENCHMARKS, "env")
"""The values of `config.WORLDS`; importing that module here would slow down `--help`."""
DEFAULT_MAX_NEW_TOKENS, WORLD_MAX_NEW_TOKENS = 4096, 160
"""Default response limits in tokens: API-Bank's published setting, and the generators' short tasks."""
BATCH_SIZE, VLLM_BATCH_SIZE, BFCL_BATCH_SIZE = 16, 256, 64
"""Conversations per batch. vLLM schedules its own batches; each BFCL conversation may occupy a process."""
MODEL_OPTIONS = ("changes", "context", "max_new_tokens", "tokenizer", "requests_per_minute", "extra_body")
SERVER_OPTIONS = ("tokenizer", "requests_per_minute", "extra_body")
CHECKPOINT_OPTIONS = ("vllm", "batch_size")
POSITIVE_FIELDS = (
    "attempts",
    "turns",
    "max_new_tokens",
    "batch_size",
    "concurrency",
    "limit",
    "requests_per_minute",
    "prompts",
    "timeout",
)
BENCHMARK_PANEL, MODEL_PANEL, PROMPT_PANEL = "Benchmark", "Model", "Prompt and generation"
SERVER_PANEL, SAMPLES_PANEL, OUTPUT_PANEL = "Server", "Samples", "Output"
MODEL_HELP = "run folder, model or adapter folder, hub name, or the server's model (tool-world: the embedded model)"
PROMPT_HELP = (
    "training (the default): rendered as in the model's training run, or in --format; native: the function calling of "
    "the chat template or server; published: ToolRL's prompts with the texts of --prompt-from or of API-Bank"
)
TOKENIZER_HELP = (
    "the model's tokenizer: sends prompts rendered as in training to /completions as token ids, instead of messages to "
    "/chat/completions; also determines the format and the length of prompts"
)


def _option(default: Any, panel: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    # a dataclass field with what the command line needs to make it an option; metavar N marks an integer
    return field(default=default, metadata={"panel": panel, "help": help, "metavar": metavar, **more})


@dataclass(frozen=True)
class EvalRequest:
    """The benchmark, the model and the options of one evaluation.

    The fields are the options of `rest-rl eval`; `rest-rl eval --help` explains them. `benchmark` is `bfcl`,
    `api-bank`, `tool-world`, `office`, `shop`, `package.module:OBJECT` or a `Benchmark`; `model` may also be a `Model`.
    """

    benchmark: str | Benchmark
    model: str | Model | None = _option(None, MODEL_PANEL, MODEL_HELP, "DIR_OR_ID")  # noqa: RUF009 - a field
    endpoint: str | None = _option(None, MODEL_PANEL, "an OpenAI-compatible server that serves --model", "URL")
    vllm: bool = _option(False, MODEL_PANEL, "generate with vLLM instead of transformers")
    responses: str | None = _option(None, MODEL_PANEL, 'score recorded responses: JSONL of {"id", "response"}', "FILE")
    oracle: bool = _option(False, MODEL_PANEL, "respond with the gold answers, as a self-test")
    changes: tuple[str, ...] = _option((), MODEL_PANEL, "override a key of [model]: model.dtype=bfloat16", "A.B=C")
    prompt: str | None = _option(None, PROMPT_PANEL, PROMPT_HELP, choices=("training", "native", "published"))
    prompt_from: str | None = _option(None, PROMPT_PANEL, "ToolRL's published rows, such as rlla_sft.json", "FILE")
    format: str | None = _option(None, PROMPT_PANEL, "format of tool calls (default: from run or template)", "F")
    max_new_tokens: int | None = _option(None, PROMPT_PANEL, "tokens per response (default: 4096; worlds 160)", "N")
    context: int | None = _option(None, PROMPT_PANEL, "context length in tokens (default: the model's)", "N")
    batch_size: int | None = _option(None, PROMPT_PANEL, "batch of a local model (default: 16; vLLM 256, BFCL 64)", "N")
    concurrency: int = _option(8, SERVER_PANEL, "requests at the same time", "N")
    timeout: float = _option(120.0, SERVER_PANEL, "seconds per request", "S")
    retries: int = _option(5, SERVER_PANEL, "retries per request", "N")
    requests_per_minute: int | None = _option(None, SERVER_PANEL, "rate limit (default: none)", "N")
    api_key_env: str = _option("OPENAI_API_KEY", SERVER_PANEL, "the environment variable with the API key", "NAME")
    tokenizer: str | None = _option(None, SERVER_PANEL, TOKENIZER_HELP, "DIR_OR_ID")
    extra_body: Mapping[str, Any] | None = _option(None, SERVER_PANEL, "fields to add to every request", "JSON")
    categories: tuple[str, ...] = _option((), SAMPLES_PANEL, "only these groups, named as in the tables", "A,B")
    limit: int | None = _option(None, SAMPLES_PANEL, "only the first N samples of each group", "N")
    ids: tuple[str, ...] = _option((), SAMPLES_PANEL, "only these samples", "A,B")
    out: str | None = _option(None, OUTPUT_PANEL, "evaluation folder (default: runs/eval-BENCHMARK-MODEL)", "DIR")
    name: str | None = _option(None, OUTPUT_PANEL, "name of the model in tables (default: its path)", "NAME")
    resume: bool = _option(False, OUTPUT_PANEL, "continue in the folder: run missing and failed samples")
    data: str | None = _option(
        None, BENCHMARK_PANEL, "folder with level-{1,2,3}-api_processed.json", "DIR", only_for=("api-bank",)
    )
    version: Literal["v3", "v4"] = _option(
        "v3",
        BENCHMARK_PANEL,
        "bfcl-eval 2025.6.14 (the paper's), 2026.3.23",
        only_for=("bfcl",),
        choices=("v3", "v4"),
    )
    prompts: int = _option(256, BENCHMARK_PANEL, "prompts or tasks per split", "N", only_for=TASK_BENCHMARKS)
    seed: int = _option(20_000, BENCHMARK_PANEL, "seed of the prompts or tasks", "N", only_for=TASK_BENCHMARKS)
    decision: Literal["reasoning", "call"] = _option(
        "reasoning",
        BENCHMARK_PANEL,
        "where the tool is chosen",
        only_for=("tool-world",),
        choices=("reasoning", "call"),
    )
    env: str = field(default="")
    """The environment of the benchmark `env`, as in `env.path`."""
    tasks: str | None = _option(
        None, BENCHMARK_PANEL, "task rows of an environment without any", "FILE", only_for=("env",)
    )
    reward: str | None = _option(
        None, BENCHMARK_PANEL, "a function that scores rollouts", "MODULE:OBJECT", only_for=("env",)
    )
    options: Mapping[str, Any] | None = _option(
        None,
        BENCHMARK_PANEL,
        "options of the environment, such as the verify_tool of a server",
        "JSON",
        only_for=("env",),
    )
    attempts: int = _option(1, BENCHMARK_PANEL, "rollouts per task, for pass^k", "N", only_for=("env",))
    temperature: float | None = _option(
        None, BENCHMARK_PANEL, "of a local model (default: 0, or 1 with several attempts)", "T", only_for=("env",)
    )
    thoughts: Literal["keep", "drop"] = _option(
        "keep",
        BENCHMARK_PANEL,
        "thoughts of earlier turns, for a local model: keep, as in training, or drop",
        only_for=("env",),
        choices=("keep", "drop"),
    )
    turns: int = _option(8, BENCHMARK_PANEL, "responses per rollout", "N", only_for=("env",))
    command: tuple[str, ...] = field(default=(), repr=False)
    """The command line, recorded in environment.json."""

    def __post_init__(self) -> None:
        for name in POSITIVE_FIELDS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{option_name(name)} is {value}", "a number above 0", "raise it")
        if self.retries < 0:
            raise UserError(f"--retries is {self.retries}", "0 or more", "raise it")
        # the command line checks choices itself; this is for calls from Python
        for own in fields(self):
            choices, value = own.metadata.get("choices"), getattr(self, own.name)
            if choices and value not in (own.default, *choices):
                raise UserError(
                    f"{option_name(own.name)} is {value!r}", f"one of {', '.join(choices)}", "choose one of them"
                )
        self._check_source()
        self._check_options()
        if self.format not in (None, "auto"):
            get_format(self.format)

    @property
    def source(self) -> Source:
        """The kind of model: a checkpoint, an endpoint, recorded responses, the oracle, or a `Model` object."""
        if self.oracle:
            return "oracle"
        if self.responses:
            return "responses"
        if self.endpoint:
            return "endpoint"
        return "checkpoint" if self.model is None or isinstance(self.model, str) else "object"

    @property
    def checkpoint(self) -> str:
        """The model's path or name. The default, the embedded model, is used only for the tool world."""
        return str(self.model or "embedded")

    @property
    def prompt_mode(self) -> str:
        return self.prompt or "training"

    @property
    def response_limit(self) -> int:
        """The maximum number of tokens per response."""
        default = WORLD_MAX_NEW_TOKENS if self.benchmark in TASK_BENCHMARKS else DEFAULT_MAX_NEW_TOKENS
        return default if self.max_new_tokens is None else self.max_new_tokens

    @property
    def sampling_temperature(self) -> float:
        """The temperature of a local model; 0 is greedy."""
        return self.temperature if self.temperature is not None else float(self.attempts > 1)

    @property
    def effective_batch_size(self) -> int:
        """The number of conversations that a local model processes together."""
        if self.batch_size is not None:
            return self.batch_size
        size = VLLM_BATCH_SIZE if self.vllm else BATCH_SIZE
        return min(size, BFCL_BATCH_SIZE) if self.benchmark == "bfcl" else size

    def _check_source(self) -> None:
        chosen = [name for name in ("oracle", "responses", "endpoint") if getattr(self, name)]
        if len(chosen) > 1 or (self.model and chosen not in ([], ["endpoint"])):
            given = " and ".join(f"--{name}" for name in [*chosen, *(["model"] if self.model else [])])
            raise UserError(f"{given} cannot be combined", remedy="pass only one of them")
        if not chosen and not self.model and self.benchmark != "tool-world":
            raise UserError("no model given", remedy="pass --model, --endpoint, --responses or --oracle")
        if chosen == ["endpoint"] and not isinstance(self.model, str):
            raise UserError("--endpoint needs the name of the served model", remedy="pass it as --model NAME")

    def _check_options(self) -> None:
        # An option for another kind of model would have no effect, and the user would not notice.
        if self.source in ("oracle", "responses", "object"):
            unused = (*CHECKPOINT_OPTIONS, *MODEL_OPTIONS)
            where = "a model object" if self.source == "object" else f"--{self.source}, which loads no model"
            found, remedy = f"has no effect with {where}", "remove"
        elif self.source == "endpoint":
            unused, found, remedy = CHECKPOINT_OPTIONS, "has no effect with --endpoint", "remove"
        else:
            unused, found, remedy = SERVER_OPTIONS, "has no effect without --endpoint", "add --endpoint URL, or remove"
        for name in unused:
            if getattr(self, name) not in (None, False, ()):
                raise UserError(f"{option_name(name)} {found}", remedy=f"{remedy} {option_name(name)}")


def option_name(name: str) -> str:
    """Return the command-line option of a field of `EvalRequest`."""
    return {"changes": "--set", "context": "--context-length"}.get(name, f"--{name.replace('_', '-')}")

"""What an evaluation is asked to do, parsed once and checked; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rest_rl.errors import UserError

if TYPE_CHECKING:
    from rest_rl.evaluate.conversation import Benchmark, Model

Source = Literal["oracle", "responses", "endpoint", "object", "checkpoint"]
DEFAULT_NEW_TOKENS, WORLD_NEW_TOKENS = 4096, 160
"""Tokens of a response where nobody says: API-Bank was published with the first; the tool world is small."""
BATCH_SIZE, VLLM_BATCH_SIZE, BFCL_BATCH_SIZE = 16, 256, 64
"""Conversations at once. vLLM makes batches of its own; each conversation of BFCL may hold a process."""
MODEL_OPTIONS = ("changes", "context", "max_new_tokens", "tokenizer", "requests_per_minute", "extra_body")
SERVER_OPTIONS = ("tokenizer", "requests_per_minute", "extra_body")
CHECKPOINT_OPTIONS = ("vllm", "batch_size")
FLAGS = {"changes": "set"}
POSITIVE = ("max_new_tokens", "batch_size", "concurrency", "limit", "requests_per_minute", "prompts", "timeout")
CHOICES = {
    "prompt": (None, "training", "native", "published"),
    "version": ("v3", "v4"),
    "decision": ("reasoning", "call"),
}


@dataclass(frozen=True)
class EvalRequest:
    """What is asked of whom, and how.

    `benchmark` is `bfcl`, `api-bank`, `tool-world`, a `package.module:OBJECT`, or a `Benchmark` itself. `model` is a
    run folder, a model's or adapter's folder, a hub name, what an `endpoint` calls its model, or a `Model` itself.
    """

    benchmark: str | Benchmark
    model: str | Model | None = None
    version: Literal["v3", "v4"] = "v3"
    """Of BFCL."""
    data: str | None = None
    """The folder of API-Bank's files."""
    prompts: int = 256
    """Of the tool world, per split; so are `seed` and `decision`."""
    seed: int = 20_000
    decision: Literal["reasoning", "call"] = "reasoning"
    endpoint: str | None = None
    vllm: bool = False
    responses: str | None = None
    """A file of recorded responses."""
    oracle: bool = False
    """Answer with the gold."""
    changes: tuple[str, ...] = ()
    """Keys of `[model]`, such as `model.dtype=bfloat16`."""
    prompt: str | None = None
    """`training`, `native` or `published`."""
    prompt_from: str | None = None
    format: str | None = None
    max_new_tokens: int | None = None
    context: int | None = None
    batch_size: int | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5
    requests_per_minute: int | None = None
    api_key_env: str = "OPENAI_API_KEY"
    tokenizer: str | None = None
    """The endpoint's model's: prompts are sent as token ids."""
    extra_body: Mapping[str, Any] | None = None
    categories: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    limit: int | None = None
    """The first samples of each category."""
    out: str | None = None
    """The folder; `runs/eval-BENCHMARK-MODEL` by default."""
    name: str | None = None
    """What tables call the model."""
    resume: bool = False
    command: tuple[str, ...] = field(default=(), repr=False)
    """The command line, for the record."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{option(name)} {value}", "more than 0", "raise it")
        if self.retries < 0:
            raise UserError(f"--retries {self.retries}", "0 or more", "raise it")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                shown = ", ".join(filter(None, choices))
                raise UserError(f"{option(name)} {getattr(self, name)!r}", f"one of {shown}", "choose one of them")
        self._check_source()
        self._check_options()

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
    def asked_prompt(self) -> str:
        return self.prompt or "training"

    @property
    def new_tokens(self) -> int:
        """Tokens of a response at most."""
        usual = WORLD_NEW_TOKENS if self.benchmark == "tool-world" else DEFAULT_NEW_TOKENS
        return usual if self.max_new_tokens is None else self.max_new_tokens

    @property
    def conversations(self) -> int:
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
            idle = (*CHECKPOINT_OPTIONS, *MODEL_OPTIONS)
            where = "a model object" if self.source == "object" else f"--{self.source}"
            found, expected = f"with {where}", "it with a checkpoint or a server"
        elif self.source == "endpoint":
            idle, found, expected = CHECKPOINT_OPTIONS, "with --endpoint", "it with a checkpoint as --model"
        else:
            idle, found, expected = SERVER_OPTIONS, "without --endpoint", "a server that it is for"
        for name in idle:
            if getattr(self, name) not in (None, False, ()):
                raise UserError(f"{option(name)} {found}", expected, "leave it out")


def option(name: str) -> str:
    return f"--{FLAGS.get(name, name).replace('_', '-')}"

"""The model to train and its tokenizer, from a directory, the hub or the package itself; adapters for it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file, extract_commit_hash, find_adapter_config_file, logging

from rest_rl.config import AUTO, EMBEDDED, ModelTable, RunConfig, unknown_key_error
from rest_rl.data.hub import has_hub
from rest_rl.errors import RenamedWarning, UserError

ADAPTER_CONFIG = "adapter_config.json"
SCALED_ROPE_TYPES = ("yarn", "linear", "dynamic")
"""Rotary positions whose factor stretches what the configuration states."""


def embedded_model_dir() -> Path:
    """The directory of the warm-started model that the package ships."""
    folder = Path(str(resources.files("rest_rl").joinpath("assets/tool_world")))
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"no model in {folder}", "the embedded one", "install the package again")
    return folder


def silence_transformers() -> None:
    """Leave the terminal to the command: no bars, hints and deprecation warnings of transformers."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("default", category=RenamedWarning)  # ours: these the user can act on


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """As `silence_transformers`, for as long as a workflow runs."""
    shows_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with warnings.catch_warnings():
        silence_transformers()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shows_bars:
                logging.enable_progress_bar()


def load_policy(config: ModelTable, peft: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), left padded; UserError if either cannot be read or the tokenizer has no chat template.

    An adapter's folder gives its base model with the adapter: to be trained on with `[peft]`, which must not differ
    from it, and else merged in, in float32, for all weights to be trained.
    """
    tokenizer = load_policy_tokenizer(config)
    path, adapter = resolve_adapter(config)
    dtype = torch.float32 if config.dtype == AUTO else getattr(torch, config.dtype)
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        settings["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        settings["quantization_config"] = four_bit_config()
    if adapter is not None and not peft:
        settings["dtype"] = torch.float32  # a merge in 16 bits would round most of a small adapter away
    with explain_load_errors("model", path):
        model = AutoModelForCausalLM.from_pretrained(path, **settings)
        if adapter is not None:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, adapter, is_trainable=bool(peft))
            model = adapted if peft else cast(Any, adapted).merge_and_unload().to(dtype)
    return model, tokenizer


def load_policy_tokenizer(config: ModelTable) -> Any:
    """The tokenizer of a policy: fast, left padded, with a chat template and an end of sequence, or a UserError.

    An adapter without a tokenizer of its own has its base model's.
    """
    path = embedded_model_dir() if config.path == EMBEDDED else config.path
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
        path, _ = resolve_adapter(config)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(
            f"{path}, whose tokenizer has no chat template",
            "one that lays out tools and messages",
            "put a chat_template.jinja beside its tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}, whose tokenizer has no end-of-sequence token", "one", "set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_policy_config(config: ModelTable) -> Any:
    """The architecture of a policy, without its weights; UserError if it cannot be read."""
    path, _ = resolve_adapter(config)
    with explain_load_errors("model", path):
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def context_length(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a model holds: its positions, or what its tokenizer says if that is less; None if unlimited.

    Positions that are stretched (YaRN, linear, dynamic) count stretched; other kinds are published so.
    """
    text = config.get_text_config() if config else None
    positions, rope = (getattr(text, name, None) for name in ("max_position_embeddings", "rope_parameters"))
    if positions and rope and (factor := rope.get("factor")) and rope.get("rope_type") in SCALED_ROPE_TYPES:
        published = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(factor * published))
    stated = getattr(tokenizer, "model_max_length", None)  # 10**30 where nobody said
    known = [number for number in (positions, stated) if isinstance(number, int) and 0 < number < 10**9]
    return min(known, default=None)


def policy_context_length(config: ModelTable, tokenizer: Any) -> int | None:
    """As `context_length`, of a policy; a tokenizer has no configuration, and a broken one fails when it is loaded."""
    try:
        return context_length(load_policy_config(config), tokenizer)
    except UserError:
        return context_length(None, tokenizer)


def load_generation_config(model: str | Path) -> Any:
    """What a model's generation_config.json says, at which samplers stop too; None without the file."""
    try:
        return SimpleNamespace(generation_config=GenerationConfig.from_pretrained(str(model)))
    except OSError:
        return None


def resolve_adapter(config: ModelTable) -> tuple[str | Path, str | None]:
    """(where the weights are, the adapter that goes with them or None), for a folder as for a hub name."""
    if config.path == EMBEDDED:
        return embedded_model_dir(), None
    recorded = read_adapter_config(config.path)
    if recorded is None:
        return config.path, None
    require_peft(f"{config.path}, an adapter,")
    base = recorded.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"the adapter {config.path} without base_model_name_or_path", "it", "add it")
    # The embedded model lies in the package, which may have moved since the adapter was trained.
    moved = Path(base).name == embedded_model_dir().name and not Path(base).exists()
    return (embedded_model_dir() if moved else base), config.path


def read_adapter_config(path: str) -> dict[str, Any] | None:
    """The configuration of an adapter, None for a whole model."""
    file = str(Path(path) / ADAPTER_CONFIG) if Path(path).is_dir() else find_hub_adapter(path)
    if file is None or not Path(file).is_file():
        return None
    with explain_load_errors("adapter", path):
        recorded = json.loads(Path(file).read_text(encoding="utf-8"))
    return recorded if isinstance(recorded, dict) else {}


@functools.cache
def find_hub_adapter(name: str) -> str | None:
    """The configuration file of an adapter on the hub; None for a whole model, or where there is no such name."""
    has_hub()
    try:
        return find_adapter_config_file(name)
    except (OSError, ValueError):  # loading the model reports what is wrong with the name
        return None


def find_hub_commit(name: str, *, is_adapter: bool = False) -> str | None:
    """The commit that a name on the hub stands for here; None where there is no such name."""
    try:
        file = find_hub_adapter(name) if is_adapter else cached_file(name, "config.json")
    except (OSError, ValueError):  # as above
        return None
    return extract_commit_hash(file, None)


def four_bit_config() -> BitsAndBytesConfig:
    """Weights in NF4, computed in bfloat16."""
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.load_in_4bit = true",
            "a CUDA device and the package bitsandbytes",
            "pip install 'trl[peft,quantization]', or set load_in_4bit = false",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def new_adapter_config(config: RunConfig) -> Any | None:
    """The LoraConfig of the adapter that a run adds; None without `[peft]` and where the model brings its own.

    UserError for a `[peft]` that differs from the adapter it is to go on with.
    """
    asked = lora_config(config.peft)
    recorded = None if config.model.path == EMBEDDED or asked is None else read_adapter_config(config.model.path)
    if recorded is None:
        return asked
    differing = [name for name, value in config.peft.items() if recorded.get(name) != value]
    if differing:
        name = differing[0]
        raise UserError(
            f"peft.{name} = {config.peft[name]!r} for the adapter {config.model.path}, whose own is "
            f"{recorded.get(name)!r}",
            "the same, because the run goes on with that adapter",
            "change it, or leave [peft] out to merge the adapter and train all weights",
        )
    return None


def lora_config(table: Mapping[str, Any]) -> Any | None:
    """`[peft]` as peft's LoraConfig, None without it: rank 16, alpha twice the rank, all linear layers but the head."""
    if not table:
        return None
    require_peft("[peft]")
    from peft import LoraConfig

    fields = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    for name in table:
        if name not in fields:
            raise unknown_key_error(f"peft.{name}", name, fields)
    rank = table.get("r", 16)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"peft.r = {rank!r}", "a rank of at least 1", "change it")
    given = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **table}
    try:
        return LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"[peft] {dict(table)} ({error})", "fields of LoraConfig", "correct it") from error


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A fast tokenizer from a directory or the hub; a lone tokenizer.json will do. UserError if there is none."""
    lone = Path(path) / "tokenizer.json"
    if not Path(path).is_dir():
        has_hub()
    with explain_load_errors("tokenizer", path):
        if lone.is_file() and not (lone.parent / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(lone))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(f"{path}, a slow tokenizer", "a fast one", "save it with a tokenizer.json")
    return tokenizer


@contextmanager
def explain_load_errors(what: str, path: str | Path) -> Iterator[None]:
    """UserError for a model or tokenizer that does not load; the loaders raise a dozen types."""
    try:
        with quiet_transformers():
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{what} {path} ({type(error).__name__}: {first_line:.200})",
            "a directory with config.json, model.safetensors and tokenizer.json, or a hub name",
            "check the path",
        ) from error


def require_peft(what: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what} without the package peft", "it", "pip install peft")

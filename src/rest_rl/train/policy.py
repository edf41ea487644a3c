"""Load the model to train, its tokenizer and its adapter, from a folder, the Hub or this package."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

from rest_rl.config import AUTO, ModelTable, RunConfig, unknown_key_error
from rest_rl.data.hub import has_hub
from rest_rl.errors import RenamedWarning, UserError
from rest_rl.runlog import SILENT, Observer
from rest_rl.train.named_models import find_moved_base, locate_model

ADAPTER_CONFIG = "adapter_config.json"
# Types of rotary embeddings whose `factor` extends the configured number of positions.
SCALED_ROPE_TYPES = ("yarn", "linear", "dynamic")
# Parameters of glibc's `mallopt`.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def silence_transformers() -> None:
    """Turn off the progress bars, hints and deprecation warnings of transformers."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("default", category=RenamedWarning)  # ours: these the user can act on


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Apply `silence_transformers` to a `with` block or a decorated function only."""
    shows_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with warnings.catch_warnings():
        silence_transformers()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shows_bars:
                logging.enable_progress_bar()


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for reuse, if its C library is glibc; return whether it does.

    On a CPU, generation allocates and frees keys and values of up to 100 MB in every layer for every token. By default,
    glibc returns blocks of more than 32 MB to the system, which clears their pages each time they are allocated again:
    that can take several times as long as the attention itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library or system
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def load_policy(config: ModelTable, peft: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer; UserError if either cannot be read.

    If `config.path` is an adapter, its base model is loaded too. With `peft` (the run's `[peft]`) the adapter stays
    separate and trainable; without it, the adapter is merged into the model, for training all weights.
    """
    if not torch.accelerator.is_available():
        keep_freed_memory()
    tokenizer = load_policy_tokenizer(config)
    path, adapter = resolve_adapter(config)
    dtype = torch.float32 if config.dtype == AUTO else getattr(torch, config.dtype)
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        settings["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        settings["quantization_config"] = four_bit_config()
    if adapter is not None and not peft:
        settings["dtype"] = torch.float32  # merging in 16 bits would round away most of a small adapter
    with explain_load_errors("model", path):
        model = AutoModelForCausalLM.from_pretrained(path, **settings)
        if adapter is not None:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, adapter, is_trainable=bool(peft))
            # When PEFT saves the adapter, it looks its base model up by this name, if need be on the hub.
            cast(Any, adapted.peft_config["default"]).base_model_name_or_path = str(path)
            # Loading an adapter freezes its base model, and merging leaves it frozen.
            model = adapted if peft else cast(Any, adapted).merge_and_unload().to(dtype).requires_grad_(True)
    return model, tokenizer


def load_policy_tokenizer(config: ModelTable, observer: Observer = SILENT) -> Any:
    """Return the fast tokenizer of a model, set to pad on the left; an adapter without one uses its base model's.

    UserError if it cannot be read, or has no chat template or end-of-sequence token.
    """
    base, adapter = resolve_adapter(config, observer)
    path = adapter or base
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
        path = base
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {path} has no chat template",
            "one that renders messages and tools",
            "put a chat_template.jinja next to its tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise UserError(f"the tokenizer of {path} has no end-of-sequence token", remedy=remedy)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_policy_config(config: ModelTable) -> Any:
    """Return the transformers configuration of a model; UserError if it cannot be read."""
    path, _ = resolve_adapter(config)
    with explain_load_errors("model", path):
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def context_length(config: Any, tokenizer: Any) -> int | None:
    """Return a model's context length in tokens, None if unlimited.

    The result is the smaller of the model's number of positions and its tokenizer's limit. For YaRN, linear and dynamic
    RoPE scaling, the extended number of positions is computed; with other kinds, the configuration already contains it.
    """
    text = config.get_text_config() if config else None
    positions, rope = (getattr(text, name, None) for name in ("max_position_embeddings", "rope_parameters"))
    if positions and rope and (factor := rope.get("factor")) and rope.get("rope_type") in SCALED_ROPE_TYPES:
        published = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(factor * published))
    stated = getattr(tokenizer, "model_max_length", None)  # transformers writes 10**30 for no limit
    known = [number for number in (positions, stated) if isinstance(number, int) and 0 < number < 10**9]
    return min(known, default=None)


def policy_context_length(config: ModelTable, tokenizer: Any) -> int | None:
    """Return the `context_length` of a model, or its tokenizer's limit if the model's configuration cannot be read."""
    try:
        return context_length(load_policy_config(config), tokenizer)
    except UserError:
        # A broken configuration is reported when the model is loaded.
        return context_length(None, tokenizer)


def load_generation_config(model: str | Path) -> Any:
    """Return an object with a model's `generation_config`, for `get_stop_ids`; None if the model has no such file."""
    try:
        return SimpleNamespace(generation_config=GenerationConfig.from_pretrained(str(model)))
    except OSError:
        return None


def resolve_adapter(config: ModelTable, observer: Observer = SILENT) -> tuple[str | Path, str | None]:
    """Return the locations of the base model and of the adapter; the second is None if the path is a whole model."""
    path = str(locate_model(config.path, observer))
    if config.adapter:
        require_peft(f"the adapter {config.adapter}")
        adapter = str(locate_model(config.adapter))
        if read_adapter_config(adapter) is None:
            expected = f"a folder or hub name with an {ADAPTER_CONFIG}"
            raise UserError(f"model.adapter {config.adapter!r} is not an adapter", expected, "change it")
        if read_adapter_config(path) is not None:
            problem = f"model.adapter is set, but model.path {config.path!r} is an adapter itself"
            raise UserError(problem, "one adapter", "remove model.adapter, or set model.path to the base model")
        return path, adapter
    recorded = read_adapter_config(path)
    if recorded is None:
        return path, None
    require_peft(f"the adapter {config.path}")
    base = recorded.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        expected = "the folder or hub name of its base model"
        raise UserError(f"{ADAPTER_CONFIG} of {config.path} has no base_model_name_or_path", expected, "add it")
    return locate_model(find_moved_base(base), observer), path


# The adapter_config.json of a folder or hub name; None for a whole model.
def read_adapter_config(path: str) -> dict[str, Any] | None:
    file = str(Path(path) / ADAPTER_CONFIG) if Path(path).is_dir() else find_hub_adapter(path)
    if file is None or not Path(file).is_file():
        return None
    with explain_load_errors("adapter", path):
        recorded = json.loads(Path(file).read_text(encoding="utf-8"))
    return recorded if isinstance(recorded, dict) else {}


# None also if the name does not exist: loading the model then reports what is wrong with it.
@functools.cache
def find_hub_adapter(name: str) -> str | None:
    has_hub()
    try:
        return find_adapter_config_file(name)
    except (OSError, ValueError):
        return None


def find_hub_commit(name: str, *, is_adapter: bool = False) -> str | None:
    """Return the commit of the Hub repository `name` that transformers loads here; None if there is no such name."""
    try:
        file = find_hub_adapter(name) if is_adapter else cached_file(name, "config.json")
    except (OSError, ValueError):
        return None
    return extract_commit_hash(file, None)


def four_bit_config() -> BitsAndBytesConfig:
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.load_in_4bit is true, but this machine lacks a CUDA device or the package bitsandbytes",
            remedy="pip install 'trl[peft,quantization]', or set model.load_in_4bit = false",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def new_adapter_config(config: RunConfig) -> Any | None:
    """Return the LoraConfig of the adapter that a run adds; None without `[peft]` or if the model is an adapter."""
    requested = lora_config(config.peft)
    adapter = None if requested is None else resolve_adapter(config.model)[1]
    if adapter is None:
        return requested
    recorded = read_adapter_config(adapter) or {}
    # Training continues on the recorded adapter: another [peft] would silently have no effect.
    differing = [name for name, value in config.peft.items() if recorded.get(name) != value]
    if differing:
        name = differing[0]
        raise UserError(
            f"peft.{name} is {config.peft[name]!r}, but the adapter {adapter} has {recorded.get(name)!r}",
            "the adapter's value, because training continues on that adapter",
            "change it, or remove [peft] to merge the adapter and train all weights",
        )
    return None


def lora_config(table: Mapping[str, Any]) -> Any | None:
    """Return `[peft]` as a LoraConfig; defaults: rank 16, alpha 2 x rank, all linear layers but the output head."""
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
        raise UserError(f"peft.r is {rank!r}", "a whole number of at least 1", "change it")
    given = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **table}
    try:
        return LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft rejects [peft] = {dict(table)} ({error})", remedy="correct it") from error


def add_adapter(model: Any, lora: Any | None) -> Any:
    """Return the model with a new adapter of the LoraConfig `lora` and frozen weights; the model itself if None."""
    if lora is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, copy.deepcopy(lora))  # peft changes the config that it is given


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load a fast tokenizer from the Hub or a folder with at least tokenizer.json; UserError if there is none."""
    file = Path(path) / "tokenizer.json"
    if not Path(path).is_dir():
        has_hub()
    with explain_load_errors("tokenizer", path):
        if file.is_file() and not (file.parent / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(file))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} is slow", "a fast one", "save it with a tokenizer.json")
    return tokenizer


LOADED_FILES = {"model": "config.json and model.safetensors", "tokenizer": "tokenizer.json"}


# The loaders of transformers raise about a dozen types for a model that is missing or damaged.
@contextmanager
def explain_load_errors(what: str, path: str | Path) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"the {what} '{path}' cannot be loaded ({type(error).__name__}: {first_line:.200})",
            f"a folder with {LOADED_FILES[what]}, or a Hub name",
            "check the name and the network",
        ) from error


def require_peft(what: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what} requires the package peft, which is not installed", remedy="pip install peft")

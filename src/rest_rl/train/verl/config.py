"""verl's own configuration for a run: its stock YAML, then what the run file says, then `[verl]`.

Importing this needs no verl; composing does.
"""

# pyright: reportMissingImports=false
# verl has an environment of its own.
from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, cast

from rest_rl.config import RunConfig, unknown_key
from rest_rl.errors import UserError
from rest_rl.train.trl.trainer import reshapes
from rest_rl.train.verl.overrides import UNSET
from rest_rl.train.verl.refusals import check_refused
from rest_rl.train.verl.settings import TAKEN_IN, VerlJob, flat_verl, plugin_table, verl_settings
from rest_rl.train.verl.trl_keys import unread_trl

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["VerlJob", "as_yaml", "compose_config", "unread_trl", "verl_settings"]

STOCK = "verl.trainer.config", "ppo_trainer"
"""verl's configuration: the module of its YAML files and the one that names the others."""
NUMBER_OR_TEXT = ("algorithm.rollout_correction.rollout_is_threshold",)
"""Keys whose stock value is a number but may be a text, here of two bounds."""


def compose_config(config: RunConfig, job: VerlJob) -> DictConfig:
    """What verl gets, checked by verl's own `validate_config`.

    The table `rest` of it is the plugin's: `rest.run` is the run file whole, `rest.folder` the run folder. Strings
    directly under `[verl]` choose among verl's files (`model_engine = "megatron"`). ValueError for a key that verl does
    not have, unless it begins with `+`, and for a configuration that verl refuses.
    """
    settings = verl_settings(config, job)
    composed = stock_config([f"{name}={value}" for name, value in config.verl.items() if isinstance(value, str)])
    for path, value in settings.items():
        put(composed, path.split("."), value)
    for parts, value in leaves(config.verl):
        is_choice = len(parts) == 1 and isinstance(value, str)
        if not is_choice:
            put(composed, parts, value)
    for path in TAKEN_IN:
        put(composed, path.split("."), settings[path])
    # TOML's own way to write a dollar, so that OmegaConf finds nothing to fill in.
    table = plugin_table(config, job)
    put(composed, ["+rest"], {**table, "run": table["run"].replace("${", "\\u0024{")})
    check_composed(composed, reshapes=reshapes(config.rest.resolve()))
    return composed


def stock_config(choices: list[str]) -> DictConfig:
    """The YAML of verl with some of its files chosen; ValueError for a choice that there is not."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    module, name = STOCK
    try:
        with initialize_config_module(module, version_base=None):
            return compose(name, overrides=choices)
    except HydraException as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"[verl] {', '.join(choices)} ({first_line})",
            "a choice that verl's configuration has, such as model_engine = 'megatron'",
            "change it",
        ) from error


def as_yaml(composed: DictConfig) -> str:
    """A configuration as verl's own YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(composed)


def leaves(table: Mapping[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    """The values of nested tables with their paths; what a `+` adds is taken whole."""
    for name, value in table.items():
        *within, key = name.split(".")
        path = (*parents, *within, key)
        if isinstance(value, Mapping) and not key.startswith("+"):
            yield from leaves(value, path)
        else:
            yield list(path), value


def put(composed: DictConfig, path: list[str], value: Any) -> None:
    """Set one value; ValueError for a key that is not there, unless its last part begins with `+`, which adds it."""
    from omegaconf import DictConfig, open_dict

    *parents, last = path
    node, adds = composed, last.startswith("+")
    for depth, part in enumerate(parents):
        if adds and part not in node.keys():  # noqa: SIM118 - as below
            with open_dict(node):
                node[part] = {}
        node = known(node, part, path[: depth + 1])
        if not isinstance(node, DictConfig):
            where = ".".join(path[: depth + 1])
            raise UserError(f"a table [verl.{where}]", "one value, as in verl", f"write {part} = ...")
    value, key = with_none(value), last.removeprefix("+")
    if not adds or key in node.keys():  # noqa: SIM118 - as below
        check_kind([*parents, key], known(node, key, path), value)
    with open_dict(node):
        node[key] = value


def with_none(value: Any) -> Any:
    """A value of `[verl]` with None for the word null, in lists and tables too."""
    if isinstance(value, Mapping):
        return {key: with_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_none(item) for item in value]
    return None if value == UNSET else value


def check_kind(path: list[str], old: Any, value: Any) -> None:
    """ValueError for a value that cannot stand where verl has a table, a number or a truth value."""
    from omegaconf import DictConfig

    where = ".".join(path)
    if isinstance(old, DictConfig) and old and value is not None and not isinstance(value, Mapping):
        raise UserError(f"verl.{where} = {value!r}", "a table, as in verl", "write its keys")
    if not isinstance(old, (bool, int, float)) or isinstance(value, (bool, int, float, type(None))):
        return
    if where not in NUMBER_OR_TEXT and not (isinstance(value, str) and "${" in value):
        kind = "true or false" if isinstance(old, bool) else "a number"
        raise UserError(f"verl.{where} = {value!r}", f"{kind}, as in verl", "write it without quotes")


def known(node: DictConfig, part: str, path: list[str]) -> Any:
    """The value of a key that verl has, None where it is unset; ValueError for any other."""
    from omegaconf import OmegaConf

    if part not in node.keys():  # noqa: SIM118 - `in node` denies keys that are unset
        raise ValueError(unknown_key(f"verl.{'.'.join(path)}", part, map(str, node.keys())))
    return OmegaConf.select(node, part, throw_on_resolution_failure=False)


def check_composed(composed: DictConfig, *, reshapes: bool) -> None:
    """ValueError for what the plugin or verl itself refuses, as far as verl tells before its workers start."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    try:
        plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except OmegaConfBaseException as error:
        raise refused(error) from error
    check_refused(flat_verl(plain), reshapes=reshapes)
    if importlib.util.find_spec("vllm") is None:  # verl's check of a LoRA rank, on a machine that trains nothing
        no_adapter = {"actor_rollout_ref": {"model": {"lora_rank": 0}}}
        composed = cast("DictConfig", OmegaConf.merge(composed, no_adapter))
    try:
        with redirect_stdout(io.StringIO()):
            omega_conf_to_dataclass(composed.actor_rollout_ref.rollout)
            omega_conf_to_dataclass(composed.algorithm)
            validate_config(composed, use_reference_policy=need_reference_policy(composed), use_critic=False)
    except (AssertionError, TypeError, ValueError, OmegaConfBaseException, HydraException) as error:
        raise refused(error) from error


def refused(error: Exception) -> ValueError:
    """What verl says, in one line."""
    text = " ".join(str(error).split())
    return UserError(f"a configuration that verl refuses ({text:.300})", "one that it takes", "mend [verl]")

